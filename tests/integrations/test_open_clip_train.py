"""open_clip_train by its own launcher and by ours: the same losses in every step, in one process and over two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("open_clip_train.main", reason="needs open_clip_torch[training]")

pytestmark = pytest.mark.clients

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# open_clip_train names a device to DistributedDataParallel, which refuses one that is no GPU.
LAUNCH = """
import runpy, sys
import open_clip, torch

class OnTheHost(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)

torch.nn.parallel.DistributedDataParallel = OnTheHost
open_clip.add_model_config(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
COLOURS = ("red", "green", "blue", "yellow", "white", "grey", "purple", "orange")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a launcher that knows it, and 64 pictures with captions."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "models").mkdir()
    (folder / "models" / "tiny.json").write_text(json.dumps(MODEL), encoding="utf-8")
    (folder / "launch.py").write_text(LAUNCH, encoding="utf-8")
    generator = np.random.default_rng(0)
    rows = ["filepath\ttitle"]
    for i in range(64):
        file = folder / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
        rows.append(f"{file}\ta {COLOURS[i % 8]} picture number {i}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def trained(
    folder: Path, module: str, world: int, *options: str
) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """The losses that each step logs, and the weights at the end. Adam's large eps: some gradients (of key biases) are
    only rounding, which it would blow up to steps of full size."""
    name = f"{module.split('.')[0]}-{world}-{'-'.join(options)}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, folder / "launch.py", folder / "models", module]
    command += ["--model=tiny", f"--train-data={folder / 'train.csv'}", "--dataset-type=csv", f"--name={name}"]
    command += ["--epochs=1", f"--batch-size={16 // world}", "--workers=0", "--precision=fp32"]
    command += [
        "--log-every-n-steps=1",
        "--lr=1e-3",
        "--warmup=1",
        "--eps=0.01",
        "--device=cpu",
        "--dist-backend=gloo",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-12000:]
    lines = [line for line in done.stderr.splitlines() if "Train Epoch" in line]
    losses = [tuple(float(x) for x in re.findall(r"oss: ([0-9.]+) \(", line)) for line in lines]
    checkpoint = torch.load(
        folder / "logs" / name / "checkpoints" / "epoch_1.pt", map_location="cpu", weights_only=False
    )
    return losses, {key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, ("--accum-freq=2",)),
        (2, ("--gather-with-grad",)),
        (2, ("--siglip",)),
    ],
    ids=lambda x: "".join(x).replace("--", " ").strip() if isinstance(x, tuple) else str(x),
)
def test_the_same_losses(folder: Path, world: int, options: tuple[str, ...]) -> None:
    theirs, their_weights = trained(folder, "open_clip_train.main", world, *options)
    losses, weights = trained(folder, "mmkernels.integrations.open_clip", world, *options)
    steps = 2 if options == ("--accum-freq=2",) else 4
    assert len(losses) == len(theirs) == steps and all(len(of_step) == 2 for of_step in losses)
    if world == 1 or options == ("--gather-with-grad",):  # otherwise open_clip logs the loss of rank 0's rows
        assert np.allclose(losses, theirs, rtol=2e-5)
    for name, weight in their_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")

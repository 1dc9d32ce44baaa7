"""Every example runs unmodified in its own process, and prints what its last line promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LAST_LINES = {
    "clip_step.py": "gradients equal those of one pass over the whole batch",
    "gated_cross_attention.py": "the gate has opened: only the tokens that have an image before them have changed",
    "infonce_over_ranks.py": "loss and gradients are those of one process with all pairs",
    "lightning_gradcache.py": "the same weights, with activations of 32 samples instead of 256",
    "open_clip_loss.py": "the same losses and weights as with open_clip's loss",
    "pack_dataset.py": "every sample gets the logits that it gets alone",
    "packed_vlm_step.py": "the loss of a pack is the mean",
    "vlm_layer.py": "the same as SDPA with the dense mask",
}
RANKS = {"infonce_over_ranks.py"}  # by torchrun
LIBRARIES = {
    "lightning_gradcache.py": ("lightning",),
    "open_clip_loss.py": ("open_clip",),
    "pack_dataset.py": ("datasets", "transformers"),
}


def test_every_example_is_tested_and_listed() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert files == set(LAST_LINES)
    assert all(f"[{name}]({name})" in listed for name in files)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.clients if name in LIBRARIES else ()) for name in sorted(LAST_LINES)]
)
def test_example_runs(name: str, tmp_path: Path) -> None:
    for library in LIBRARIES.get(name, ()):
        pytest.importorskip(library)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name in RANKS else []
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[name])

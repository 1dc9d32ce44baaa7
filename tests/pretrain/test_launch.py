"""A run under torchrun: killed, stopped, hanging; and what the launcher and the reader are told."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from mmkernels.pretrain import checkpoint, launch, load_model
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.run_folder import RunFolder, begun_before, stored_records

SMALL = "--recipe clip --batch 8 --chunk 3 --model.width 32 --model.heads 2 --model.embed-dim 16 --eval-every 0"
QUIET = "--no-tensorboard --eval-limit 8 --threads 1"


def torchrun(folder: Path, run: str, more: str = "", world: int = 2, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts"]
    launcher += [str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.1"]
    options = f"{SMALL} {QUIET} --data folder:{folder} --run-folder {run} {more}".split()
    return [*launcher, "-m", "mmkernels.pretrain", *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(run / "checkpoints" / f"step-{step:08d}")


def until(run: Path, step: int, process: subprocess.Popen[str], patience: float = 120) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in stored_records(run, "step")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come: {process.communicate()[1]}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks."""
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "mmkernels.pretrain" in line]


def test_killed_ranks_change_nothing(pictures: Path, tmp_path: Path) -> None:
    """To the last bit: four ranks, of which two are killed, one after the other."""
    more = "--steps 40 --checkpoint-every 4"
    undisturbed = torchrun(pictures, f"{tmp_path}/whole", more, world=4)
    subprocess.run(undisturbed, env=environment(), check=True, capture_output=True)
    run = tmp_path / "killed"
    command = torchrun(pictures, str(run), more, world=4, restarts=4)
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for step, victim in ((6, 2), (21, 0)):
            until(run, step, process)
            os.kill(workers(process)[victim], signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    steps = [record["step"] for record in stored_records(run, "step")]
    assert steps == list(range(1, 41)), "each once, though some ran twice"
    whole, killed = weights(tmp_path / "whole", 40), weights(run, 40)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_sigterm_on_any_rank_saves_and_says_so(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = torchrun(pictures, str(run), "--steps 4000 --checkpoint-every 0")
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        until(run, 3, process)
        os.kill(workers(process)[1], signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"exitcode *: 143", errors), "128 + SIGTERM, which torchrun shows"
    step = int(re.search(r"stopped at step (\d+)", said)[1])  # type: ignore[index]
    assert checkpoint.step_of(checkpoint.latest(run / "checkpoints")) == step
    again = torchrun(pictures, str(run), "--steps 4000 --checkpoint-every 0 --again")
    with subprocess.Popen(
        again, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        until(run, step + 2, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    steps = [record["step"] for record in stored_records(run, "step")]
    assert steps == list(range(1, len(steps) + 1))


HANGS = """
    import os, sys, time
    from mmkernels.pretrain import main
    from mmkernels.pretrain.data.collate import Collator

    read = Collator.__call__

    def slowly(self, samples, items, step=0, *args, **kwargs):
        if os.environ["RANK"] == "1" and step == 2:
            {what}
        return read(self, samples, items, step, *args, **kwargs)

    Collator.__call__ = slowly
    sys.exit(main())
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("time.sleep(60)", r"rank 0, step 2: waiting for the data of other ranks .* rank 1, step 2: reading data for"),
        ("raise OSError('the disk is gone')", r"rank 1 could not read its part of a batch: OSError: the disk is gone"),
    ],
)
def test_a_rank_that_waits_says_for_whom(what: str, said: str, pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(textwrap.dedent(HANGS).replace("{what}", what), encoding="utf-8")
    command = torchrun(pictures, str(tmp_path / "run"), "--steps 8 --timeout 15")  # ranks may start far apart
    place = len(command) - 1 - command[::-1].index("-m")
    command[place : place + 2] = [str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr


def test_options_survive_torchrun() -> None:
    """It takes any prefix of its own options, before it hands over the rest."""
    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    shown = subprocess.run([sys.executable, "-m", "mmkernels.pretrain", "--help"], capture_output=True, text=True)
    ours = set(re.findall(r"--[a-z][\w.-]*", shown.stdout)) - {"--help", "--run"}  # --run-folder is its other name
    assert "--run-folder" in ours and len(ours) > 50
    assert not [(mine, other) for mine in ours for other in theirs if other.startswith(mine)]


def test_a_start_that_was_killed_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(run=tmp_path)
    (tmp_path / "beginning.json").write_text('["config.json", "tokenizer.json", "classes.json"]', encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer.json.partial").write_text("{", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert begun_before(config) == config, "without a restart nothing is touched"
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begun_before(config) == config
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_restart_leaves_others_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a model that somebody has put there."""
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = Config(run=tmp_path, again=True)
    assert begun_before(config) == config
    assert len(list(tmp_path.iterdir())) == 3


def test_a_restart_resumes_what_its_launcher_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(run=tmp_path / "run", steps=3)
    RunFolder(config).begin(config, "{}", {})
    assert not (tmp_path / "run/beginning.json").exists()
    assert not begun_before(config).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert begun_before(config).resume
    monkeypatch.setattr("mmkernels.pretrain.run_folder.launcher", lambda: "process 1 of elsewhere")
    assert not begun_before(config).resume, "an older run's folder is refused, as without a restart"
    assert begun_before(dataclasses.replace(config, again=True)).resume
    assert RunFolder(dataclasses.replace(config, resume=True)), "who began it is no setting"


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_a_whole_run_in_shards(parallel: str, pictures: Path, tmp_path: Path) -> None:
    """In low precision, with evaluations, an average, a report, and a resumption in one process."""
    run = tmp_path / "run"
    more = f"--parallel {parallel} --precision bfloat16 --ema 0.9 --checkpoint-every 2"
    command = torchrun(pictures, str(run), f"{more} --steps 6")
    command[command.index("--eval-every") + 1] = "3"
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert [record["step"] for record in stored_records(run, "eval")] == [3, 6]
    assert (run / "report.html").stat().st_size > 10_000
    vectors = load_model(run).embed("text", ["a red circle", "a blue square"])
    assert vectors.isfinite().all() and vectors.dtype == torch.float32


def _beside_nccl(rank: int, world: int) -> tuple[str, list[float], str]:
    """As if the group that there is had NCCL alone."""
    made, new_group = [], dist.new_group

    def recorded(**options: Any) -> Any:
        made.append(options.pop("backend"))
        return new_group(backend="gloo", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
        patch.setattr(dist, "new_group", recorded)
        with launch.launched(Config(device="cpu")) as (peers, _):
            told = peers.table([rank]).flatten().tolist()
            assert peers.group is not dist.group.WORLD
        patch.setattr(dist, "get_backend_config", lambda: "cpu:gloo")
        patch.setattr(launch, "device_of", lambda config: torch.device("cuda", 1))
        with pytest.raises(ValueError, match="device: ") as error, launch.launched(Config()):
            pass
    return made[0], told, str(error.value)


def test_a_group_that_takes_nothing_on_the_host_gets_one_beside_it() -> None:
    expected = "device: expected one for which the process group has a backend (cpu:gloo), got cuda:1"
    assert ranks.run(2, _beside_nccl) == [("cpu:gloo,cuda:nccl", [0, 1], expected)] * 2


@pytest.mark.parametrize(("backend", "ended"), [("gloo", ["destroyed"]), ("nccl", ["aborted"])])
def test_after_an_error_nobody_waits_for_ranks_that_are_gone(
    backend: str, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To destroy a group of NCCL waits for what is in flight."""
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_store_of_this_start", lambda *args: None)
    monkeypatch.setattr(launch, "_ranks", lambda group, config: launch.ALONE)
    monkeypatch.setattr(dist, "get_backend_config", lambda: f"cpu:gloo,cuda:{backend}")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    with launch.launched(Config(device="cpu")):
        pass
    assert done == ["destroyed"]
    done.clear()
    with pytest.raises(OSError, match="gone"), launch.launched(Config(device="cpu")):
        raise OSError("gone")
    assert done == ended


def test_after_an_error_a_new_group_can_be_made(pictures: Path, tmp_path: Path) -> None:
    """In the same processes."""
    script = tmp_path / "twice.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch.distributed as dist

            from mmkernels.pretrain import Config
            from mmkernels.pretrain.launch import launched

            for attempt in range(2):
                try:
                    with launched(Config(device="cpu")) as (ranks, _):
                        assert ranks.table([1]).sum() == 2
                        if attempt == 0:
                            raise OSError("gone")
                except OSError:
                    assert not dist.is_initialized()
            """
        ),
        encoding="utf-8",
    )
    command = torchrun(pictures, "")
    place = len(command) - 1 - command[::-1].index("-m")
    subprocess.run([*command[:place], str(script)], env=environment(), check=True, timeout=120)

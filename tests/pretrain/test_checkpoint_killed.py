"""Writing checkpoints: killed at any moment, in the background, on a full disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.damaged import damage
from pretrain.test_resume import Make, assert_same_end, one, resumed
from torch import Tensor

from mmkernels.pretrain import checkpoint, load_model, main, train
from mmkernels.pretrain.checkpoint import DamagedError, SaveError, Saver, saver, writing

# For each folder that it is told, a child that saves in a loop, the same step twice now and then, and says what is on
# disk; a kill comes at any moment.
CHILDREN = """
import os, sys, torch
from pathlib import Path
from mmkernels.pretrain.checkpoint import Saver, writing

def save(folder):
    module, saver, step = torch.nn.Linear(64, 64), Saver(keep=1), 0
    while True:
        step += 1
        for again in range(2 if step % 3 == 0 else 1):
            torch.nn.init.constant_(module.weight, step)
            saver.save(folder, step, module, None, {"step": step})
            if step > 1:
                print(step - 1, flush=True)

for folder in sys.stdin:
    child = os.fork()
    if not child:
        save(Path(folder.strip()))
    print("child", child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path: Path) -> None:
    moments = random.Random(0)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", CHILDREN], **pipes) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        try:
            for turn in range(20):
                folder = tmp_path / str(turn)
                parent.stdin.write(f"{folder}\n")
                said = [parent.stdout.readline().split() for _ in range(moments.randrange(2, 7))]
                time.sleep(moments.random() * 0.03)
                os.kill(next(int(line[1]) for line in said if line[0] == "child"), signal.SIGKILL)
                said += iter(lambda: parent.stdout.readline().split(), ["dead"])
                at_least = max(int(line[0]) for line in said if line[0] != "child")
                found, warnings = checkpoint.newest_whole(folder, checkpoint.load)
                assert found is not None and not warnings
                weights, values = found
                assert values["step"] >= at_least
                assert torch.equal(weights["weight"], torch.full((64, 64), float(values["step"])))
                step = values["step"] + 1
                checkpoint.save(folder, step, one(1.0), keep=1)
                assert [path.name for path in folder.iterdir()] == [f"step-{step:08d}"], "what the kill left is gone"
        finally:
            parent.kill()


@pytest.mark.parametrize("at", range(1, 12))
def test_a_kill_between_any_two_changes_of_names(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one checkpoint, which another of the same step replaces."""

    class Killed(BaseException):
        pass

    calls = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            real(*args)

        return call

    checkpoint.save(tmp_path, 5, one(1.0), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", counted(os.replace))
        patch.setattr("shutil.rmtree", counted(shutil.rmtree))
        patch.setattr("os.fsync", counted(os.fsync))
        with pytest.raises(SaveError, match="Killed"):
            checkpoint.save(tmp_path, 5, one(2.0), keep=1)
    found = checkpoint.newest_whole(tmp_path, checkpoint.load_weights)[0]
    assert found is not None and float(found["w"][0]) in (1.0, 2.0)
    checkpoint.save(tmp_path, 6, one(1.0), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"], "what the kill left is gone"


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at `save`, although the module has changed since."""
    go_on, begun = threading.Event(), threading.Event()
    write = writing.write_shards

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(writing, "write_shards", slow)
    module = one(1.0)
    with Saver(keep=2) as writer:
        path = writer.save(tmp_path, 1, module, None, {"at": [1]})
        assert begun.wait(60)
        assert isinstance(module.w, Tensor)
        module.w.fill_(2.0)
        assert not path.exists() and checkpoint.latest(tmp_path) is None
        second = threading.Thread(target=writer.save, args=(tmp_path, 2, module))
        second.start()
        second.join(0.05)
        assert second.is_alive(), "at most one is being written"
        go_on.set()
        second.join(60)
        assert float(checkpoint.load_weights(path)["w"][0]) == 1.0
    assert float(checkpoint.load_weights(tmp_path / "step-00000002")["w"][0]) == 2.0


def test_an_error_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next save or at the end; once. The checkpoint before it stays."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    told = r"the checkpoint of step 2 could not be written to .* \(OSError: \[Errno 28\] No space left on device\)"
    writer = Saver(keep=1)
    writer.save(tmp_path, 1, one(1.0))
    writer.wait()
    for later in (writer.wait, lambda: writer.save(tmp_path, 3, one(3.0)), lambda: writer.__exit__(None)):
        with monkeypatch.context() as patch:
            patch.setattr(saver, "write_index", full)
            writer.save(tmp_path, 2, one(2.0))
            with pytest.raises(SaveError, match=told):
                later()
        writer.wait()
        assert list(checkpoint.steps_in(tmp_path)) == [1]
    writer.save(tmp_path, 4, one(4.0))
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    write = saver.write_index

    def removed(partial: Path, *rest: Any) -> None:
        shutil.rmtree(tmp_path)
        write(partial, *rest)

    monkeypatch.setattr(saver, "write_index", removed)
    writer.save(tmp_path, 5, one(5.0))
    with pytest.raises(SaveError, match="step 5 could not be written"):
        writer.__exit__(None)
    writer.save(tmp_path, 6, one(6.0))
    writer.__exit__(ZeroDivisionError)  # which says more
    writer.wait()


def test_a_run_that_cannot_save_says_so(tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_index", full)
    monkeypatch.setattr("mmkernels.pretrain.cli.parse", lambda argv: tiny(eval_every=0))
    assert main([]) == 1
    assert "the checkpoint of step 3 could not be written" in capsys.readouterr().err


def test_a_run_goes_on_from_the_one_before_a_damaged_one(tiny: Make, tmp_path: Path) -> None:
    train(tiny(run=tmp_path / "whole"))
    train(tiny())
    run = tmp_path / "run"
    damage(run / "checkpoints" / "step-00000012" / "weights__0_0.distcp", "cut")
    with pytest.raises(DamagedError, match=r"Delete .*step-00000012 to use the checkpoint before it"):
        load_model(run)
    folder = train(resumed(tiny())).folder
    (warning,) = folder.records("warning")
    assert "step-00000012/weights__0_0.distcp is damaged" in warning["message"]
    assert warning["message"].endswith("the run goes on from step-00000009") and warning["step"] == 9
    assert [record["step"] for record in folder.records("step")] == list(range(1, 13))
    assert_same_end(run, tmp_path / "whole")

"""A stopped run, however abruptly, ends where it would have ended: bit for bit."""

from __future__ import annotations

import dataclasses
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmkernels import Modality
from mmkernels.pretrain import Config, checkpoint, main, train
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data import TrainLoader
from mmkernels.pretrain.guards import Interrupt, NotFiniteError
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError
from mmkernels.pretrain.setup import open_source
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer

Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def _heeds_ctrl_c() -> Iterator[None]:
    """A shell starts a background job with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def state(run: Path) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and every tensor of the newest checkpoint: weights, optimizer, random state."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    weights, training = checkpoint.load(newest)
    moments = {f"optimizer.{name}": tensor for name, tensor in training["optimizer"]["tensors"].items()}
    return training["step"], {**weights, **moments}


def assert_same_end(run: Path, other: Path) -> None:
    (steps, tensors), (other_steps, others) = state(run), state(other)
    assert steps == other_steps
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def resumed(config: Config) -> Config:
    return dataclasses.replace(config, resume=True)


# The child kills itself: after the log of step 8, when checkpoint 6 may still be being written, or between writing
# checkpoint 9 and renaming it.
KILLS = {
    "in a step": """
from mmkernels.pretrain.journal import Journal
step = Journal.step
def patched(self, number, batch, **rest):
    step(self, number, batch, **rest)
    if number == 8: os.kill(os.getpid(), signal.SIGKILL)
Journal.step = patched
""",
    "in a checkpoint": """
replace = os.replace
def patched(source, target):
    if str(target).endswith("step-00000009"): os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = patched
""",
}
CHILD = """
import os, pickle, signal, sys
{kill}
from mmkernels.pretrain import train
train(pickle.load(sys.stdin.buffer))
"""


@pytest.mark.parametrize("kill", KILLS)
def test_killed(kill: str, tiny: Make, tmp_path: Path) -> None:
    train(tiny(run=tmp_path / "whole"))
    child = subprocess.run([sys.executable, "-c", CHILD.format(kill=KILLS[kill])], input=pickle.dumps(tiny()))
    assert child.returncode == -signal.SIGKILL
    assert state(tmp_path / "run")[0] in ((3, 6) if kill == "in a step" else (6,))
    train(resumed(tiny()))
    assert_same_end(tmp_path / "run", tmp_path / "whole")

    steps = [record["step"] for record in RunFolder(resumed(tiny())).records("step")]
    assert steps == list(range(1, 13)), "the log has every step once"
    losses = [
        [r["loss"] for r in RunFolder(resumed(tiny(run=tmp_path / name))).records("step")] for name in ("run", "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    train(tiny(run=tmp_path / "whole"))
    step = Journal.step

    def interrupting(self: Journal, at: int, batch: Batch, **rest: float) -> None:
        step(self, at, batch, **rest)
        if at == 4:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", interrupting)
        outcome = train(tiny())
    assert outcome.interrupted
    assert outcome.step == state(tmp_path / "run")[0] == 4, "the step is finished, and saved although none was due"
    assert outcome.folder.report.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(resumed(tiny()))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_an_interrupted_command_says_how_to_go_on(tiny: Make, tmp_path: Path, monkeypatch, capsys) -> None:
    step = Journal.step

    def interrupting(self: Journal, at: int, batch: Batch, **rest: float) -> None:
        step(self, at, batch, **rest)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "step", interrupting)
    monkeypatch.setattr("mmkernels.pretrain.cli.parse", lambda argv: tiny())
    assert main([]) == 130
    assert f"mmkernels pretrain --resume --run {tmp_path / 'run'}" in capsys.readouterr().out


def test_the_second_interrupt_is_not_held_back() -> None:
    interrupt = Interrupt()
    with interrupt.listening():
        signal.raise_signal(signal.SIGINT)
        assert interrupt
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_before_the_first_checkpoint(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(run=tmp_path / "whole", checkpoint_every=0))
    step = Journal.step

    def failing(self: Journal, at: int, batch: Batch, **rest: float) -> None:
        step(self, at, batch, **rest)
        if at == 2:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", failing)
        with pytest.raises(OSError, match="disk full"):
            train(tiny(checkpoint_every=0))
    train(resumed(tiny(checkpoint_every=0)))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_resumes_to_itself(tiny: Make, tmp_path: Path) -> None:
    train(tiny())
    before = state(tmp_path / "run")
    outcome = train(resumed(tiny()))
    assert outcome.step == before[0] == 12
    after = state(tmp_path / "run")
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())


def test_the_folder_of_another_run_is_refused(tiny: Make, tmp_path: Path) -> None:
    train(tiny(steps=2))
    with pytest.raises(RunFolderError, match=r"step-00000002\. Resume it with --resume, or name another with --run"):
        train(tiny(steps=2))
    with pytest.raises(RunFolderError, match=r"steps: 2 -> 3; lr: 0\.0015 -> 0\.1"):
        train(resumed(tiny(steps=3, lr=0.1)))
    train(resumed(tiny(steps=2, eval_every=1)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds files already"):
        train(tiny(run=tmp_path / "notes"))
    with pytest.raises(RunFolderError, match="holds no run"):
        train(resumed(tiny(run=tmp_path / "nowhere")))


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny: Make, tmp_path: Path, monkeypatch) -> None:
    train(tiny(run=tmp_path / "whole"))
    following = TrainLoader.__next__

    def poisoned(self: TrainLoader):
        batch = following(self)
        if batch.step == 7:
            batch["image"].media[Modality.IMAGE].values[3, 1] = float("nan")
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "__next__", poisoned)
        with pytest.raises(NotFiniteError, match=r"step 7: the loss is nan .*\.png.* saved in .*step-00000007") as stop:
            train(tiny())
    assert "No weight was updated" in str(stop.value)
    train(resumed(tiny()))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def one(value: float) -> torch.nn.Module:
    """A module with one tensor, "w" [300]."""
    module = torch.nn.Module()
    module.register_buffer("w", torch.full((300,), value))
    return module


def test_checkpoints_are_whole_and_few(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "partial-00000001").mkdir(parents=True)
    for step in (1, 2, 30):
        checkpoint.save(folder, step, one(float(step)), None, {"step": step, "seen": [1, "a"]}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000030"]
    newest = checkpoint.latest(folder)
    weights, training = checkpoint.load(newest)
    assert checkpoint.step_of(newest) == 30
    assert torch.equal(weights["w"], torch.full((300,), 30.0))
    assert training == {"step": 30, "seen": [1, "a"]}
    checkpoint.save(folder, 30, one(0.0), keep=2)
    assert torch.equal(checkpoint.load(newest)[0]["w"], torch.zeros(300))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000030"]
    checkpoint.save(folder, 4, one(4.0), keep=2)
    assert list(checkpoint.steps_in(folder)) == [2, 4], "a run that goes on from step 2 gets to 30 again"


def test_a_checkpoint_holds_every_moving_part(tiny: Make) -> None:
    """A trainer with another seed becomes the first by loading its checkpoint, and both continue identically."""
    config = tiny()
    data = open_source(config)
    tokenizer = TextTokenizer.train([], 400)
    first = Trainer(config, data, tokenizer, torch.device("cpu"))
    for _ in range(3):
        next(first.loader)
        for p in first.parameters:
            p.grad = torch.randn_like(p)
        first.update()
    path = first.save(config.folder / "checkpoints", wait=True)
    second = Trainer(dataclasses.replace(config), data, tokenizer, torch.device("cpu"))
    second.load(path)
    assert second.step == 3
    for trainer in (first, second):
        trainer.begin()
    one, other = (next(trainer.loader)["image"].media[Modality.IMAGE].values for trainer in (first, second))
    assert torch.equal(one, other)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)


def test_what_a_step_draws_depends_on_its_number_alone(tiny: Make) -> None:
    """Dropout, say: of the seed, the step and the rank, not of what was drawn before."""
    config = tiny()
    data = open_source(config)
    trainer = Trainer(config, data, TextTokenizer.train([], 400), torch.device("cpu"))
    batch = next(trainer.loader)
    trainer.begin()
    trainer.backward(batch)
    trainer.update()  # blocks begin as the identity, whatever is dropped
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer.begin()
        losses.append(trainer.backward(batch).loss)
    assert losses[0] == losses[1]
    trainer.step += 1
    trainer.begin()
    assert trainer.backward(batch).loss != losses[0], "there is dropout, which another step draws anew"


def test_a_damaged_run_folder(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(steps=3))
    run = tmp_path / "run"
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\xfe\x00{"kind"\n')
    assert train(resumed(tiny(steps=3))).step == 3
    (run / "checkpoints/step-00000003/training.pt").write_bytes(b"")
    assert main(["--resume", "--run", str(run)]) == 1
    said = capsys.readouterr().err
    assert "step-00000003/training.pt is damaged (ValueError: expected " in said and "to begin the run anew" in said
    for content in (b"", b"[]", b'{"model": 3}', b"\xff"):
        (run / "config.json").write_bytes(content)
        with pytest.raises(RunFolderError, match=r"config\.json: expected the settings of a run"):
            train(resumed(tiny(steps=3)))

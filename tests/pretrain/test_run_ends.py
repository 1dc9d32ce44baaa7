"""What is left of a run that stopped, skipped steps, or whose log is damaged: the log, the report, the comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain.stored_runs import figure, stored

from mmkernels import cli
from mmkernels.pretrain import Config, checkpoint, train
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.checkpoint import SaveError, saver
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.report.compare import compared, comparison_page, comparison_table
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError, stored_records
from mmkernels.pretrain.trainer import Trainer

Make = Callable[..., Config]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the losses of some steps, counted from 1, be NaN."""
    backward = Trainer.backward

    def fail(*steps: int) -> None:
        def failed(self: Trainer, batch: Batch) -> Any:
            found = backward(self, batch)
            return found._replace(loss=float("nan")) if self.step + 1 in steps else found

        monkeypatch.setattr(Trainer, "backward", failed)

    return fail


def steps_shown(run: Path, other: Path) -> str:
    return compared([run, other]).runs[0].summary()["steps"]


@pytest.mark.parametrize(("line", "damage"), [(1, b'{"kind"'), (5, b"["), (5, b"\x00\xff"), (5, b"null"), (9, b"x")])
def test_a_damaged_line_is_named(line: int, damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any but a last one without its end: otherwise older figures would be taken for the newest."""
    run, other = (stored(tmp_path / name, [figure("x", 0.5)]) for name in ("run", "other"))
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    log.write_bytes(b"".join([*lines[: line - 1], damage + b"\n", *lines[line:]]))
    told = rf"run/log\.jsonl: expected a record in each line, got something else in line {line}\. Mend or delete"
    for read in (lambda: compared([run, other]), lambda: stored_records(run, "step")):
        with pytest.raises(RunFolderError, match=told):
            read()
    assert cli.main(["compare", str(run), str(other), "--out", str(tmp_path / "page.html")]) == 1
    assert f"got something else in line {line}" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_a_bracket_that_is_missing(tmp_path: Path) -> None:
    run = stored(tmp_path / "run", [figure("x", 0.5)])
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines[-1] = lines[-1].replace("[", "", 1)
    (run / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=f"in line {len(lines)}"):
        compared([run, stored(tmp_path / "other")])


def test_a_last_line_without_its_end_is_no_damage(tmp_path: Path) -> None:
    """It is being written, or the run was killed then; a whole one counts. Blank lines are nothing."""
    run = stored(tmp_path / "run")
    whole = (run / "log.jsonl").read_bytes()
    for end in (3, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        (run / "log.jsonl").write_bytes(b"\n" + whole[:end])
        assert len(stored_records(run)) == whole[: end + 1].count(b"\n"), end


@pytest.mark.parametrize("more", [b'{"kind": "step", "st', b'{"kind": "step", "st\n\xff\n'])
def test_a_resumed_run_leaves_damage_out_and_says_so(more: bytes, tiny: Make, tmp_path: Path) -> None:
    """It writes the log anew, so what a kill left of a line is never joined to another."""
    train(tiny(steps=3))
    with (tmp_path / "run" / "log.jsonl").open("ab") as log:
        lines = len(stored_records(tmp_path / "run"))
        log.write(more)
    folder = train(tiny(steps=3, resume=True)).folder
    messages = [r["message"] for r in folder.records("warning")]
    numbers = f"{lines + 1}, {lines + 2}"
    assert messages == ([f"log.jsonl: left out what was damaged: line {numbers}"] if b"\n" in more else [])
    assert len(folder.records("start")) == 2 and len(folder.records("step")) == 3


@pytest.mark.parametrize("at", [1, 5])
def test_a_loss_that_is_not_finite_leaves_a_report(
    at: int, tiny: Make, tmp_path: Path, failing: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(at)
    with pytest.raises(NotFiniteError) as error:
        train(tiny())
    assert "warning: " not in capsys.readouterr().err, "the error is printed, once"
    run, other = tmp_path / "run", stored(tmp_path / "other")
    (warning,) = stored_records(run, "warning")
    assert warning["message"] == str(error.value) and warning["step"] == at - 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "the loss is nan" in page and f"{at - 1} of 12 steps" in page
    found = compared([run, other])
    said = f"run has stopped: after step {at - 1}: the loss is nan and the gradient norm "
    assert steps_shown(run, other) == f"{at - 1} of 12: stopped"
    assert any(remark.startswith(said) for remark in found.remarks)
    assert said in comparison_table(found) and said in comparison_page(found)

    failing()
    train(dataclasses.replace(tiny(), resume=True))
    assert steps_shown(run, other) == "12" and not any("stopped" in remark for remark in compared([run, other]).remarks)


def test_a_run_that_goes_on_after_a_stop_is_unfinished(
    tiny: Make, failing: Callable[..., None], tmp_path: Path
) -> None:
    failing(5)
    with pytest.raises(NotFiniteError):
        train(tiny())
    log = tmp_path / "run" / "log.jsonl"
    start = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**start, "step": 4}) + "\n")
    assert steps_shown(tmp_path / "run", stored(tmp_path / "other")) == "4 of 12: unfinished"


def test_why_a_run_stopped_comes_before_its_other_warnings(
    tiny: Make, tmp_path: Path, failing: Callable[..., None]
) -> None:
    """Of which the page shows the first ten."""
    failing(*range(1, 13))
    with pytest.raises(NotFiniteError):
        train(tiny(skip=11))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = page[page.index('<div class="card warn">') :]
    assert shown.index("after step 11: the loss is nan") < shown.index("step 1: the loss is nan")
    assert "and 2 more in log.jsonl" in shown and "11 (11 skipped) of 12 steps" in page


def test_too_many_broken_samples_leave_a_report(tiny: Make, pictures: Path, tmp_path: Path) -> None:
    for path in pictures.glob("blue-*.png"):
        path.write_bytes(b"")
    with pytest.raises(TooManyBrokenError):
        train(tiny(max_broken=0.1))
    run = tmp_path / "run"
    reason = "4 of 30 samples could not be read, more than max_broken=0.1"
    *broken, last = (record["message"] for record in stored_records(run, "warning"))
    assert last == reason and all(message.startswith("skipped blue-") for message in broken)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert reason in page and "could not be made" not in page
    found = compared([run, stored(tmp_path / "other")])
    assert f"run has stopped: {reason}." in found.remarks


def test_skipped_steps_are_done(tiny: Make, tmp_path: Path, failing: Callable[..., None]) -> None:
    """Also the last ones, which no record of a step tells of."""
    failing(2, 11, 12)
    folder = train(tiny(skip=3, eval_every=4)).folder
    assert [record["step"] for record in folder.records("warning")] == [2, 11, 12]
    assert [record["message"].partition(":")[0] for record in folder.records("warning")] == [
        "step 2",
        "step 11",
        "step 12",
    ]
    assert [record["step"] for record in folder.records("eval")] == [4, 8, 12]
    assert [record["step"] for record in folder.records("step")] == [1, *range(3, 11)]
    assert "12 (3 skipped) of 12 steps" in folder.report.read_text(encoding="utf-8")
    other = stored(tmp_path / "other")
    assert steps_shown(folder.path, other) == "12 (3 skipped)" and steps_shown(other, folder.path) == "4"
    assert compared([folder.path, other]).runs[0].summary()["evaluated"] == "at step 12"


def test_a_skipped_step_that_runs_again_is_logged_once(
    tiny: Make, tmp_path: Path, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a resumed run ends at its checkpoint, skipped steps included."""
    failing(2, 5)
    save = Trainer.save

    def full(self: Trainer, *args: Any, **more: Any) -> Path:
        if self.step == 6:
            raise OSError("disk full")
        return save(self, *args, **more)

    config = tiny(skip=3, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", full)
        with pytest.raises(OSError, match="disk full"):
            train(config)
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run" / "checkpoints")) == 3
    folder: RunFolder = train(dataclasses.replace(config, resume=True)).folder
    assert [record["step"] for record in folder.records("warning")] == [2, 5]
    assert steps_shown(folder.path, stored(tmp_path / "other")) == "12 (2 skipped)"


@pytest.mark.parametrize("log_too", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_why_a_run_stopped(
    log_too: bool, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the log can be: what is raised tells in any case."""
    write = saver._write

    def full(job: Any, *args: Any) -> None:
        if job.step > 3:
            raise OSError("disk full")
        write(job, *args)

    def full_log(self: Journal, reason: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saver, "_write", full)
    if log_too:
        monkeypatch.setattr(Journal, "stopped", full_log)
    with pytest.raises(SaveError, match=r"the checkpoint of step 6 could not be written .*disk full") as error:
        train(tiny(eval_every=0))
    run, other = tmp_path / "run", stored(tmp_path / "other")
    found = compared([run, other])
    assert steps_shown(run, other) == f"9 of 12: {'unfinished' if log_too else 'stopped'}"
    if not log_too:
        (warning,) = stored_records(run, "warning")
        assert warning["message"] == str(error.value) and warning["stopped"]
        assert any(remark.startswith("run has stopped: the checkpoint of step 6") for remark in found.remarks)
        assert "could not be written" in (run / "report.html").read_text(encoding="utf-8")

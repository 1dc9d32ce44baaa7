"""How samples are drawn in each stage: sizes, weights of a mixture, the cut between stages, resuming, ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from pretrain.started import SMALL, started

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.data import BatchSampler, StagedSampler, TokenSampler
from mmkernels.pretrain.run_folder import stored_records


def staged() -> StagedSampler:
    numbers = np.arange(50)
    parts: list[Any] = [(4, BatchSampler(numbers, 8, 3)), (4, BatchSampler(numbers, 9, 3))]  # the second: no steps
    return StagedSampler([*parts, (7, TokenSampler(numbers % 5 + 1, 12, 4, 3)), (None, BatchSampler(numbers, 16, 3))])


def test_one_after_another() -> None:
    sampler = staged()
    batches = [next(sampler) for _ in range(12)]
    assert [len(batch) for batch in batches[:4]] == [8] * 4 and [len(batch) for batch in batches[7:]] == [16] * 5
    assert all((batch % 5 + 1).sum() <= 12 and len(batch) <= 4 for batch in batches[4:7])
    assert sampler.step == 12
    straight = BatchSampler(np.arange(50), 8, 3)
    assert all(np.array_equal(next(straight), batch) for batch in batches[:4])
    again = BatchSampler(np.arange(50), 16, 3)
    first = next(again)
    assert not np.array_equal(first, batches[7]), "each part has an order of its own"


@pytest.mark.parametrize("at", range(12))
def test_goes_on_anywhere(at: int) -> None:
    straight, stopped = staged(), staged()
    expected = [next(straight) for _ in range(12)][at:]
    for _ in range(at):
        next(stopped)
    resumed = staged()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.step == at
    assert all(np.array_equal(next(resumed), batch) for batch in expected)


def test_a_state_of_other_stages() -> None:
    sampler = staged()
    state = [next(sampler) for _ in range(8)] and sampler.state_dict()
    fewer = StagedSampler(staged().parts[:2])
    with pytest.raises(ValueError, match="state: expected one of 2 parts as in this run, got part 3"):
        fewer.load_state_dict(state)


STAGES = {"stages.stage_0.until": 2, "stages.stage_0.batch": 6, "stages.stage_1.until": 4, "stages.stage_1.chunk": 2}


def drawn(rank: int, world: int, run: str, steps: int, parts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    config = Config.of("progressive", run=Path(run), **{"batch": 12, "chunk": 5, **more}, parts=SMALL | parts)
    with started(config) as trainer:
        found: dict[str, list[Any]] = {"names": [], "losses": [], "chunks": []}
        for _ in range(steps):
            trainer.begin()
            batch = next(trainer.loader)
            found["names"].append([name for name in batch.names if name])
            found["losses"].append(trainer.backward(batch).loss)
            found["chunks"].append(trainer._cache.chunk_sizes[0])
            trainer.update()
        return found


def test_stages_of_a_run(tmp_path: Path) -> None:
    (one,) = ranks.run(1, drawn, str(tmp_path / "1"), 6, STAGES, {})
    assert [len(names) for names in one["names"]] == [6, 6, 12, 12, 12, 12]
    assert one["chunks"] == [5, 5, 2, 2, 5, 5]
    two = ranks.run(2, drawn, str(tmp_path / "2"), 6, STAGES, {})
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=3e-6)
    for step, names in enumerate(one["names"]):
        assert sorted(two[0]["names"][step] + two[1]["names"][step]) == sorted(names)


def test_more_of_one_part_in_a_stage(tmp_path: Path) -> None:
    data = {"data": "emoji::languages", "data_weights": (1.0, 1.0), "batch": 20}
    parts = {"stages.stage_0.until": 3, "stages.stage_0.data_weights": (9.0, 1.0)}
    (one,) = ranks.run(1, drawn, str(tmp_path / "1"), 6, parts, data)
    # The names of pictures begin with their pack, those of texts with the code of a language.
    of_first = [sum(len(name.split("/")[0]) > 3 for name in names) for names in one["names"]]
    assert sum(of_first[:3]) == pytest.approx(54, abs=3) and sum(of_first[3:]) == pytest.approx(30, abs=3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"stages.stage_1.batch": 10**6}, r"stages\[1\]: batch: expected 1 to \d+ \(the distinct concepts"),
        ({"stages.stage_1.batch": 0}, r"stages\[1\]: batch: expected None or at least 1, got 0"),
        ({"stages.stage_1.chunk": 0}, r"stages\[1\]: chunk: expected None or at least 1, got 0"),
        ({"stages.stage_2.tokens": 100}, r"stages\[2\]: tokens: expected None in a run without --tokens, got 100"),
        ({"stages.stage_0.data_weights": (1.0, 2.0)}, r"stages\[0\]: data_weights: expected None, since the data are"),
    ],
)
def test_a_stage_that_cannot_be_drawn_stops_the_run_at_once(
    parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(0, 1, str(tmp_path / "run"), 1, parts, {})
    with pytest.raises(ValueError, match=message):
        train(Config.of("progressive", run=tmp_path / "run", steps=10, parts=SMALL | parts))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_in_a_later_stage(tmp_path: Path) -> None:
    """Its samples and losses are those of a run that never stopped."""
    options: dict[str, Any] = {"batch": 12, "chunk": 12, "eval_every": 0, "eval_limit": 8, "tensorboard": False}
    options |= {"steps": 6, "checkpoint_every": 3, "parts": SMALL | STAGES}
    run = tmp_path / "run"
    train(Config.of("progressive", run=run, **options))
    expected = [record["loss"] for record in stored_records(run, "step")]
    shutil.rmtree(run / "checkpoints/step-00000006")
    train(Config.of("progressive", run=run, resume=True, **options))
    assert [record["loss"] for record in stored_records(run, "step")] == expected

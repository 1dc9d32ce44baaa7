"""A skipped step leaves no trace: what follows is the run in which its batch taught nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.normed import write_normed

from mmkernels.pretrain import Config, checkpoint, train
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.objectives.base import BatchObjective
from mmkernels.pretrain.seen import Seen
from mmkernels.pretrain.setup import open_source
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer

SMALL = {"model.width": 16, "model.heads": 2, "model.embed_dim": 8}


def state_after(config: Config, *, seen: bool) -> dict[str, torch.Tensor]:
    """What checkpoints carry after four steps. The second is skipped, after a forward and backward of its batch or
    without; the third has nothing to say to objectives that compare."""
    trainer = Trainer(config, open_source(config), TextTokenizer.train([], 400), torch.device("cpu"))
    for objective in trainer.model.objectives.values():
        if isinstance(objective, BatchObjective):
            objective.over_batch = partial(silent_in_the_third, objective, objective.over_batch)
    for step in range(4):
        trainer.begin()
        batch = next(trainer.loader)
        if step != 1:
            trainer.backward(batch)
            trainer.update()
            continue
        if seen:
            trainer.backward(batch)
        trainer.skip()
    return {name: value.clone() for name, value in trainer.carried.state_dict().items()}


def silent_in_the_third(objective: Any, over_batch: Callable[[Seen], torch.Tensor], seen: Seen) -> torch.Tensor:
    if seen.step != 2:
        return over_batch(seen)
    return 0.0 * torch.stack([seen.embedding(name).sum() for name in objective.part.compares]).sum()


def assert_no_trace(config: Config) -> None:
    found, expected = (state_after(config, seen=seen) for seen in (True, False))
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, found[name])]


@pytest.mark.parametrize("recipe", ["albef", "moco", "cca"])
def test_queues_and_covariances(recipe: str, tmp_path: Path) -> None:
    changes = {"batch": 12, "chunk": 4, "steps": 50, "warmup": 0, "parts": SMALL}
    assert_no_trace(Config.of(recipe, run=tmp_path / "run", **changes))


def test_statistics_of_batch_norm(tmp_path: Path) -> None:
    assert_no_trace(Config.of(write_normed(tmp_path), run=tmp_path / "run"))


def test_what_is_saved_when_a_step_is_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, normed = Trainer.backward, write_normed(tmp_path)

    def failing(self: Trainer, batch: Any) -> Any:
        found = backward(self, batch)
        return found._replace(loss=float("nan")) if batch.step == 2 else found

    monkeypatch.setattr(Trainer, "backward", failing)
    config = Config.of(normed, run=tmp_path / "run", checkpoint_every=1, eval_every=0, tensorboard=False)
    with pytest.raises(NotFiniteError):
        train(config)
    stopped = checkpoint.load_weights(tmp_path / "run/checkpoints/step-00000002")
    train(Config.of(normed, run=tmp_path / "other", eval_every=0, tensorboard=False, steps=2, warmup=50))
    name = "model.streams.image.encoder.module.2.running_mean"
    assert torch.equal(stopped[name], checkpoint.load_weights(tmp_path / "other/checkpoints/step-00000002")[name])

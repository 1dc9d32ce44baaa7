"""Begin a run with the weights of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.pretrain.checkpoint import fill, weights_of
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data.opening import EMBEDDED, places
from mmkernels.pretrain.load import stored_weights
from mmkernels.pretrain.ranks import ALONE, Ranks
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.run_folder import other_classes, stored_classes, stored_config
from mmkernels.pretrain.schedule import stage_at
from mmkernels.pretrain.setup import read_by

__all__ = ["WarmStart", "cautions_of", "warm_start"]

_SHOWN = 5  # names in a message


class WarmStart(NamedTuple):
    """What became of the weights of another run, by name."""

    run: Path
    step: int  # of the other run
    loaded: list[str]
    fresh: list[str]  # of this model, which the other run lacks, or which were asked for: they stay as they were drawn
    unused: list[str]  # of the other run, the rest

    def __str__(self) -> str:
        parts = [f"init: {len(self.loaded)} tensors from {self.run} at step {self.step}"]
        for what, names in (("drawn anew", self.fresh), ("left out", self.unused)):
            parts += [f"{len(names)} {what} ({_some(names)})"] if names else []
        return "; ".join(parts)


@torch.no_grad()
def warm_start(model: nn.Module, run: Path, fresh: Sequence[str] = (), ranks: Ranks = ALONE) -> WarmStart:
    """Load those of another run's weights that the model has by name.

    Args:
        model: on any device; wrapped or sharded as in `Saver.save`.
        run: folder of the other run, or of exported weights.
        fresh: patterns of names that are not loaded.
        ranks: who begin together. Rank 0 reads, and hands out one tensor after the other.

    Raises:
        RunFolderError: no run there, or no checkpoint yet. Like the others on all ranks.
        ValueError: no name fits, or a tensor of the same name has another shape; a pattern of `fresh` fits none.
    """
    read: dict[str, Tensor] = {}

    def stored() -> tuple[int, dict[str, tuple[torch.Size, torch.dtype]]]:
        step, weights = stored_weights(run)
        read.update(weights)
        return step, {name: (weight.shape, weight.dtype) for name, weight in weights.items()}

    step, given = ranks.of_leader(stored)
    own = weights_of(model)
    for pattern in fresh:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise ValueError(f"fresh: expected patterns of parameter names, got {pattern!r}, which fits none")
    anew = {name for name in own if any(fnmatchcase(name, pattern) for pattern in fresh)}
    loaded = [name for name in own if name in given and name not in anew]
    if not loaded and len(anew) < len(own):
        raise ValueError(
            f"init: expected a run whose parameters are called as this model's, such as {_some(list(own))}, "
            f"got {run}, whose are called {_some(list(given))}"
        )
    other = [name for name in loaded if own[name].shape != given[name][0]]
    if other:
        shapes = "; ".join(f"{n}: {list(given[n][0])} for {list(own[n].shape)}" for n in other[:_SHOWN])
        raise ValueError(f"init: expected tensors of this model's shapes, got of {run} {shapes} ({len(other)} in all)")
    for name in loaded:
        weight = read.pop(name).contiguous() if ranks.leads else torch.empty(given[name][0], dtype=given[name][1])
        if weight.numel():
            ranks.of_rank_0(weight.reshape(-1).view(torch.uint8))  # bytes: not every dtype can be sent
        fill(own[name], weight)
    kept = set(loaded)
    return WarmStart(run, step, loaded, [n for n in own if n not in kept], [n for n in given if n not in kept])


def cautions_of(config: Config, begun: WarmStart, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """What a user must know of a run that begins with the weights of another.

    Args:
        config: of the new run.
        begun: what became of the weights.
        classes: of the label fields of its data.

    Raises:
        ValueError: a head of the other run goes on for other classes than it has learned.
    """
    base, recipe = stored_config(begun.run), config.wiring()
    known = stored_classes(begun.run)
    for name, part in recipe.objectives.items():
        label = getattr(part, "label", "") or ("tag" if getattr(part, "target", "") == "class" else "")
        goes_on = any(each.startswith(f"objectives.{name}.") for each in begun.loaded)
        if goes_on and label in known and label in classes and known[label] != tuple(classes[label]):
            raise ValueError(
                f"init: expected the classes of {label!r} that objectives.{name} has learned in {begun.run}, but it "
                f"{other_classes(known[label], classes[label])}. To draw its head anew: --fresh 'objectives.{name}.*'"
            )
    return [*_unlearned_layers(begun, base, recipe), *_learned_before(begun, config, base, recipe)]


def _unlearned_layers(begun: WarmStart, base: Config, recipe: Recipe) -> list[str]:
    """The other run may have ended before all layers of its fusion were in use."""
    if not any(name.startswith("fusion.") for name in begun.loaded):
        return []
    depth = stage_at(base.wiring(), max(begun.step - 1, 0)).fusion_depth
    later = [stage.fusion_depth for stage in recipe.stages]
    if depth is None or all(each is not None and each <= depth for each in later):
        return []
    return [
        f"init: {begun.run} ended at step {begun.step}, when its fusion had {depth} layers in use; the layers after "
        "them have learned nothing"
    ]


def _learned_before(begun: WarmStart, config: Config, base: Config, recipe: Recipe) -> list[str]:
    """Samples that are held out now, the other run may have learned."""
    before, now = (places(each.data or of.data) for each, of in ((base, base.wiring()), (config, recipe)))
    if not begun.loaded or not {place for place in before if place not in EMBEDDED} & set(now):
        return []
    changed = []
    if config.eval_fraction > base.eval_fraction:
        changed.append(f"eval_fraction is {config.eval_fraction}, there {base.eval_fraction}")
    by, by_then = (set(each.held_out_by or read_by(of)[0]) for each, of in ((config, recipe), (base, base.wiring())))
    if by != by_then:
        told = f"concepts are told by {', '.join(sorted(by))}, there by {', '.join(sorted(by_then))}"
        changed.append(f"{told}; as there: --held-out-by {' '.join(sorted(by_then))}")
    if config.validate and not base.validate:
        changed.append("validate holds out a tenth of what it learned from")
    if not changed:
        return []
    return [
        f"held_out: not the samples that {begun.run} held out, so that some of them it has learned "
        f"({'; '.join(changed)})"
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

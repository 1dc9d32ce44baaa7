"""Mistakes over a process group: every rank gets the error, and none hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ops.contrastive.shared import batch

from mmkernels import FalseNegatives, infonce, siglip


def _mistakes(rank: int, world: int) -> list[str]:
    """The error that each rank gets; none may hang."""
    x, y = batch(6, 8, torch.float32)
    scale = torch.tensor(10.0)
    group = dist.group.WORLD
    odd = rank == 1
    calls: list[Callable[[], Any]] = [
        lambda: infonce(x[:, : 8 - odd], y[:, : 8 - odd], scale, group=group),
        lambda: infonce(*((t.bfloat16() if odd else t) for t in (x, y)), scale, group=group),
        lambda: infonce(x, y, scale, group=group, symmetric=not odd),
        lambda: infonce(x, y, scale, group=group, label_smoothing=0.1 * rank),
        lambda: infonce(x, y, scale, group=group, exchange="ring" if odd else "all_gather"),
        lambda: infonce(x.clone().requires_grad_(odd), y, scale, group=group),
        lambda: infonce(x, y, scale, group=group, negatives=None if odd else y),
        lambda: infonce(x, y, scale, group=group, negatives=y.clone().requires_grad_(odd)),
        lambda: infonce(x, y, scale, group=group, teacher=(x, y, 0.1 + 0.1 * odd)),
        lambda: infonce(x, y, scale, group=group, teacher=None if odd else (x, y, 0.1)),
        lambda: infonce(x, y, scale, group=group, return_stats=odd),
        lambda: infonce(x, y, scale, group=group, decoupled=odd),
        lambda: infonce(x, y, scale, group=group, hardness=1.0 + odd),
        lambda: infonce(x, y, scale, group=group, false_negatives=FalseNegatives(x, y, 0.1 * odd)),
        lambda: siglip(x, y, scale, 0.0, group=group, return_stats=odd),
        lambda: infonce(x, y[:5] if odd else y, scale, group=group),
        lambda: infonce(x, y, scale, group=group, negatives=y[:, :7] if odd else y),
        lambda: siglip(x, y, scale, "bias" if odd else 0.0, group=group),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_differs_between_ranks_is_named_on_each() -> None:
    said = ranks.run(2, _mistakes)
    names = [
        *("queries: width", "queries: dtype", "symmetric", "label_smoothing", "exchange", "queries: gradient"),
        *("negatives", "negatives", "teacher[2]", "teacher: width", "return_stats"),
        *("decoupled", "hardness", "false_negatives", "return_stats"),
    ]
    for lines in said:
        for line, name in zip(lines, names, strict=False):
            assert line.startswith(f"ValueError: {name}: expected the same on every rank"), line
    refusals = ("ValueError: keys: expected", "ValueError: negatives: expected", "TypeError: logit_bias: expected")
    for i, own in enumerate(refusals, len(names)):
        assert said[1][i].startswith(own)
        assert (
            said[0][i] == "ValueError: group: expected every rank to call with valid arguments, rank 1 raised an error"
        )


def _not_a_member(rank: int, world: int) -> None:
    alone = dist.new_group([0])
    x, y = batch(4, 8)
    loss = infonce(x, y, 10.0)
    if rank == 0:
        torch.testing.assert_close(infonce(x, y, 10.0, group=alone), loss)
        return
    with pytest.raises(TypeError, match="group: expected None, or a process group of torch"):
        infonce(x, y, 10.0, group=alone)


def test_groups() -> None:
    x, y = batch(4, 8)
    with pytest.raises(ValueError, match="group: expected None, or a process group"):
        infonce(x, y, 10.0, group="everyone")
    ranks.run(2, _not_a_member)


def _wrong_exchange(rank: int, world: int) -> None:
    x, y = batch(4, 8)
    with pytest.raises(ValueError, match="exchange: expected 'auto', 'all_gather' or 'ring', got 'gossip'"):
        siglip(x, y, 10.0, 0.0, group=dist.group.WORLD, exchange="gossip")
    with pytest.raises(TypeError, match="group: expected None, or a process group"):
        siglip(x, y, 10.0, 0.0, group=3)


def test_exchange_and_group_of_the_wrong_kind() -> None:
    ranks.run(2, _wrong_exchange)


def _ids_and_options(rank: int, world: int) -> None:
    x, y = batch(4, 8)
    group = dist.group.WORLD
    ids = torch.arange(4) + 10 * rank
    elsewhere = torch.arange(4) + 10 * (1 - rank)  # the matching ids are on the other rank
    infonce(x, y, 10.0, query_ids=ids, key_ids=elsewhere, group=group)
    alike = torch.full((4,), rank)
    unmet = torch.where(torch.arange(4) + rank == 0, 99, alike)  # on rank 0 only
    for name, other in (("query_ids", "key_ids"), ("key_ids", "query_ids")):
        with pytest.raises(
            ValueError, match=f"{name}: expected each to occur among the {other} of some rank, but 1 do not"
        ):
            infonce(x, y, 10.0, group=group, **{name: unmet, other: alike})
    with pytest.raises(ValueError, match="weights: expected a nonzero weight on some rank"):
        infonce(x, y, 10.0, group=group, weights=torch.zeros(4))
    with pytest.raises(ValueError, match="weights: expected finite non-negative numbers, got"):
        infonce(x, y, 10.0, group=group, weights=torch.full((4,), -1.0))
    with pytest.raises(ValueError, match="exchange: expected 'auto' without a group"):
        infonce(x, y, 10.0, exchange="ring")


def test_ids_of_other_ranks_and_values() -> None:
    ranks.run(2, _ids_and_options)


def _no_backend(rank: int, world: int) -> list[str]:
    """As if the group had NCCL alone, and one rank, or both, had tensors on the host. Its numbers still travel."""
    from mmkernels.ops.contrastive import exchange

    x, y = batch(4, 8, torch.float32)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "device_of_numbers", lambda group: torch.device("cpu"))
        for wrong in ((0, 1), (1,)):
            kinds = {"cuda": "nccl"} if rank in wrong else {"cpu": "gloo"}
            patch.setattr(exchange, "backends_of", lambda group, kinds=kinds: kinds)
            for call in (
                lambda: infonce(x, y, 10.0, group=dist.group.WORLD),
                lambda: infonce("x", y, 10.0, group=dist.group.WORLD),
            ):
                try:
                    call()  # type: ignore[no-untyped-call]
                    said.append("nothing")
                except (TypeError, ValueError) as error:
                    said.append(str(error))
    return said


def test_a_group_without_a_backend_for_the_tensors_is_named() -> None:
    named = "queries: expected a device for which the group has a backend (cuda:nccl), got "
    first, second = ranks.run(2, _no_backend)
    assert first[0].startswith(named) and second[0].startswith(named)
    assert first[2] == "group: expected every rank to call with valid arguments, rank 1 raised an error"
    assert second[2].startswith(named)
    assert all(line.startswith("queries: expected") for line in (first[1], second[1], first[3], second[3]))

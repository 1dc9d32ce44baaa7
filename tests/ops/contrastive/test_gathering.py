"""Keys that are exchanged before the loss: the same loss and gradients, bytes, and errors on all ranks."""

from __future__ import annotations

from typing import Any

import pairwise
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels import GatheredKeys, gather_keys, infonce, received_bytes, siglip


def rows_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    n = (5, 0, 3, 4)[rank]
    x, y = (torch.randn(n, 8, generator=generator).requires_grad_() for _ in range(2))
    return x, y, torch.arange(n) + 2 * rank  # ids that ranks share


def called(which: str, x: Tensor, y: Tensor, ids: Tensor, group: Any, gathered: GatheredKeys | None) -> list[Tensor]:
    scale = torch.tensor(3.0, requires_grad=True)
    more: dict[str, Any] = {"group": group, "gathered": gathered}
    if which == "siglip":
        loss, stats = siglip(x, y, scale, -2.0, query_ids=ids, return_stats=True, **more)
    else:
        if which == "all options":
            more |= {"teacher": (x.detach() + 1, y.detach() - 1, 0.3), "negatives": y.detach() * 2, "query_ids": ids}
        loss, stats = infonce(x, y, scale, return_stats=True, symmetric=which != "one way", **more)
    loss.backward()
    found = [loss.detach(), *stats, x.grad, y.grad, scale.grad]
    x.grad = y.grad = None
    return found


def same_as_at_once(rank: int, world: int, which: str, known: bool) -> None:
    group = dist.group.WORLD
    x, y, ids = rows_of(rank)
    before = received_bytes()
    expected = called(which, x, y, ids, group, None)
    at_once, before = received_bytes() - before, received_bytes()
    counts = [len(rows_of(each)[0]) for each in range(world)] if known else None
    gathered = gather_keys(y, group, counts=counts)
    assert not gathered.keys.requires_grad
    found = called(which, x, y, ids, group, gathered)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert received_bytes() - before == at_once + (0 if known else 4 * 8 * (world - 1))
    assert torch.equal(gathered.wait(), torch.cat([rows_of(each)[1] for each in range(world)]))


@pairwise.cases(world=(1, 2, 4), which=("plain", "one way", "all options", "siglip"), known=(False, True))
def test_sent_before_or_with_the_loss(world: int, which: str, known: bool) -> None:
    ranks.run(world, same_as_at_once, which, known)


def mistakes(rank: int, world: int) -> list[str]:
    group, said = dist.group.WORLD, []
    x, y, _ = rows_of(rank)
    right = gather_keys(y, group)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (gather_keys(y.detach() + 1, group), {}),  # of other keys
        (gather_keys(y.detach().double(), group), {}),
        (right, {"exchange": "ring"}),
        ("keys", {}),
        (right if rank == 0 else None, {}),
    ]
    for gathered, more in wrong:
        with pytest.raises((TypeError, ValueError)) as error:
            infonce(x, y, 3.0, group=group, gathered=gathered, **more)
        said.append(str(error.value))
    # All ranks are still together.
    assert torch.isfinite(infonce(x, y, 3.0, group=group, gathered=gather_keys(y, group)))
    return said


def test_mistakes() -> None:
    """Those of one rank are told on all."""
    first, second = ranks.run(2, mistakes)
    told = "group: expected every rank to call with valid arguments, rank 0 raised an error"
    assert first[0].startswith("gathered: expected what gather_keys returned for these keys, got others")
    assert "normalize=False" in first[0] and second[0] == told
    assert "[5, 8] torch.float32 on cpu, got [5, 8] torch.float64 on cpu" in first[1]
    assert first[2] == "exchange: expected 'auto' or 'all_gather' with gathered keys, got 'ring' (str)"
    assert first[3].startswith("gathered: expected None, or what gather_keys returned")
    assert "gathered: expected the same on every rank" in first[4] and "gathered" in second[4]


def arguments(rank: int, world: int) -> None:
    _, y, _ = rows_of(rank)
    with pytest.raises(ValueError, match=r"counts: expected 2 numbers of rows, one for each rank, got \[1\]"):
        gather_keys(y, dist.group.WORLD, counts=[1])
    with pytest.raises(ValueError, match=rf"counts\[{rank}\]: expected the {len(y)} keys of this rank, got 9"):
        gather_keys(y, dist.group.WORLD, counts=[9, 9])
    with pytest.raises(TypeError, match="counts: expected None, or 2 ints"):
        gather_keys(y, dist.group.WORLD, counts=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group: expected a process group"):
        gather_keys(y, None)
    with pytest.raises(ValueError, match=r"keys: expected \[M, E\]"):
        gather_keys(y[0] if len(y) else y[:, 0], dist.group.WORLD)


def test_arguments() -> None:
    ranks.run(2, arguments)


def differ(rank: int, world: int) -> list[str]:
    group, said = dist.group.WORLD, []
    y = torch.randn(3, 8)
    for mine in (y.double() if rank else y, y[:, :4] if rank else y, y[0] if rank else y, y.long() if rank else y):
        with pytest.raises((TypeError, ValueError)) as error:
            gather_keys(mine, group)
        said.append(str(error.value))
    assert len(gather_keys(y, group).wait()) == 6  # all are still together
    return said


def test_keys_that_differ_between_ranks() -> None:
    first, second = ranks.run(2, differ)
    assert "keys: expected the same width and dtype on every rank of the group, but rank 1 differs" in first[0]
    assert "rank 1 differs" in second[0] and "[3, 4] torch.float32" in second[1]
    assert first[2] == "group: expected every rank to call with valid arguments, rank 1 raised an error" == first[3]
    assert second[2].startswith("keys: expected [M, E]") and second[3].startswith("keys: expected")


def changed_since(rank: int, world: int) -> None:
    x, y, _ = rows_of(rank + 2)
    keys = y.detach().clone()
    gathered = gather_keys(keys, dist.group.WORLD)
    keys.mul_(2)
    with pytest.raises(ValueError, match=r"these keys, got others|rank \d raised an error"):
        infonce(x, keys, 3.0, group=dist.group.WORLD, gathered=gathered)
    keys.div_(2)
    infonce(x, keys, 3.0, group=dist.group.WORLD, gathered=gathered)


@pytest.mark.parametrize("world", [1, 2])
def test_keys_that_changed_since(world: int) -> None:
    """In place: they are compared with what was sent."""
    ranks.run(world, changed_since)


def test_without_a_group() -> None:
    x, y, _ = rows_of(0)
    with pytest.raises(TypeError, match="gathered: expected None, or what gather_keys returned"):
        infonce(x, y, 1.0, gathered=y)  # type: ignore[arg-type]

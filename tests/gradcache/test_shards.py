"""chunk_size="auto" under fully_shard: shards are gathered once a step, each rank has its own sizes, all restart
together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pairwise
import pytest
import ranks
import torch
import torch.distributed as dist
from gradcache.test_auto import live_bytes
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce

BUDGETS = [2400, 4000, 2500, 3000]  # per rank: the ranks differ in chunks


class Tower(nn.Module):
    """Once armed, runs out of memory in the middle of one of its passes, above a number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(6, 6), Encoder(dropout=0.3)
        self.where, self.limit, self.hits = "", 0, 0

    def _run_out(self) -> None:
        self.hits += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, x: Tensor) -> Tensor:
        over = self.where if len(x) > self.limit else ""
        hidden = self.first(x).tanh()
        if over == ("again" if torch.is_grad_enabled() else "first"):
            self._run_out()
        if over == "backward" and hidden.requires_grad:  # by then the gradients of later layers are accumulated
            hidden.register_hook(lambda _: self._run_out())
        return self.encoder(hidden)


def _sharded(towers: list[Tower], mesh: DeviceMesh | None = None, **policy: torch.dtype) -> None:
    for tower in towers:
        for module in (tower.encoder.layers[0], tower.encoder, tower):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))


def _inputs(world: int) -> list[list[Tensor]]:
    """Different inputs for each rank, with different numbers of rows."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(23 - 5 * r, 6, generator=generator) for _ in range(2)] for r in range(world)]


def _everyones(value: Any, world: int) -> list[Any]:
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def _expected(towers: list[Tower], inputs: list[list[Tensor]], sizes: list[list[int]]) -> list[Tensor]:
    """The mean over ranks of each rank's gradient, chunks in one graph."""
    distinct = dict.fromkeys(towers)
    clear(*distinct)
    for r, sizes_there in enumerate(sizes):
        torch.manual_seed(5 + r)
        plain_infonce(*chunk_graph(towers, inputs[r], sizes_there)).backward()
    return [grad / len(sizes) for grad in gradients(*distinct)]


def _whole(towers: list[Tower]) -> list[Tensor]:
    return [grad.full_tensor() for grad in gradients(*dict.fromkeys(towers))]


@contextmanager
def _calls(*names: str) -> Iterator[dict[str, int]]:
    """How often each of these collectives is called."""
    counts = dict.fromkeys(names, 0)
    plain = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return plain[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def _collectives() -> tuple[str, str]:
    """The all-gather and the reduce-scatter of this torch release."""
    pairs = [("all_gather_single", "reduce_scatter_single"), ("all_gather_into_tensor", "reduce_scatter_tensor")]
    return next(pair for pair in pairs if all(hasattr(dist, name) for name in pair))


def _bytes_of(tower: Tower, rows: int) -> int:
    with live_bytes(tower) as peak:
        tower(torch.randn(rows, 6))
    return peak[0] - rows * 6 * 4  # minus the input, which exists anyway


def _measured(rank: int, world: int, tied: bool, policy: dict[str, torch.dtype]) -> list[int]:
    first = Tower()
    towers = [first, first if tied else Tower()]
    plain, untouched, inputs = copy.deepcopy(towers), copy.deepcopy(towers), _inputs(world)
    for each in (towers, untouched):
        _sharded(list(dict.fromkeys(each)), **policy)
    step = GradCache(towers, plain_infonce, chunk_size="auto", memory_budget=BUDGETS[rank])
    gather, scatter = _collectives()
    # Two groups of a tied tower see the gradient of their input: they finish after each of the two last chunks.
    groups = 3 + 2 if tied else 6
    for i in range(3):  # the first step measures
        clear(*towers)
        torch.manual_seed(5 + rank)
        with _calls(gather, scatter) as counts:
            step(*inputs[rank])
        assert counts == {gather: groups, scatter: groups}, f"step {i}: {counts}, each group of parameters once"
        assert all(isinstance(p, DTensor) for tower in towers for p in tower.parameters()), "sharded again"
    size = step.chunk_sizes[0]
    budget = BUDGETS[rank] / (2 if tied else 1)  # the last chunks of a shared tower run together
    assert 1 < size < len(inputs[rank][0])
    assert _bytes_of(plain[0], size) <= budget < _bytes_of(plain[0], size + 1)
    assert_same(_whole(towers), _expected(plain, inputs, _everyones(step.chunk_sizes, world)))
    clear(*towers)  # and a step without GradCache, on the modules' own schedule
    schedules = []
    for each in (untouched, towers):
        torch.manual_seed(5 + rank)
        with _calls(gather, scatter) as counts:
            plain_infonce(*(tower(x[:9]) for tower, x in zip(each, inputs[rank], strict=True))).backward()
        schedules.append(counts)
    assert schedules[0] == schedules[1]
    nine = [[x[:9] for x in of_rank] for of_rank in inputs]
    assert_same(_whole(towers), _expected(plain, nine, [[9, 9]] * world))
    return step.chunk_sizes


REDUCED_WIDER = dict(param_dtype=torch.float32, reduce_dtype=torch.float64)  # whole gradients wait in reduce_dtype
POLICIES: dict[str, dict[str, torch.dtype]] = {"plain": {}, "reduced wider": REDUCED_WIDER}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_gathered_once_and_sizes_are_each_ranks_own(tied: bool, policy: dict[str, torch.dtype]) -> None:
    first, second = ranks.run(2, _measured, tied, policy)
    assert first[0] < second[0]


class Pair(nn.Module):
    """Two towers and the scale of their loss under one root."""

    def __init__(self) -> None:
        super().__init__()
        self.towers, self.log_scale = nn.ModuleList([Tower(), Tower()]), nn.Parameter(torch.full((1,), 2.0))

    def forward(self, which: int, x: Tensor) -> Tensor:
        return self.towers[which](x)


def _one_root(rank: int, world: int) -> None:
    pair, inputs = Pair(), _inputs(world)
    plain = copy.deepcopy(pair)
    _sharded(list(pair.towers))  # type: ignore[arg-type]
    fully_shard(pair)
    encoders = [functools.partial(pair, which) for which in (0, 1)]
    step = GradCache(
        encoders,
        lambda a, b: plain_infonce(a, b, pair.log_scale.exp()),
        chunk_size="auto",
        memory_budget=2 * BUDGETS[rank],
    )
    for limit in (100, 3):  # the second step restarts
        pair.towers[0].where, pair.towers[0].limit = "backward" if rank == 1 else "", limit
        pair.zero_grad()
        torch.manual_seed(5 + rank)
        step(*inputs[rank])
    assert (pair.towers[0].hits > 0) == (rank == 1)
    for r, sizes in enumerate(_everyones(step.chunk_sizes, world)):
        torch.manual_seed(5 + r)
        plain_infonce(*chunk_graph(list(plain.towers), inputs[r], sizes), plain.log_scale.exp()).backward()
    actual = {name: p.grad.full_tensor() for name, p in pair.named_parameters()}
    assert_same(list(actual.values()), [p.grad / world for p in plain.parameters()])


def test_one_root_with_the_scale_of_the_loss() -> None:
    ranks.run(2, _one_root)


def _one_rank_runs_out(
    rank: int, world: int, which: int, where: str, accumulating: bool, policy: dict[str, torch.dtype]
) -> None:
    """The other rank has no reason to halve its chunks; when the second tower runs, the first is already reduced."""
    towers = [Tower(), Tower()]
    plain, inputs = copy.deepcopy(towers), _inputs(world)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")) if world == 4 else None
    _sharded(towers, mesh, **policy)
    step = GradCache(towers, plain_infonce, chunk_size="auto", memory_budget=BUDGETS[rank])
    torch.manual_seed(5 + rank)
    step(*inputs[rank])
    before, sizes = list(step.chunk_sizes), _everyones(step.chunk_sizes, world)
    if not accumulating:
        clear(*towers)
    earlier = _expected(plain, inputs, sizes) if accumulating else []
    if rank == 1:
        towers[which].where, towers[which].limit = where, before[which] // 2
    torch.manual_seed(5 + rank)
    loss, following = step(*inputs[rank]), torch.rand(2)
    assert towers[which].hits == (1 if rank == 1 else 0)
    halved = [size // 2 if rank == 1 and i == which else size for i, size in enumerate(before)]
    assert step.chunk_sizes == halved
    actual = _whole(towers)
    expected = _expected(plain, inputs, _everyones(step.chunk_sizes, world))
    if accumulating:
        expected = [a + b for a, b in zip(earlier, expected, strict=True)]
    assert_same(actual, expected)
    torch.manual_seed(5 + rank)
    torch.testing.assert_close(loss, plain_infonce(*chunk_graph(plain, inputs[rank], halved)).detach())
    assert torch.equal(following, torch.rand(2)), "the generators stand where one forward leaves them"


@pairwise.cases(which=(0, 1), where=("first", "again", "backward"), accumulating=(False, True), policy=POLICIES)
def test_ranks_begin_anew_together(which: int, where: str, accumulating: bool, policy: str) -> None:
    ranks.run(2, _one_rank_runs_out, which, where, accumulating, POLICIES[policy])


def test_ranks_of_a_replicated_shard_begin_anew_together() -> None:
    ranks.run(4, _one_rank_runs_out, 1, "backward", True, REDUCED_WIDER)


def _after_an_evaluation(rank: int, world: int) -> None:
    """An evaluation leaves a root gathered."""
    towers = [Tower(), Tower()]
    plain, inputs = copy.deepcopy(towers), _inputs(world)
    for tower in towers:
        fully_shard(tower)
    step = GradCache(towers, plain_infonce, chunk_size="auto", memory_budget=BUDGETS[rank])
    for _ in range(2):
        clear(*towers)
        with torch.no_grad():
            plain_infonce(*(tower(x) for tower, x in zip(towers, inputs[rank], strict=True)))
        torch.manual_seed(5 + rank)
        step(*inputs[rank])
        assert_same(_whole(towers), _expected(plain, inputs, _everyones(step.chunk_sizes, world)))
        if rank == 1:
            towers[1].where, towers[1].limit = "again", 3
    assert (towers[1].hits > 0) == (rank == 1)


def test_after_an_evaluation() -> None:
    ranks.run(2, _after_an_evaluation)


def _never_fits(rank: int, world: int, measured: bool) -> None:
    towers = [Tower(), Tower()]
    plain, inputs = copy.deepcopy(towers), _inputs(world)
    _sharded(towers)
    step = GradCache(towers, plain_infonce, chunk_size="auto", memory_budget=BUDGETS[rank])
    if measured:
        step(*inputs[rank])
        clear(*towers)
    if rank == 1:
        towers[1].where = "again"
    expected = torch.cuda.OutOfMemoryError if rank == 1 else RuntimeError
    with pytest.raises(expected, match="out of memory" if rank == 1 else "chunk_size: memory ran out on another rank"):
        step(*inputs[rank])
    assert all(isinstance(p, DTensor) and p.grad is None for tower in towers for p in tower.parameters())
    towers[1].where = ""
    torch.manual_seed(5 + rank)
    step(*inputs[rank])  # nothing is left of the failed step
    assert_same(_whole(towers), _expected(plain, inputs, _everyones(step.chunk_sizes, world)))


@pytest.mark.parametrize("measured", [False, True])
def test_what_never_fits_fails_on_every_rank(measured: bool) -> None:
    ranks.run(2, _never_fits, measured)


def _tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("shards", "columns"))
    tower = Tower()
    parallelize_module(tower.first, mesh["columns"], ColwiseParallel())
    fully_shard(tower, mesh=mesh["shards"])
    x = torch.randn(9, 6)
    with pytest.raises(NotImplementedError, match=r"chunk_size: .*fully_shard over tensor parallelism"):
        GradCache([tower], lambda a: a.square().sum(), chunk_size="auto")(x)
    assert isinstance(tower.encoder.layers[0].weight, DTensor), "sharded again"


def test_tensor_parallelism_is_refused() -> None:
    ranks.run(2, _tensor_parallel)

"""GradCache.as_loss over several ranks: wrapped encoders, a wrapper around the whole model, fully_shard."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pairwise
import pytest
import ranks
import torch
import torch.distributed as dist
from gradcache.test_ranks import Dual, Greedy, Parts, _alive
from gradcache.test_shards import BUDGETS, Pair, Tower, _everyones, _expected, _sharded, _whole
from gradcache.test_shards import _inputs as inputs_to_shard
from gradcache.toys import assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmkernels import GradCache, infonce
from mmkernels.testing.contrastive import plain_infonce

MICRO = 3


def _batches(world: int, rows: int = 7) -> list[list[list[Tensor]]]:
    """Inputs of each micro-batch of each rank."""
    generator = torch.Generator().manual_seed(3)
    return [[[torch.randn(rows, 6, generator=generator) for _ in range(2)] for _ in range(MICRO)] for _ in range(world)]


def _mean_gradient(model: Dual, world: int, sizes: Callable[[int], list[int]]) -> list[Tensor]:
    """The mean over ranks and micro-batches, chunks in one graph."""
    clear(model)
    for r, batches in enumerate(_batches(world)):
        torch.manual_seed(5 + r)
        for inputs in batches:
            loss = model.loss(*chunk_graph([model.image, model.text], inputs, sizes(r)))
            (loss / (MICRO * world)).backward()
    expected = gradients(model)
    clear(model)
    return expected


def _counted(wrapper: DistributedDataParallel) -> list[int]:
    reductions = [0]

    def count(state, bucket):  # unannotated: DDP reads annotations, not strings
        reductions[0] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    _alive.append(wrapper)
    wrapper.register_comm_hook(None, count)
    return reductions


def _wrapped_encoders(rank: int, world: int, first: int, second: int, how: str, grouped: bool) -> None:
    def sizes(r: int) -> list[int]:
        return [first, second + r]  # ranks differ in chunks

    model = Dual()
    expected = _mean_gradient(model, world, sizes)
    wrapper = DistributedDataParallel(model)
    reductions = _counted(wrapper)
    encoders = [functools.partial(wrapper, which) for which in ("image", "text")]
    cache = GradCache(encoders, model.loss, chunk_size=sizes(rank), group=dist.group.WORLD if grouped else None)
    loss_of = cache.as_loss()
    for _ in range(2):  # a second step fails if the first left a reducer waiting
        clear(model)
        reductions[0] = 0
        torch.manual_seed(5 + rank)
        losses = []
        for i, inputs in enumerate(_batches(world)[rank]):
            with wrapper.no_sync() if i < MICRO - 1 and how != "all reduce" else nullcontext():
                if how == "call":
                    cache(*inputs, scale_loss=lambda loss: loss / MICRO)
                    continue
                losses.append(loss_of(*inputs) / MICRO)
                if how == "each":
                    losses[-1].backward()
        if how in ("later", "all reduce"):  # all forwards first; whether each reduces was decided there
            for loss in losses:
                loss.backward()
        assert reductions[0] == (MICRO if how == "all reduce" else 1), "only the last micro-batch, and once"
        assert_same(gradients(model), expected)


@pairwise.cases(
    world=(1, 2, 4), sizes=((3, 2), (1, 4), (7, 6)), how=("call", "each", "later", "all reduce"), grouped=(False, True)
)
def test_wrapped_encoders_and_accumulated_batches(world: int, sizes: tuple[int, int], how: str, grouped: bool) -> None:
    ranks.run(world, _wrapped_encoders, *sizes, how, grouped)


@pytest.mark.parametrize("how", ["each", "later", "all reduce"])
def test_wrapped_encoders_with_one_chunk_on_every_rank(how: str) -> None:
    """A reducer would not reduce in the first backward after two forwards: its state is that of the last one."""
    ranks.run(2, _wrapped_encoders, 7, 7, how, True)


class Whole(nn.Module):
    """A model whose forward returns the loss, as trainers have it."""

    def __init__(self, model: Dual, sizes: Any) -> None:
        super().__init__()
        self.model, self.unused = model, nn.Linear(2, 2)
        budget = {"memory_budget": 1200} if sizes == "auto" else {}
        self.cache = GradCache([model.image, model.text], model.loss, chunk_size=sizes, **budget)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.cache.as_loss()(*inputs)


def _whole_model(rank: int, world: int, sizes: Any, unused: bool) -> None:
    model = Dual()
    whole = Whole(model, sizes if sizes == "auto" else [sizes, sizes + rank])
    if not unused:
        del whole.unused
    wrapper = DistributedDataParallel(whole, find_unused_parameters=unused)
    reductions = _counted(wrapper)
    for _ in range(2):
        clear(model)
        reductions[0] = 0
        torch.manual_seed(5 + rank)
        for i, inputs in enumerate(_batches(world)[rank]):
            with wrapper.no_sync() if i < MICRO - 1 else nullcontext():
                (wrapper(inputs) / MICRO).backward()
        assert reductions[0] == 1
        actual = gradients(model)
        chosen = _everyones(whole.cache.chunk_sizes, world)
        if sizes == "auto":
            assert 1 < chosen[0][0] < 7
        assert_same(actual, _mean_gradient(model, world, lambda r: chosen[r]))  # noqa: B023


@pairwise.cases(world=(1, 2), sizes=(2, 7, "auto"), unused=(False, True))
def test_a_wrapper_around_the_whole_model(world: int, sizes: Any, unused: bool) -> None:
    ranks.run(world, _whole_model, sizes, unused)


class OverRanks(nn.Module):
    """Its loss has the keys of all ranks."""

    def __init__(self, model: Dual, size: Any) -> None:
        super().__init__()
        self.model = model
        self.cache = GradCache([model.image, model.text], self.loss, chunk_size=size)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return infonce(a, b, self.model.log_scale.exp(), group=dist.group.WORLD)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.cache.as_loss()(*inputs)


def _loss_over_ranks(rank: int, world: int, size: int) -> None:
    model, inputs = Dual().eval(), [batches[0] for batches in _batches(world)]
    x, y = (torch.cat([of_rank[i] for of_rank in inputs]) for i in (0, 1))
    (model.loss(model.image(x), model.text(y)) / 2).backward()
    expected = gradients(model)
    clear(model)
    wrapper = DistributedDataParallel(OverRanks(model, [size, size + rank]))
    _alive.append(wrapper)
    for _ in range(2):
        clear(model)
        (wrapper(inputs[rank]) / 2).backward()
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("size", [2, 7])
def test_a_loss_over_ranks_in_a_wrapper_around_the_whole_model(size: int) -> None:
    ranks.run(2, _loss_over_ranks, size)


def _evaluation(rank: int, world: int) -> None:
    """Without gradients a static graph is no obstacle, and one rank may be alone."""
    model = Dual()
    wrapper = DistributedDataParallel(model, static_graph=True)
    _alive.append(wrapper)
    encoders = [functools.partial(wrapper, which) for which in ("image", "text")]
    cache = GradCache(encoders, model.loss, chunk_size=3, group=dist.group.WORLD)
    inputs = _batches(world)[rank][0]
    if rank == 0:
        with torch.no_grad():
            loss = cache.as_loss()(*inputs)
        assert not loss.requires_grad
    with pytest.raises(ValueError, match="without static_graph=True"):
        cache.as_loss()(*inputs)


def test_evaluation() -> None:
    ranks.run(2, _evaluation)


def _other_parameters(rank: int, world: int, grouped: bool) -> None:
    """Rank 1 uses no texts and another head."""
    model, inputs = Parts(), _batches(world)
    uses = [{"image": True, "text": True, "head": 0}, {"image": True, "text": False, "head": 1}]
    for each, batches in zip(uses, inputs, strict=True):
        (model.loss(each, model.image(batches[0][0]), model.text(batches[0][1])) / world).backward()
    expected = [p.grad for p in model.parameters()]
    clear(model)
    wrapper = DistributedDataParallel(model)
    _alive.append(wrapper)
    encoders = [functools.partial(wrapper, model.image), functools.partial(wrapper, model.text)]
    loss_fn = functools.partial(model.loss, uses[rank])
    cache = GradCache(encoders, loss_fn, chunk_size=3, group=dist.group.WORLD if grouped else None)
    for _ in range(2):
        clear(model)
        cache.as_loss()(*inputs[rank][0]).backward()
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            if wanted is None:
                assert parameter.grad is None or (not grouped and not parameter.grad.any())
            else:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_may_use_other_parameters(grouped: bool) -> None:
    ranks.run(2, _other_parameters, grouped)


def _shards(rank: int, world: int, size: Any, runs_out: bool, twice: bool) -> None:
    towers, inputs = [Tower(), Tower()], inputs_to_shard(world)
    if size != "auto":
        inputs = [[x[:13] for x in of_rank] for of_rank in inputs]
    plain = [Tower(), Tower()]
    for a, b in zip(plain, towers, strict=True):
        a.load_state_dict(b.state_dict())
    _sharded(towers)
    budget = {"memory_budget": BUDGETS[rank]} if size == "auto" else {}
    cache = GradCache(towers, plain_infonce, chunk_size=size, **budget)
    for i in range(2):
        clear(*towers)
        if runs_out and i and rank == 1:
            towers[0].where, towers[0].limit = "again", cache.chunk_sizes[0] // 2
        losses = []
        for _ in range(2 if twice else 1):
            torch.manual_seed(5 + rank)
            losses.append(cache.as_loss()(*inputs[rank]) / (2 if twice else 1))
        torch.manual_seed(9)
        for loss in losses:
            loss.backward()
        assert_same(_whole(towers), _expected(plain, inputs, _everyones(cache.chunk_sizes, world)))
    assert (towers[0].hits > 0) == (runs_out and rank == 1)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("size", "runs_out"), [(5, False), (13, False), ("auto", False), ("auto", True)])
def test_fully_shard(size: Any, runs_out: bool, twice: bool) -> None:
    """With two losses before their backwards, too; memory may run out in the first."""
    ranks.run(2, _shards, size, runs_out, twice)


def _one_rank_runs_out(rank: int, world: int) -> None:
    model, state = Dual(), {"limit": 2 if rank == 1 else 100, "armed": 0, "hits": 0}
    wrapper = DistributedDataParallel(model)
    _alive.append(wrapper)
    inputs = [batches[0] for batches in _batches(world, 9)]
    encoders = [lambda x: Greedy.apply(wrapper("image", x), state), lambda x: wrapper("text", x)]
    cache = GradCache(encoders, model.loss, chunk_size=["auto", 3], memory_budget=2000)
    cache.as_loss()(*inputs[rank]).backward()  # sizes from the budget
    before = cache.chunk_sizes[0]
    assert 2 < before < 9
    for accumulating in (False, True):
        if not accumulating:
            clear(model)
        state["armed"] = 1
        torch.manual_seed(5 + rank)
        (cache.as_loss()(*inputs[rank]) / 2).backward()
    assert state["hits"] == (1 if rank == 1 else 0)
    assert cache.chunk_sizes == [before if rank == 0 else before // 2, 3]
    actual, chosen = gradients(model), _everyones(cache.chunk_sizes, world)
    clear(model)
    for r in range(world):
        torch.manual_seed(5 + r)
        model.loss(*chunk_graph([model.image, model.text], inputs[r], chosen[r])).backward()
    assert_same(actual, [grad / world for grad in gradients(model)])


def test_one_rank_runs_out_of_memory_in_the_backward() -> None:
    ranks.run(2, _one_rank_runs_out)


def _one_root(rank: int, world: int, size: Any) -> None:
    pair, inputs = Pair(), [[x[:9] for x in of_rank] for of_rank in inputs_to_shard(world)]
    plain = Pair()
    plain.load_state_dict(pair.state_dict())
    _sharded(list(pair.towers))  # type: ignore[arg-type]
    fully_shard(pair)
    encoders = [functools.partial(pair, which) for which in (0, 1)]
    loss_fn = lambda a, b: plain_infonce(a, b, pair.log_scale.exp())  # noqa: E731
    cache = GradCache(encoders, loss_fn, chunk_size=size)
    if size == "auto":
        with pytest.raises(NotImplementedError, match=r"chunk_size: .*parameters under fully_shard"):
            cache.as_loss()(*inputs[rank])
        return
    torch.manual_seed(5 + rank)
    cache.as_loss()(*inputs[rank]).backward()
    for r in range(world):
        torch.manual_seed(5 + r)
        plain_infonce(*chunk_graph(list(plain.towers), inputs[r], [size, size]), plain.log_scale.exp()).backward()
    actual = {name: p.grad.full_tensor() for name, p in pair.named_parameters()}
    assert_same(list(actual.values()), [p.grad / world for p in plain.parameters()])


@pytest.mark.parametrize("size", [4, "auto"])
def test_one_root_with_the_scale_of_the_loss(size: Any) -> None:
    ranks.run(2, _one_root, size)


def _root_around_the_model(rank: int, world: int, size: int, parts: int) -> None:
    """Sharded: the root alone, with the towers, or with a layer of them, too."""
    model = Dual()
    model.log_scale = nn.Parameter(torch.full((1,), 2.0))
    plain, whole = copy.deepcopy(model), Whole(model, size)
    del whole.unused
    for tower in (model.image, model.text) if parts else ():
        if parts > 1:
            fully_shard(tower.layers[0])
        fully_shard(tower)
    fully_shard(whole)
    inputs = [batches[0] for batches in _batches(world)]
    for _ in range(2):
        whole.zero_grad()
        torch.manual_seed(5 + rank)
        (whole(inputs[rank]) / 2).backward()
    for r in range(world):
        torch.manual_seed(5 + r)
        (plain.loss(*chunk_graph([plain.image, plain.text], inputs[r], [size, size])) / (2 * world)).backward()
    assert_same(_whole([model]), gradients(plain))  # type: ignore[list-item]


@pytest.mark.parametrize("size", [7, 3])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_fully_shard_around_the_whole_model(size: int, parts: int) -> None:
    ranks.run(2, _root_around_the_model, size, parts)

"""GradCache over several ranks: DistributedDataParallel, fully_shard, token counts, automatic sizes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pairwise
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


class Dual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Encoder(dropout=0.3), Encoder(20, dropout=0.2)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, which: str, x: Tensor) -> Tensor:
        return self.image(x) if which == "image" else self.text(x)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a, b, self.log_scale.exp())


def _inputs(world: int, rows: int = 7) -> list[list[Tensor]]:
    """Different inputs for each rank."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(rows, 6, generator=generator) for _ in range(2)] for _ in range(world)]


def _expected(model: Dual, world: int, sizes: Callable[[int], list[int]]) -> list[Tensor]:
    """The mean over ranks of each rank's gradient, chunks in one graph."""
    for r, inputs in enumerate(_inputs(world)):
        torch.manual_seed(5 + r)
        model.loss(*chunk_graph([model.image, model.text], inputs, sizes(r))).backward()
    expected = [grad / world for grad in gradients(model)]
    clear(model)
    return expected


# A reducer with a hook written in Python must not be destroyed while its group is in use.
_alive: list[nn.Module] = []


def _ddp(rank: int, world: int, shared: str, first: int, second: int) -> None:
    def sizes(r: int) -> list[int]:
        return [first, second + r]  # ranks differ in chunks

    model = Dual()
    expected = _expected(model, world, sizes)
    reductions = 0

    def count(state, bucket):  # unannotated: DDP reads annotations, not strings
        nonlocal reductions
        reductions += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    wrappers = [DistributedDataParallel(m) for m in ([model.image, model.text] if shared == "no" else [model])]
    _alive.extend(wrappers)
    for wrapper in wrappers:
        wrapper.register_comm_hook(None, count)
    encoders: list[Callable[..., Tensor]] = list(wrappers)
    if shared == "partial":
        encoders = [functools.partial(wrappers[0], which) for which in ("image", "text")]
    elif shared == "closure":
        encoders = [lambda x: wrappers[0]("image", x), lambda x: wrapper("text", x)]
    step = GradCache(encoders, model.loss, chunk_size=sizes(rank))
    for _ in range(2):  # a second step fails if the first left a reducer waiting
        clear(model)
        before = reductions
        torch.manual_seed(5 + rank)
        step(*_inputs(world)[rank])
        assert reductions - before == len(wrappers), "one bucket per wrapper, reduced once"
    if shared == "no":  # the scale is in no wrapper: the caller reduces its gradient
        dist.all_reduce(model.log_scale.grad)
        model.log_scale.grad /= world
    assert_same(gradients(model), expected)


# The last size leaves some ranks with one chunk.
@pairwise.cases(world=(1, 2, 4), shared=("no", "partial", "closure"), sizes=((3, 2), (1, 4), (7, 6)))
def test_ddp_reduces_once(world: int, shared: str, sizes: tuple[int, int]) -> None:
    ranks.run(world, _ddp, shared, *sizes)


def _static_graph(rank: int, world: int) -> None:
    tower = DistributedDataParallel(Encoder(), static_graph=True)
    _alive.append(tower)
    x, y = torch.randn(6, 6), torch.randn(6, 6)
    for size in (2, "auto", [6, 3]) if world == 1 else (2, "auto", 6):
        budget = {"memory_budget": 1} if size == "auto" else {}
        with pytest.raises(ValueError, match="encoders: expected DistributedDataParallel without static_graph=True"):
            GradCache([tower, tower], plain_infonce, chunk_size=size, **budget)(x, y)
    if world == 1:  # one chunk is one plain step, which a static graph allows
        for _ in range(3):
            GradCache([tower, tower], plain_infonce, chunk_size=6)(x, y)


@pytest.mark.parametrize("world", [1, 2])
def test_a_static_graph_is_refused(world: int) -> None:
    """Refused before anything runs: PyTorch's reducer would fail in an internal assert, and in every later step."""
    ranks.run(world, _static_graph)


def _sharded(rank: int, world: int, sizes: list[int], tied: bool) -> None:
    model = Dual()
    inputs = _inputs(world)
    towers = [model.image, model.image if tied else model.text]
    for r in range(world):
        torch.manual_seed(5 + r)
        plain_infonce(*chunk_graph(towers, inputs[r], sizes)).backward()
    expected = [grad / world for grad in gradients(model)]
    clear(model)
    for tower in (model.image, model.text):
        fully_shard(tower.layers[0])
        fully_shard(tower)
    scattered = 0
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    plain = getattr(dist, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal scattered
        scattered += 1
        return plain(*args, **kwargs)

    step = GradCache(towers, plain_infonce, chunk_size=sizes)
    setattr(dist, name, count)
    try:
        for _ in range(2):
            clear(model)
            scattered = 0
            torch.manual_seed(5 + rank)
            step(*inputs[rank])
            assert scattered == (2 if tied else 4), f"{scattered}: each group of parameters once"
    finally:
        setattr(dist, name, plain)
    assert_same([grad.full_tensor() for grad in gradients(model)], expected)
    with pytest.raises(ValueError, match=re.escape("inputs: expected as many chunks on every rank")):
        GradCache(towers, plain_infonce, chunk_size=2 + rank)(*inputs[rank])


@pytest.mark.parametrize("sizes", [[3, 2], [1, 7]])
@pytest.mark.parametrize("tied", [False, True])
def test_fully_shard_reduces_once(tied: bool, sizes: list[int]) -> None:
    ranks.run(2, _sharded, sizes, tied)


def _token_counts(rank: int, world: int, size: int) -> tuple[float, list[Tensor]]:
    """Ranks differ widely in tokens; the loss is the mean over all of them."""
    model, head = Dual(), nn.Linear(8, 5)
    generator = torch.Generator().manual_seed(3)
    batch = [
        (torch.randn(6, 6, generator=generator), torch.randint(5, (6,), generator=generator)) for _ in range(world)
    ]
    keep = [torch.arange(6) < 6 - 2 * r for r in range(world)]

    def token_loss(outputs: list[Any], inputs: list[Any]) -> tuple[Tensor, Tensor]:
        (_, logits), (_, labels, chosen) = outputs[0], inputs[0]
        return F.cross_entropy(logits[chosen], labels[chosen], reduction="sum"), chosen.sum()

    torch.manual_seed(5)
    model.eval()
    rows = torch.cat([model.image(x)[chosen] for (x, _), chosen in zip(batch, keep, strict=True)])
    labels = torch.cat([y[chosen] for (_, y), chosen in zip(batch, keep, strict=True)])
    mean = F.cross_entropy(head(rows), labels)
    contrast = [plain_infonce(model.image(x), model.image(x)) for x, _ in batch]
    (mean + sum(contrast) / world).backward()
    expected = gradients(model.image, head)
    clear(model, head)

    wrapper = DistributedDataParallel(model.image)
    top = DistributedDataParallel(head)

    def encoder(batch: Any) -> tuple[Tensor, Tensor]:
        x = wrapper(batch[0])
        return x, top(x)

    step = GradCache(
        [encoder], lambda a: plain_infonce(a, a), chunk_size=size, token_loss_fn=token_loss, group=dist.group.WORLD
    )
    loss, parts = step((*batch[rank], keep[rank]))
    torch.testing.assert_close(parts["token_loss"], mean.detach())
    torch.testing.assert_close(loss, mean.detach() + contrast[rank].detach())
    assert_same(gradients(model.image, head), expected)
    with pytest.raises(ValueError, match="the same objectives on every rank"):
        GradCache(
            [encoder],
            lambda a: plain_infonce(a, a),
            chunk_size=6,
            token_loss_fn=lambda outputs, inputs: {str(rank): token_loss(outputs, inputs)},
            group=dist.group.WORLD,
        )((*batch[rank], keep[rank]))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_token_counts_are_summed_over_the_group(size: int) -> None:
    ranks.run(2, _token_counts, size)


class Greedy(torch.autograd.Function):
    """Runs out of memory once, in a backward, above a number of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: dict[str, int]) -> Tensor:
        ctx.state = state
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if len(grad) > ctx.state["limit"] and ctx.state["armed"]:
            ctx.state["hits"] += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return grad, None


def _one_rank_runs_out(rank: int, world: int) -> list[int]:
    model = Dual()
    wrapper = DistributedDataParallel(model)
    state = {"limit": 2 if rank == 1 else 100, "armed": 0, "hits": 0}
    inputs = _inputs(world, 9)
    encoders = [
        lambda x: Greedy.apply(wrapper("image", x), state),
        lambda x: wrapper("text", x),
    ]
    step = GradCache(encoders, model.loss, chunk_size=["auto", 3], memory_budget=2000)
    torch.manual_seed(5 + rank)
    step(*inputs[rank])  # sizes from the budget
    before = step.chunk_sizes[0]
    assert 2 < before < 9
    clear(model)
    state["armed"] = 1
    torch.manual_seed(5 + rank)
    step(*inputs[rank])
    assert state["hits"] == (1 if rank == 1 else 0)
    assert step.chunk_sizes == [before if rank == 0 else before // 2, 3]
    actual = gradients(model)
    sizes: list[list[int]] = [None] * world  # type: ignore[list-item]
    dist.all_gather_object(sizes, step.chunk_sizes)
    clear(model)
    for r in range(world):
        torch.manual_seed(5 + r)
        model.loss(*chunk_graph([model.image, model.text], inputs[r], sizes[r])).backward()
    assert_same(actual, [grad / world for grad in gradients(model)])
    return step.chunk_sizes


def test_ranks_begin_anew_together() -> None:
    ranks.run(2, _one_rank_runs_out)


class Parts(nn.Module):
    """Encoders and heads, of which a step may leave out some."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Encoder(), Encoder(20)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.never = nn.Linear(3, 3)

    def forward(self, encoder: nn.Module, x: Tensor) -> Tensor:
        return encoder(x)

    def loss(self, used: dict[str, Any], a: Tensor, b: Tensor) -> Tensor:
        rows = [self.heads[used["head"]](a)] if used["image"] else []
        rows += [b] if used["text"] else []
        return sum((x.square().mean() for x in rows), 0.0 * self.heads[used["head"]].bias.sum())


# Of each rank: does its loss depend on the images, on the texts, which head does it use.
USES = {
    "all": [(True, True, 0), (True, True, 0)],
    "one lacks the texts": [(True, True, 0), (True, False, 0)],
    "no one has texts": [(True, False, 0), (True, False, 0)],
    "one has nothing": [(True, True, 0), (False, False, 0)],
    "other heads": [(True, True, 0), (True, True, 1)],
}


def _unused(rank: int, world: int, uses: str, size: int, frozen: bool, grouped: bool) -> None:
    model, inputs = Parts(), _inputs(world)
    model.image.requires_grad_(not frozen)
    model.text.requires_grad_(not frozen)
    losses = [dict(zip(("image", "text", "head"), use, strict=True)) for use in USES[uses]]
    for each, (x, y) in zip(losses, inputs, strict=True):
        (model.loss(each, model.image(x), model.text(y)) / world).backward()
    expected = [p.grad for p in model.parameters()]
    clear(model)
    wrapper = DistributedDataParallel(model)
    _alive.append(wrapper)
    encoders = [functools.partial(wrapper, model.image), functools.partial(wrapper, model.text)]
    group = dist.group.WORLD if grouped else None
    step = GradCache(encoders, functools.partial(model.loss, losses[rank]), chunk_size=size, group=group)
    for _ in range(2):  # a second step fails if the first left a reducer waiting
        clear(model)
        step(*inputs[rank])
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            if wanted is None and not grouped:
                assert parameter.grad is None or not parameter.grad.any()
            elif wanted is None:
                assert parameter.grad is None, "as on one rank, so that an optimizer leaves it alone"
            else:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6)


@pairwise.cases(uses=tuple(USES), size=(2, 7), frozen=(False, True), grouped=(True, False))
def test_ranks_may_use_other_parameters(uses: str, size: int, frozen: bool, grouped: bool) -> None:
    ranks.run(2, _unused, uses, size, frozen, grouped)


def _plain(rank: int, world: int, first: int) -> int:
    model = Parts()
    wrapper = DistributedDataParallel(model)
    _alive.append(wrapper)
    forwards = 0

    def counted(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.image.register_forward_hook(counted)
    encoders = [functools.partial(wrapper, model.image), functools.partial(wrapper, model.text)]
    loss = functools.partial(model.loss, {"image": True, "text": True, "head": 0})
    sizes = [first if rank else 7, 7]
    GradCache(encoders, loss, chunk_size=sizes, group=dist.group.WORLD)(*_inputs(world)[rank])
    return forwards


def test_a_step_is_plain_if_no_rank_has_several_chunks() -> None:
    assert ranks.run(2, _plain, 7) == [1, 1]
    assert ranks.run(2, _plain, 4) == [2, 4], "rank 0 embeds twice, because rank 1 does"

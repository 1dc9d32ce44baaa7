"""The losses over a process group are the loss of one process with all the rows; every gradient too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import ContrastiveStats, GradCache, infonce, siglip
from mmkernels.runtime.backends import candidates
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import plain_infonce_options as plain_infonce

EXCHANGES = ("all_gather", "ring")


def rows_of(world: int, ragged: bool) -> list[int]:
    """Rows of each rank; when ragged, the second has none."""
    return [0 if r == 1 else 7 + 2 * r for r in range(world)] if ragged else [9] * world


def batch(n: int, e: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    keys = F.normalize(queries + 0.5 * torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    return queries.to(dtype), keys.to(dtype)


def plain_siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *, query_ids=None, key_ids=None) -> Tensor:
    positive = torch.eye(len(queries)) if query_ids is None else (query_ids[:, None] == key_ids)
    z = 2 * positive.to(scale.dtype) - 1
    return -F.logsigmoid(z * (scale * queries @ keys.T + bias)).sum() / len(queries)


@dataclass
class Whole:
    """A batch of one process, and how ranks share it."""

    rows: list[int]  # of each rank
    negatives: list[int]
    features: list[Tensor]  # queries, keys, and negatives if there are any
    options: dict[str, Any]  # of one process
    targets: Tensor | None  # within a rank's own keys

    def slices(self, rank: int) -> list[slice]:
        """Which of the features are the rank's."""
        begins = [sum(of[:rank]) for of in (self.rows, self.rows, self.negatives)]
        return [slice(b, b + of[rank]) for b, of in zip(begins, (self.rows, self.rows, self.negatives), strict=True)]

    def local(self, rank: int) -> dict[str, Any]:
        """Options of a rank."""
        mine, _, _ = self.slices(rank)
        options = {name: x[mine] if isinstance(x, Tensor) else x for name, x in self.options.items()}
        if self.targets is not None:
            options["targets"] = self.targets[mine]
        if "teacher" in options:
            queries_m, keys_m, alpha = options["teacher"]
            options["teacher"] = queries_m[mine], keys_m[mine], alpha
        return options


def _whole(name: str, rows: list[int]) -> Whole:
    n = sum(rows)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(n // 3 + 1, (n,), generator=generator)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    if sum(rows[1:]) and "smoothing" not in name:
        weights[: rows[0]] = 0  # of a rank, if not of all
    swapped = torch.cat([torch.arange(r).flip(0) for r in rows])
    first = torch.cat([torch.full((r,), sum(rows[:i])) for i, r in enumerate(rows)])
    negatives = [0] * len(rows)
    features = list(batch(n))
    options: dict[str, Any] = {}
    if "ids" in name:
        options = {"query_ids": ids, "key_ids": ids}
    if "ignore" in name:
        options["same_id"] = "ignore"
    if "weights" in name:
        options["weights"] = weights
    if "smoothing" in name:
        options["label_smoothing"] = 0.2
    if "one way" in name:
        options["symmetric"] = False
    if "targets" in name:
        options["targets"] = swapped + first
    if "teacher" in name:
        noise = 0.2 * torch.randn(2, n, 16, generator=generator, dtype=torch.float64)
        narrow = [(x + e)[:, :11] for x, e in zip(features, noise, strict=True)]
        options["teacher"] = (*narrow, 0.4)
    if "negatives" in name:
        negatives = [0 if len(rows) > 1 and r == len(rows) - 1 else 5 + 3 * r for r in range(len(rows))]
        features.append(torch.randn(sum(negatives), 16, generator=generator, dtype=torch.float64) / 4)
    return Whole(rows, negatives, features, options, swapped if "targets" in name else None)


OPTIONS = (
    "plain",
    "ids",
    "ids, ignore",
    "targets",
    "smoothing",
    "weights",
    "one way",
    "ids, ignore, smoothing, weights",
    "ids, smoothing, one way",
    "targets, weights, smoothing",
    "negatives",
    "teacher",
    "negatives, one way, ids",
    "negatives, teacher, targets, weights, smoothing",
    "negatives, teacher, ids, ignore, smoothing, one way",
    "teacher, ids",
)


def _compare(
    rank: int, whole: Whole, ours: Callable[..., Tensor], plain: Callable[..., Tensor], scalars: list[float]
) -> None:
    """Float64: loss on every rank, gradients of the features W-fold, those of the scalars whole."""
    world, count = len(whole.rows), len(whole.features)
    mine = whole.slices(rank)[:count]
    leaves = [x.detach().clone().requires_grad_() for x in whole.features]
    wholes = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in scalars]
    expected = plain(*leaves, *wholes)
    truth = torch.autograd.grad(expected, [*leaves, *wholes])
    local = [x.detach()[of].clone().requires_grad_() for x, of in zip(leaves, mine, strict=True)]
    own = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in scalars]
    loss = ours(*local, *own)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-14)
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, loss.item())
    assert len(set(everybody)) == 1, "the same bits on every rank"
    got = torch.autograd.grad(loss, [*local, *own])
    for i, (actual, exact) in enumerate(zip(got, truth, strict=True)):
        exact = world * exact[mine[i]] if i < count else exact
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-13, msg=lambda m, i=i: f"gradient {i}: {m}")


def _same_stats(whole: Whole, mine: slice, got: ContrastiveStats, expected: ContrastiveStats) -> None:
    for name, actual, exact in zip(got._fields, got, expected, strict=True):
        exact = exact[mine] if name.startswith("lse") else exact
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _infonce(rank: int, world: int, ragged: bool) -> None:
    rows = rows_of(world, ragged)
    for name in OPTIONS:
        whole = _whole(name, rows)
        options, mine = whole.local(rank), whole.slices(rank)

        def plain(x: Tensor, y: Tensor, *rest: Tensor, whole: Whole = whole) -> Tensor:
            more = {"negatives": rest[0]} if len(rest) == 2 else {}
            return plain_infonce(x, y, rest[-1], **whole.options, **more)

        def ours(
            x: Tensor, y: Tensor, *rest: Tensor, options: dict[str, Any] = options, exchange: str = "", **more: Any
        ) -> Any:
            more |= {"negatives": rest[0]} if len(rest) == 2 else {}
            return infonce(x, y, rest[-1], group=dist.group.WORLD, exchange=exchange, **options, **more)

        extra = {"negatives": whole.features[2]} if whole.features[2:] else {}
        scale = torch.tensor(14.3, dtype=torch.float64)
        _, expected = infonce(*whole.features[:2], scale, return_stats=True, **whole.options, **extra)
        for exchange in EXCHANGES:
            try:
                _compare(rank, whole, functools.partial(ours, exchange=exchange), plain, [14.3])
                local = [x[of] for x, of in zip(whole.features, mine, strict=False)]
                loss, stats = ours(*local, scale, exchange=exchange, return_stats=True)
                _same_stats(whole, mine[0], stats, expected)
                torch.testing.assert_close(loss, plain(*whole.features, scale), rtol=1e-12, atol=1e-14)
            except Exception as error:
                raise AssertionError(f"{name}, {exchange}: {error}") from error


def _siglip(rank: int, world: int, ragged: bool) -> None:
    for name in ("plain", "ids"):
        whole = _whole(name, rows_of(world, ragged))
        options, mine = whole.local(rank), whole.slices(rank)[0]
        scalars = [torch.tensor(x, dtype=torch.float64) for x in (10.0, -5.0)]
        _, expected = siglip(*whole.features, *scalars, return_stats=True, **whole.options)
        for exchange in EXCHANGES:
            over = {"group": dist.group.WORLD, "exchange": exchange, **options}
            _compare(
                rank,
                whole,
                lambda x, y, s, b, o=over: siglip(x, y, s, b, **o),
                lambda x, y, s, b, o=whole.options: plain_siglip(x, y, s, b, **o),
                [10.0, -5.0],
            )
            leaves = [x[mine].clone().requires_grad_() for x in whole.features]
            loss, stats = siglip(*leaves, *scalars, return_stats=True, **over)
            assert loss.requires_grad
            _same_stats(whole, mine, stats, expected)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_infonce_is_that_of_one_process(world: int, ragged: bool) -> None:
    ranks.run(world, _infonce, ragged)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_siglip_is_that_of_one_process(world: int, ragged: bool) -> None:
    ranks.run(world, _siglip, ragged)


def _accuracy(rank: int, world: int, dtype: torch.dtype, exchange: str, backend: str | None) -> None:
    rows, e = [40, 23, 0, 61][:world], 48
    begin = sum(rows[:rank])
    mine = slice(begin, begin + rows[rank])
    inputs = batch(sum(rows), e, dtype)

    def run(function: Callable[..., Tensor], x: Tensor, y: Tensor, of: slice, factor: float) -> list[Tensor]:
        s = torch.tensor(20.0, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=True)
        leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
        loss = function(*leaves, s)
        gradients = torch.autograd.grad(loss, [*leaves, s])
        return [loss.detach(), *(g[of] / factor for g in gradients[:2]), gradients[2]]

    truth = run(plain_infonce, *(x.double() for x in inputs), mine, 1)
    plain = run(plain_infonce, *inputs, mine, 1)
    ours = run(
        lambda x, y, s: infonce(x, y, s, group=dist.group.WORLD, exchange=exchange, backend=backend),
        *(x[mine] for x in inputs),
        slice(None),
        world,
    )
    for name, *three in zip(("loss", "queries", "keys", "logit_scale"), ours, plain, truth, strict=True):
        assert_as_accurate(f"{name} of rank {rank}", *three)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_plain_pytorch(dtype: torch.dtype, exchange: str) -> None:
    ranks.run(4, _accuracy, dtype, exchange, None)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_triton_interpreted(exchange: str) -> None:
    reason = candidates("contrastive", torch.device("cpu"), torch.float32)["triton"]
    if reason is not None:
        pytest.skip(reason)
    ranks.run(4, _accuracy, torch.float32, exchange, "triton")


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=-1)


def _under_ddp(rank: int, world: int, exchange: str, cached: bool) -> None:
    """Towers in wrappers, the scale in none: all gradients are those of one process, also with gradient caching."""
    rows = rows_of(world, False)
    begin = sum(rows[:rank])
    image, text, scale = Tower(), Tower(), nn.Parameter(torch.tensor(12.0))
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, sum(rows), 6, generator=generator)
    parameters = [*image.parameters(), *text.parameters(), scale]
    expected = torch.autograd.grad(plain_infonce(image(x), text(y), scale), parameters)
    towers = [DistributedDataParallel(image), DistributedDataParallel(text)]
    local = [t[begin : begin + rows[rank]] for t in (x, y)]

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return infonce(a, b, scale, group=dist.group.WORLD, exchange=exchange)

    for _ in range(2):
        for p in parameters:
            p.grad = None
        if cached:
            GradCache(towers, loss_fn, chunk_size=[2 + rank, 4])(*local)
        else:
            loss_fn(*(tower(t) for tower, t in zip(towers, local, strict=True))).backward()
        for p, exact in zip(parameters, expected, strict=True):
            assert p.grad is not None
            assert (p.grad - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [2, 4])
def test_under_ddp(world: int, exchange: str, cached: bool) -> None:
    ranks.run(world, _under_ddp, exchange, cached)


def _bytes_received(rank: int, world: int, loss: str, exchange: str) -> list[int]:
    """[of features and their gradients, of all] in a forward and backward, counted where they are received."""
    received = [0, 0]
    names = {name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)}
    plain = {name: getattr(dist, name) for name in (*names, "all_to_all_single", "batch_isend_irecv", "all_reduce")}

    def count(size: int) -> None:
        received[1] += size
        received[0] += size if size >= 1000 else 0  # a rank's statistics are smaller here, its features larger

    def gather(out: Tensor, mine: Tensor, **rest: Any) -> Any:
        for _ in range(world - 1):
            count(mine.nbytes)
        return plain[next(iter(names))](out, mine, **rest)

    def all_to_all(out: Tensor, mine: Tensor, splits: list[int], *rest: Any) -> Any:
        for other, size in enumerate(splits):
            if other != rank:
                count(size)
        return plain["all_to_all_single"](out, mine, splits, *rest)

    def passing(operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                count(operation.tensor.nbytes)
        return plain["batch_isend_irecv"](operations)

    def reduce(tensor: Tensor, *rest: Any, **more: Any) -> Any:
        count(2 * tensor.nbytes)
        return plain["all_reduce"](tensor, *rest, **more)

    changed = {"all_to_all_single": all_to_all, "batch_isend_irecv": passing, "all_reduce": reduce}
    changed.update(dict.fromkeys(names, gather))
    x, y = (t[:8].clone().requires_grad_() for t in batch(8, 256, torch.bfloat16))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    over = {"group": dist.group.WORLD, "exchange": exchange}
    losses: dict[str, Callable[[], Tensor]] = {
        "infonce": lambda: infonce(x, y, scale, **over),
        "siglip": lambda: siglip(x, y, scale, bias, **over),
        "negatives": lambda: infonce(x, y, scale, negatives=y.detach().clone().requires_grad_(), **over),
        "queue": lambda: infonce(x, y, scale, negatives=y.detach(), **over),
        "teacher": lambda: infonce(x, y, scale, teacher=(x, y, 0.5), **over),
        "return_stats": lambda: infonce(x, y, scale, return_stats=True, **over)[0],
    }
    try:
        for name, function in changed.items():
            setattr(dist, name, function)
        losses[loss]().backward()
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    return received


# Beyond the keys: [all_gather, ring] in units of N·E bytes, in bfloat16.
BYTES = {
    "infonce": (0, 0),
    "siglip": (0, 0),
    "negatives": (4, 8),
    "queue": (2, 4),
    "teacher": (4, 6),
    "return_stats": (0, 0),
}


@pytest.mark.parametrize("loss", BYTES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_exchanged(world: int, loss: str) -> None:
    """At most 6·N·E in gather mode and 8·N·E in the ring, and O(N) statistics: what the docs say, exactly."""
    n, e = 8 * world, 256
    for exchange, factor, limit, more in zip(EXCHANGES, (4, 8), (6, 8), BYTES[loss], strict=True):
        for features, everything in ranks.run(world, _bytes_received, loss, exchange):
            assert factor <= limit
            assert features == (factor + more) * n * e * (world - 1) // world
            assert everything - features <= 300 * n + 200 * world


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.nbytes)
        return out


def _largest(rank: int, world: int, exchange: str) -> int:
    x, y = (t.requires_grad_() for t in batch(4, 512, torch.float32))
    with LargestTensor() as largest:
        infonce(x, y, torch.tensor(10.0), group=dist.group.WORLD, exchange=exchange).backward()
    return largest.elements


def test_ring_holds_no_more_than_blocks() -> None:
    block = 4 * 512 * 4
    assert max(ranks.run(4, _largest, "ring")) == block
    assert max(ranks.run(4, _largest, "all_gather")) == 4 * block


WAITED = "group: expected every rank to call with valid arguments, rank 1 raised an error"


def _mistakes(rank: int, world: int) -> list[str]:
    """What each rank is told; none may wait for ever."""
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
        *("negatives", "negatives", "teacher[2]", "teacher: width", "return_stats", "return_stats"),
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


def _no_rows_anywhere(rank: int, world: int) -> None:
    for exchange in EXCHANGES:
        x, y = (torch.empty(0, 8, requires_grad=True) for _ in range(2))
        for loss in (
            infonce(x, y, 10.0, group=dist.group.WORLD, exchange=exchange),
            siglip(x, y, 10.0, 0.0, group=dist.group.WORLD, exchange=exchange),
        ):
            assert loss.item() == 0
            loss.backward()


def test_no_rows_on_any_rank() -> None:
    ranks.run(2, _no_rows_anywhere)


def _ids_and_options(rank: int, world: int) -> None:
    x, y = batch(4, 8)
    group = dist.group.WORLD
    ids = torch.arange(4) + 10 * rank
    elsewhere = torch.arange(4) + 10 * (1 - rank)  # the like of each is on the other rank
    infonce(x, y, 10.0, query_ids=ids, key_ids=elsewhere, group=group)
    alike = torch.full((4,), rank)
    unmet = torch.where(torch.arange(4) + rank == 0, 99, alike)  # on rank 0 alone
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

"""The losses over a process group equal the loss of one process with all the rows; so does every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import backends
import named
import pairwise
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ops.contrastive.shared import EXCHANGES, batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels import ContrastiveStats, FalseNegatives, GradCache, infonce, siglip
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import plain_infonce_options as plain_infonce


def rows_of(world: int, ragged: bool) -> list[int]:
    """Rows of each rank; if ragged, the second has none."""
    return [0 if r == 1 else 7 + 2 * r for r in range(world)] if ragged else [9] * world


def plain_siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *, query_ids=None, key_ids=None) -> Tensor:
    positive = torch.eye(len(queries)) if query_ids is None else (query_ids[:, None] == key_ids)
    z = 2 * positive.to(scale.dtype) - 1
    return -F.logsigmoid(z * (scale * queries @ keys.T + bias)).sum() / len(queries)


@dataclass
class Whole:
    """The batch of one process, and how ranks split it."""

    rows: list[int]  # per rank
    negatives: list[int]
    features: list[Tensor]  # queries, keys, and negatives if there are any
    options: dict[str, Any]  # of one process
    targets: Tensor | None  # within a rank's own keys

    def slices(self, rank: int) -> list[slice]:
        """The features that a rank holds."""
        begins = [sum(of[:rank]) for of in (self.rows, self.rows, self.negatives)]
        return [slice(b, b + of[rank]) for b, of in zip(begins, (self.rows, self.rows, self.negatives), strict=True)]

    def local(self, rank: int) -> dict[str, Any]:
        """The options of a rank."""
        mine, _, _ = self.slices(rank)
        options = {name: x[mine] if isinstance(x, Tensor) else x for name, x in self.options.items()}
        if self.targets is not None:
            options["targets"] = self.targets[mine]
        if "teacher" in options:
            queries_m, keys_m, alpha = options["teacher"]
            options["teacher"] = queries_m[mine], keys_m[mine], alpha
        if "false_negatives" in options:
            guide, of_negatives = options["false_negatives"], self.slices(rank)[2]
            of_negatives = guide.guide_negatives[of_negatives] if guide.guide_negatives is not None else None
            options["false_negatives"] = guide._replace(
                guide_queries=guide.guide_queries[mine], guide_keys=guide.guide_keys[mine], guide_negatives=of_negatives
            )
        return options


def _whole(name: str, rows: list[int]) -> Whole:
    n = sum(rows)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(n // 3 + 1, (n,), generator=generator)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    if sum(rows[1:]) and "smoothing" not in name:
        weights[: rows[0]] = 0  # a rank may have no weight, but not all ranks
    swapped = torch.cat([torch.arange(r).flip(0) for r in rows])
    first = torch.cat([torch.full((r,), sum(rows[:i])) for i, r in enumerate(rows)])
    negatives = [0] * len(rows)
    features = list(batch(n))
    options: dict[str, Any] = {}
    if "ids" in name:
        options = {"query_ids": ids, "key_ids": ids}
    if "ignore" in name:
        options["same_id"] = "ignore"
    if "hardness" in name:
        options["hardness"] = 4.0
    if "decoupled" in name:
        options["decoupled"] = True
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
    if "own negatives" in name:
        negatives = rows
        features.append(torch.randn(n, 3, 16, generator=generator, dtype=torch.float64) / 4)
    elif "negatives" in name:
        negatives = [0 if len(rows) > 1 and r == len(rows) - 1 else 5 + 3 * r for r in range(len(rows))]
        features.append(torch.randn(sum(negatives), 16, generator=generator, dtype=torch.float64) / 4)
    if "filter" in name:
        of_negatives = features[2][..., :5] + 0.1 if len(features) > 2 else None
        noise = 0.5 * torch.randn(2, n, 16, generator=generator, dtype=torch.float64)
        narrow = [(x + e)[:, :5] for x, e in zip(features, noise, strict=False)]
        options["false_negatives"] = FalseNegatives(*narrow, 0.1, "relative", of_negatives)
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
    "decoupled",
    "decoupled, targets, negatives",
    "decoupled, ids, one way",
    "decoupled, ids, ignore, weights, own negatives",
    "decoupled, teacher, smoothing",
    "hardness",
    "hardness, targets, weights, negatives",
    "hardness, ids, ignore, one way, decoupled, own negatives",
    "hardness, filter, negatives",
    "hardness, teacher",
    "filter",
    "filter, targets, weights, negatives",
    "filter, ids, ignore, own negatives",
    "filter, one way, decoupled",
    "filter, decoupled, ids, ignore, negatives",
    "own negatives",
    "own negatives, teacher, ids, ignore, smoothing, weights",
)


def _compare(
    rank: int, whole: Whole, ours: Callable[..., Tensor], plain: Callable[..., Tensor], scalars: list[float]
) -> None:
    """Float64: the loss on every rank; feature gradients are W times one process's, scalar gradients equal."""
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


def _infonce(rank: int, world: int, ragged: bool, exchange: str) -> None:
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
        with_stats = "filter" not in name
        if with_stats:
            _, expected = infonce(*whole.features[:2], scale, return_stats=True, **whole.options, **extra)
        try:
            _compare(rank, whole, functools.partial(ours, exchange=exchange), plain, [14.3])
            local = [x[of] for x, of in zip(whole.features, mine, strict=False)]
            if not with_stats:
                continue
            loss, stats = ours(*local, scale, exchange=exchange, return_stats=True)
            _same_stats(whole, mine[0], stats, expected)
            torch.testing.assert_close(loss, plain(*whole.features, scale), rtol=1e-12, atol=1e-14)
        except Exception as error:
            raise AssertionError(f"{name}, {exchange}: {error}") from error


def _siglip(rank: int, world: int, ragged: bool, exchange: str) -> None:
    for name in ("plain", "ids"):
        whole = _whole(name, rows_of(world, ragged))
        options, mine = whole.local(rank), whole.slices(rank)[0]
        scalars = [torch.tensor(x, dtype=torch.float64) for x in (10.0, -5.0)]
        _, expected = siglip(*whole.features, *scalars, return_stats=True, **whole.options)
        over = {"group": dist.group.WORLD, "exchange": exchange, **options}
        with named.case(name, exchange):
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


each_case = pytest.mark.parametrize("case", [_infonce, _siglip], ids=lambda case: case.__name__)


@each_case
@pytest.mark.parametrize(
    ("world", "ragged", "exchange"),
    [
        *((1, False, "all_gather"), (1, True, "ring")),
        *((2, False, "all_gather"), (2, True, "ring")),
        *((4, False, "ring"), (4, True, "all_gather"), (4, True, "ring")),
    ],
)
def test_loss_is_that_of_one_process(case: Callable[..., None], world: int, ragged: bool, exchange: str) -> None:
    ranks.run(world, case, ragged, exchange)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize(("ragged", "exchange"), [(False, "all_gather"), (True, "ring")])
def test_eight_ranks(case: Callable[..., None], ragged: bool, exchange: str) -> None:
    ranks.run(8, case, ragged, exchange)


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
        assert_as_accurate(f"{exchange}, {dtype}: {name} of rank {rank}", *three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    for exchange in EXCHANGES:
        ranks.run(4, _accuracy, dtype, exchange, None)


def test_triton_interpreted() -> None:
    backends.need("contrastive", "triton")
    for exchange in EXCHANGES:
        ranks.run(4, _accuracy, torch.float32, exchange, "triton")


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=-1)


def _under_ddp(rank: int, world: int, exchange: str, cached: bool) -> None:
    """Wrapped towers, unwrapped scale: all gradients equal one process's, also with gradient caching."""
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


@pairwise.cases(world=(2, 4), exchange=EXCHANGES, cached=(False, True))
def test_under_ddp(world: int, exchange: str, cached: bool) -> None:
    ranks.run(world, _under_ddp, exchange, cached)


def _no_rows_anywhere(rank: int, world: int) -> None:
    for exchange in EXCHANGES:
        x, y = (torch.empty(0, 8, requires_grad=True) for _ in range(2))
        for function, scalars in ((infonce, (10.0,)), (siglip, (10.0, 0.0))):
            loss = function(x, y, *scalars, group=dist.group.WORLD, exchange=exchange)
            with named.case(function.__name__, exchange):
                assert loss.item() == 0
            loss.backward()


def test_no_rows_on_any_rank() -> None:
    ranks.run(2, _no_rows_anywhere)

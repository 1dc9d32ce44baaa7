"""The losses over a process group are the loss of one process with all the rows; every gradient too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import GradCache, infonce, siglip
from mmkernels.runtime.backends import candidates
from mmkernels.testing import assert_as_accurate

EXCHANGES = ("all_gather", "ring")


def rows_of(world: int, ragged: bool) -> list[int]:
    """Rows of each rank; when ragged, the second has none."""
    return [0 if r == 1 else 7 + 2 * r for r in range(world)] if ragged else [9] * world


def batch(n: int, e: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    keys = F.normalize(queries + 0.5 * torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    return queries.to(dtype), keys.to(dtype)


def plain_infonce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    targets: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "positive",
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """By the definition: cross entropy against target distributions, with the logits in memory."""
    logits = scale * queries @ keys.T
    n, m = logits.shape
    targets = torch.arange(n) if targets is None else targets
    positive = targets[:, None] == torch.arange(m)
    if query_ids is not None and key_ids is not None:
        same = query_ids[:, None] == key_ids
        if same_id == "positive":
            positive = same
        else:
            logits = logits.masked_fill(same & ~positive, -torch.inf)
    weights = torch.ones(n, dtype=scale.dtype) if weights is None else weights

    def one_way(logits: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
        seen = (logits != -torch.inf).to(scale.dtype)
        target = positive / positive.sum(1, keepdim=True).clamp(min=1)
        target = (1 - label_smoothing) * target + label_smoothing * seen / seen.sum(1, keepdim=True)
        terms = target * logits.log_softmax(1).masked_fill(seen == 0, 0.0)
        return -(weights * terms.sum(1)).sum() / weights.sum()

    positive = positive.to(scale.dtype)
    loss = one_way(logits, positive, weights)
    return (loss + one_way(logits.T, positive.T, weights[targets.argsort()])) / 2 if symmetric else loss


def plain_siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *, query_ids=None, key_ids=None) -> Tensor:
    positive = torch.eye(len(queries)) if query_ids is None else (query_ids[:, None] == key_ids)
    z = 2 * positive.to(scale.dtype) - 1
    return -F.logsigmoid(z * (scale * queries @ keys.T + bias)).sum() / len(queries)


def _options(name: str, rows: list[int]) -> tuple[dict[str, Any], Callable[[int, int], dict[str, Any]]]:
    """Of one process, and of the rank whose rows are [begin, end)."""
    n = sum(rows)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(n // 3 + 1, (n,), generator=generator)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    swapped = torch.cat([torch.arange(r).flip(0) for r in rows])  # within a rank's own keys
    first = torch.cat([torch.full((r,), sum(rows[:i])) for i, r in enumerate(rows)])
    per_row: dict[str, Tensor] = {}
    common: dict[str, Any] = {}
    if "ids" in name:
        per_row = {"query_ids": ids, "key_ids": ids}
    if "ignore" in name:
        common["same_id"] = "ignore"
    if "weights" in name:
        per_row["weights"] = weights
    if "smoothing" in name:
        common["label_smoothing"] = 0.2
    if "one way" in name:
        common["symmetric"] = False
    whole = {**per_row, **common}
    if "targets" in name:
        whole["targets"] = swapped + first

    def local(begin: int, end: int) -> dict[str, Any]:
        cut = {key: value[begin:end] for key, value in per_row.items()}
        return {**cut, **common, **({"targets": swapped[begin:end]} if "targets" in name else {})}

    return whole, local


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
)


def _compare(
    rank: int, rows: list[int], ours: Callable[..., Tensor], plain: Callable[..., Tensor], scalars: list[float]
) -> None:
    """Float64: loss on every rank, gradients of the features W-fold, those of the scalars whole."""
    world, begin = len(rows), sum(rows[:rank])
    mine = slice(begin, begin + rows[rank])
    whole = [x.requires_grad_() for x in batch(sum(rows))]
    wholes = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in scalars]
    expected = plain(*whole, *wholes)
    truth = torch.autograd.grad(expected, [*whole, *wholes])
    local = [x.detach()[mine].clone().requires_grad_() for x in whole]
    leaves = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in scalars]
    loss = ours(*local, *leaves)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-14)
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, loss.item())
    assert len(set(everybody)) == 1, "the same bits on every rank"
    got = torch.autograd.grad(loss, [*local, *leaves])
    for i, (actual, exact) in enumerate(zip(got, truth, strict=True)):
        exact = world * exact[mine] if i < 2 else exact
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-13, msg=lambda m, i=i: f"gradient {i}: {m}")


def _infonce(rank: int, world: int, ragged: bool) -> None:
    rows = rows_of(world, ragged)
    begin = sum(rows[:rank])
    for name in OPTIONS:
        whole, local = _options(name, rows)
        options = local(begin, begin + rows[rank])
        for exchange in EXCHANGES:
            try:
                _compare(
                    rank,
                    rows,
                    lambda x, y, s, o=options, e=exchange: infonce(x, y, s, group=dist.group.WORLD, exchange=e, **o),
                    lambda x, y, s, o=whole: plain_infonce(x, y, s, **o),
                    [14.3],
                )
            except Exception as error:
                raise AssertionError(f"{name}, {exchange}: {error}") from error


def _siglip(rank: int, world: int, ragged: bool) -> None:
    rows = rows_of(world, ragged)
    begin = sum(rows[:rank])
    for name in ("plain", "ids"):
        whole, local = _options(name, rows)
        options = local(begin, begin + rows[rank])
        for exchange in EXCHANGES:
            _compare(
                rank,
                rows,
                lambda x, y, s, b, o=options, e=exchange: siglip(x, y, s, b, group=dist.group.WORLD, exchange=e, **o),
                lambda x, y, s, b, o=whole: plain_siglip(x, y, s, b, **o),
                [10.0, -5.0],
            )


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
    try:
        for name, function in changed.items():
            setattr(dist, name, function)
        if loss == "infonce":
            infonce(x, y, scale, group=dist.group.WORLD, exchange=exchange).backward()
        else:
            siglip(x, y, scale, bias, group=dist.group.WORLD, exchange=exchange).backward()
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    return received


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_exchanged(world: int, loss: str) -> None:
    """At most 6·N·E in gather mode and 8·N·E in the ring, and O(N) statistics: what the docs say, exactly."""
    n, e = 8 * world, 256
    for exchange, factor, limit in (("all_gather", 4, 6), ("ring", 8, 8)):
        for features, everything in ranks.run(world, _bytes_received, loss, exchange):
            assert features == factor * n * e * (world - 1) // world <= limit * n * e
            assert everything - features <= 200 * n + 200 * world


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
        lambda: infonce(x, y[:5] if odd else y, scale, group=group),
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
    names = ["queries: width", "queries: dtype", "symmetric", "label_smoothing", "exchange", "queries: gradient"]
    for lines in said:
        for line, name in zip(lines, names, strict=False):
            assert line.startswith(f"ValueError: {name}: expected the same on every rank"), line
    for i, own in ((6, "ValueError: keys: expected"), (7, "TypeError: logit_bias: expected")):
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
    with pytest.raises(ValueError, match="group: expected None, or a group of an initialised"):
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
            ValueError, match=f"{name}: expected each to occur among the {other} of some rank, 1 do not"
        ):
            infonce(x, y, 10.0, group=group, **{name: unmet, other: alike})
    for options in ({"negatives": y}, {"teacher": (x, y, 0.4)}, {"return_stats": True}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            infonce(x, y, 10.0, group=group, **options)
    with pytest.raises(NotImplementedError, match="return_stats"):
        siglip(x, y, 10.0, 0.0, group=group, return_stats=True)
    with pytest.raises(ValueError, match="exchange: expected 'auto' without a group"):
        infonce(x, y, 10.0, exchange="ring")


def test_ids_of_other_ranks_and_what_is_not_there() -> None:
    ranks.run(2, _ids_and_options)

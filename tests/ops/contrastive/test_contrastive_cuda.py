"""The CUDA C++ contrastive kernels, emulated and on a device: accuracy against float64, layouts, the same bits."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product

import backends
import named
import pairwise
import pytest
import torch
from torch import Tensor

from mmkernels.ops.contrastive import infonce, siglip
from mmkernels.testing.contrastive import (
    CASES,
    Case,
    compare,
    features,
    loss_and_gradients,
    plain_infonce,
    plain_siglip,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Case("small", 150, 72)
LOSSES = {
    "infonce": (partial(infonce, backend="native"), plain_infonce, ("queries", "keys", "logit_scale")),
    "siglip": (partial(siglip, backend="native"), plain_siglip, ("queries", "keys", "logit_scale", "logit_bias")),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def turns(
    cuda: object, dtypes: Sequence[torch.dtype], cases: Sequence[Case], case: Case
) -> Iterable[tuple[str, torch.dtype]]:
    """Each loss in each dtype; emulated, where a case takes seconds, each dtype with one loss, which varies with dtype
    and case."""
    if cuda.emulator is None:
        return product(LOSSES, dtypes)
    losses = list(LOSSES)
    return [(losses[turn % len(losses)], dtype) for turn, dtype in enumerate(dtypes, cases.index(case))]


def seeds(cuda: object) -> int:
    """How many draws are judged together; emulation is slow."""
    return 3 if cuda.emulator is not None else 8


def widened(plain: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Plain PyTorch in the dtype; in float32 where fp16 overflows and gives NaN."""
    if case.name != "huge scale" or dtype != torch.float16:
        return plain
    return lambda *inputs: plain(*(x.float() if x.dtype == dtype else x for x in inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(cuda, case):
    for loss, dtype in turns(cuda, DTYPES, CASES, case):
        ours, plain, names = LOSSES[loss]
        if loss == "siglip" and case.e == 1 and dtype != torch.float32:
            # All similarities are 1 or -1, so the gradient of the logits has two values, and the error of rounding one
            # to 16 bits does not average out: what remains is bounded by that rounding and the result's own.
            inputs = [*features(case, dtype), torch.tensor(case.scale), torch.tensor(case.bias)]
            inputs = [x.to(cuda.device) for x in inputs]
            truth = loss_and_gradients(plain, *(x.double() for x in inputs))
            with named.case(loss, dtype):
                for a, b in zip(loss_and_gradients(ours, *inputs), truth, strict=True):
                    assert (a - b).norm() <= torch.finfo(dtype).eps * b.norm()
        else:
            with named.case(loss):
                compare(ours, widened(plain, case, dtype), case, dtype, names, seeds=seeds(cuda), device=cuda.device)


def scalars_of(loss: str, device: str) -> list[Tensor]:
    return [torch.tensor(value, device=device) for value in (SMALL.scale, SMALL.bias)][: len(LOSSES[loss][2]) - 2]


@pairwise.cases(loss=LOSSES, layout=("row stride", "off by one", "transposed"), dtype=DTYPES)
def test_layouts(cuda, loss, layout, dtype):
    """Strides that a kernel must follow, and addresses at which it may not use 16-byte accesses: the same bits."""

    def laid_out(x: Tensor) -> Tensor:
        if layout == "row stride":
            return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]
        if layout == "off by one":
            return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
        return x.T.contiguous().T

    function, scalars = LOSSES[loss][0], scalars_of(loss, cuda.device)
    plain = [x.to(cuda.device) for x in features(SMALL, dtype)]
    strange = [laid_out(x) for x in plain]
    leaves = [x.detach().requires_grad_() for x in strange]  # detach keeps the layout, clone would not
    value = function(*leaves, *scalars)
    gradients = torch.autograd.grad(value, leaves)
    for a, b in zip((value.detach(), *gradients), loss_and_gradients(function, *plain, *scalars), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_loss
def test_the_same_bits_whatever_runs_first(cuda, loss, dtype):
    function, scalars = LOSSES[loss][0], scalars_of(loss, cuda.device)
    inputs = [x.to(cuda.device) for x in features(Case("ragged", 270, 72), dtype)]
    results = [loss_and_gradients(function, *inputs, *scalars) for _ in cuda.schedules()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@each_loss
def test_any_number_of_multiprocessors(cuda, loss):
    """A block may take several row tiles, and several blocks one row tile's columns."""
    if cuda.emulator is None:
        pytest.skip("a device has the multiprocessors it has")
    ours, plain, names = LOSSES[loss]
    for multiprocessors in (1, 2, 8, 132):
        cuda.multiprocessors(multiprocessors)
        case = Case(f"five tiles on {multiprocessors}", 530, 24)
        compare(ours, plain, case, torch.float32, names, seeds=2)


@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"),
    [(torch.float32, 2100, 2e-6), (torch.bfloat16, 4200, 5e-3)],
    ids=["float32", "bfloat16"],
)
@each_loss
def test_several_superblocks(cuda, loss, dtype, n, tolerance):
    """More rows than one superblock of the backward holds (2048 in float, 4096 in 16-bit): corners, edges."""
    if cuda.emulator is not None and dtype != torch.float32:
        pytest.skip("too long to emulate; nothing in it depends on the dtype")
    function, plain, _ = LOSSES[loss]
    cuda.multiprocessors(64)
    queries, keys = (x.to(cuda.device) for x in features(Case("long", n, 8), dtype))
    inputs = (queries, keys, *scalars_of(loss, cuda.device))
    truth = loss_and_gradients(plain, *(x.double() for x in inputs))
    for a, b in zip(loss_and_gradients(function, *inputs), truth, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@each_loss
def test_no_rows(cuda, loss):
    function, scalars = LOSSES[loss][0], scalars_of(loss, cuda.device)
    empty = torch.zeros(0, 16, device=cuda.device)
    value, *gradients = loss_and_gradients(function, empty, empty, *scalars)
    assert value == 0 and gradients[0].shape == gradients[1].shape == (0, 16)
    assert all(gradient == 0 for gradient in gradients[2:])


@pytest.mark.parametrize("frozen", (0, 1))
@each_loss
def test_a_frozen_tower(cuda, loss, frozen):
    function, scalars = LOSSES[loss][0], scalars_of(loss, cuda.device)
    inputs = [x.to(cuda.device) for x in features(SMALL, torch.bfloat16)]
    both = loss_and_gradients(function, *inputs, *scalars)[1:3]
    inputs[1 - frozen].requires_grad_()
    function(*inputs, *scalars).backward()
    assert inputs[frozen].grad is None and torch.equal(inputs[1 - frozen].grad, both[1 - frozen])


# The kernels for compute capability 9.0: emulated with that capability, or on a real device that has it.


@pytest.fixture
def sm90(cuda):
    if cuda.emulator is None and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    cuda.capability(90)
    yield cuda
    cuda.capability(80)


SM90_CASES = (
    *(case for case in CASES if case.e % 8 == 0),
    Case("a tile and a warpgroup", 320, 72),
    Case("far apart in one row", 300, 64, kind="unnormalized", scale=60.0),
)


@pytest.mark.parametrize("case", SM90_CASES, ids=str)
def test_sm90(sm90, case):
    for loss, dtype in turns(sm90, (torch.bfloat16, torch.float16), SM90_CASES, case):
        if sm90.emulator is not None:
            sm90.emulator.reset_counts()
        ours, plain, names = LOSSES[loss]
        with named.case(loss, dtype):
            compare(ours, widened(plain, case, dtype), case, dtype, names, seeds=2, device=sm90.device)
            if sm90.emulator is not None:
                counts = sm90.emulator.counts()
                assert counts["warpgroup_products"] > 0 and counts["tma_loads"] > 0 and counts["matrix_products"] == 0


@each_loss
@pytest.mark.parametrize("multiprocessors", (1, 5, 132))
def test_sm90_gives_the_same_bits_whatever_runs_first(sm90, loss, multiprocessors):
    """Blocks with several tiles, one, or none; warps and copies of any speed."""
    sm90.multiprocessors(multiprocessors)
    function, scalars = LOSSES[loss][0], scalars_of(loss, sm90.device)
    inputs = [x.to(sm90.device) for x in features(Case("ragged", 450, 136), torch.bfloat16)]
    results = [loss_and_gradients(function, *inputs, *scalars) for _ in sm90.schedules()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@each_loss
def test_sm90_leaves_what_tma_cannot_follow(sm90, loss):
    """Odd strides and addresses use the sm_80 kernels; a stride that TMA supports gives the same bits."""
    function, scalars = LOSSES[loss][0], scalars_of(loss, sm90.device)
    plain = [x.to(sm90.device) for x in features(SMALL, torch.bfloat16)]
    expected = loss_and_gradients(function, *plain, *scalars)
    wide = [torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]].requires_grad_() for x in plain]
    value = function(*wide, *scalars)
    for a, b in zip((value.detach(), *torch.autograd.grad(value, wide)), expected, strict=False):
        assert torch.equal(a, b)
    odd = [x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x).requires_grad_() for x in plain]
    if sm90.emulator is not None:
        sm90.emulator.reset_counts()
    value = function(*odd, *scalars)
    gradients = torch.autograd.grad(value, odd)
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-5, atol=0)
    for a, b in zip(gradients, expected[1:3], strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
    if sm90.emulator is not None:
        assert sm90.emulator.counts()["warpgroup_products"] == 0


@each_loss
def test_bad_features_are_not_hidden(cuda, loss):
    function, plain, _ = LOSSES[loss]
    scalars = scalars_of(loss, cuda.device)
    for capability, bad in product((80, 90), (torch.nan, torch.inf)):
        cuda.capability(capability)
        queries, keys = (x.to(cuda.device) for x in features(SMALL, torch.bfloat16))
        queries[140, 3] = bad
        ours, expected = function(queries, keys, *scalars), plain(queries.float(), keys.float(), *scalars)
        assert not ours.isfinite() and ours.isnan() == expected.isnan(), (capability, bad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_loss
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_large(backend, loss, dtype):
    """Too slow for emulation: a full grid, several superblocks, E larger than any tile."""
    backends.need("contrastive", backend, dtype, "cuda")
    _, plain, names = LOSSES[loss]
    ours = partial({"infonce": infonce, "siglip": siglip}[loss], backend=backend)
    compare(ours, plain, Case("large", 9001, 768), dtype, names, seeds=2, device="cuda")

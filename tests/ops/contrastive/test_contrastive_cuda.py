"""The CUDA C++ contrastive kernels, emulated and on a device: accuracy against float64, layouts, the same bits."""

from collections.abc import Callable
from functools import partial

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


def seeds(cuda: object) -> int:
    """Draws that are judged together; emulation takes its time."""
    return 3 if cuda.emulator is not None else 8


def widened(plain: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Plain PyTorch in the dtype; in float32 where fp16 itself overflows and gives NaN."""
    if case.name != "huge scale" or dtype != torch.float16:
        return plain
    return lambda *inputs: plain(*(x.float() if x.dtype == dtype else x for x in inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infonce(cuda, case, dtype):
    ours = partial(infonce, backend="native")
    names = ("queries", "keys", "logit_scale")
    compare(ours, widened(plain_infonce, case, dtype), case, dtype, names, seeds=seeds(cuda), device=cuda.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_siglip(cuda, case, dtype):
    ours = partial(siglip, backend="native")
    names = ("queries", "keys", "logit_scale", "logit_bias")
    if case.e == 1 and dtype != torch.float32:
        # All similarities are 1 or -1, so the gradient of the logits has two values, and the error of rounding one to
        # 16 bits does not average out: what remains is a bound by that rounding and the result's own.
        scalars = torch.tensor(case.scale), torch.tensor(case.bias)
        inputs = [x.to(cuda.device) for x in (*features(case, dtype), *scalars)]
        truth = loss_and_gradients(plain_siglip, *(x.double() for x in inputs))
        for a, b in zip(loss_and_gradients(ours, *inputs), truth, strict=True):
            assert (a - b).norm() <= torch.finfo(dtype).eps * b.norm()
        return
    compare(ours, widened(plain_siglip, case, dtype), case, dtype, names, seeds=seeds(cuda), device=cuda.device)


def losses(device: str) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    scale, bias = (torch.tensor(value, device=device) for value in (SMALL.scale, SMALL.bias))
    return {
        "infonce": (partial(infonce, backend="native"), (scale,)),
        "siglip": (partial(siglip, backend="native"), (scale, bias)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("row stride", "off by one", "transposed"))
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_layouts(cuda, loss, layout, dtype):
    """Strides that a kernel must follow, and addresses at which it may not use 16-byte accesses: the same bits."""

    def laid_out(x: Tensor) -> Tensor:
        if layout == "row stride":
            return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]
        if layout == "off by one":
            return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
        return x.T.contiguous().T

    function, scalars = losses(cuda.device)[loss]
    plain = [x.to(cuda.device) for x in features(SMALL, dtype)]
    strange = [laid_out(x) for x in plain]
    leaves = [x.detach().requires_grad_() for x in strange]  # detach keeps the layout, clone would not
    value = function(*leaves, *scalars)
    gradients = torch.autograd.grad(value, leaves)
    for a, b in zip((value.detach(), *gradients), loss_and_gradients(function, *plain, *scalars), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_the_same_bits_whatever_runs_first(cuda, loss, dtype):
    function, scalars = losses(cuda.device)[loss]
    inputs = [x.to(cuda.device) for x in features(Case("ragged", 270, 72), dtype)]
    results = [loss_and_gradients(function, *inputs, *scalars) for _ in cuda.schedules()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("multiprocessors", (1, 2, 8, 132))
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_any_number_of_multiprocessors(cuda, loss, multiprocessors):
    """A block may take several row tiles, and several blocks one row tile's columns."""
    if cuda.emulator is None:
        pytest.skip("a device has the multiprocessors it has")
    cuda.multiprocessors(multiprocessors)
    case = Case("five tiles", 530, 24)
    ours = {"infonce": infonce, "siglip": siglip}[loss]
    plain = {"infonce": plain_infonce, "siglip": plain_siglip}[loss]
    names = ("queries", "keys", "logit_scale", "logit_bias")[: 3 if loss == "infonce" else 4]
    compare(partial(ours, backend="native"), plain, case, torch.float32, names, seeds=2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_several_superblocks(cuda, loss, dtype):
    """More rows than one superblock of the backward holds (2048 in float, 4096 in 16-bit): corners, edges."""
    if cuda.emulator is not None and dtype != torch.float32:
        pytest.skip("too long to emulate; nothing in it depends on the dtype")
    n = 2100 if dtype == torch.float32 else 4200
    function, scalars = losses(cuda.device)[loss]
    queries, keys = (x.to(cuda.device) for x in features(Case("long", n, 8), dtype))
    plain = plain_infonce if loss == "infonce" else plain_siglip
    cuda.multiprocessors(64)
    actual = loss_and_gradients(function, queries, keys, *scalars)
    truth = loss_and_gradients(plain, *(x.double() for x in (queries, keys, *scalars)))
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    for a, b in zip(actual, truth, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_no_rows(cuda, loss):
    function, scalars = losses(cuda.device)[loss]
    empty = torch.zeros(0, 16, device=cuda.device)
    value, *gradients = loss_and_gradients(function, empty, empty, *scalars)
    assert value == 0 and gradients[0].shape == gradients[1].shape == (0, 16)
    assert all(gradient == 0 for gradient in gradients[2:])


@pytest.mark.parametrize("frozen", (0, 1))
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_a_frozen_tower(cuda, loss, frozen):
    function, scalars = losses(cuda.device)[loss]
    inputs = [x.to(cuda.device) for x in features(SMALL, torch.bfloat16)]
    both = loss_and_gradients(function, *inputs, *scalars)[1:3]
    inputs[1 - frozen].requires_grad_()
    function(*inputs, *scalars).backward()
    assert inputs[frozen].grad is None and torch.equal(inputs[1 - frozen].grad, both[1 - frozen])


@pytest.mark.parametrize("loss", ("infonce", "siglip"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_bad_features_are_not_hidden(cuda, loss, bad):
    function, scalars = losses(cuda.device)[loss]
    queries, keys = (x.to(cuda.device) for x in features(SMALL, torch.bfloat16))
    queries[140, 3] = bad
    plain = {"infonce": plain_infonce, "siglip": plain_siglip}[loss]
    ours, expected = function(queries, keys, *scalars), plain(queries.float(), keys.float(), *scalars)
    assert not ours.isfinite() and ours.isnan() == expected.isnan()


# The kernels for compute capability 9.0: on an emulated device by its capability, on a real one by its own.


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


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", SM90_CASES, ids=str)
def test_sm90(sm90, case, dtype):
    if sm90.emulator is not None:
        sm90.emulator.reset_counts()
    for function, plain, names in (
        (infonce, plain_infonce, ("queries", "keys", "logit_scale")),
        (siglip, plain_siglip, ("queries", "keys", "logit_scale", "logit_bias")),
    ):
        ours = partial(function, backend="native")
        compare(ours, widened(plain, case, dtype), case, dtype, names, seeds=2, device=sm90.device)
    if sm90.emulator is not None:
        counts = sm90.emulator.counts()
        assert counts["warpgroup_products"] > 0 and counts["tma_loads"] > 0 and counts["matrix_products"] == 0


@pytest.mark.parametrize("loss", ("infonce", "siglip"))
@pytest.mark.parametrize("multiprocessors", (1, 5, 132))
def test_sm90_gives_the_same_bits_whatever_runs_first(sm90, loss, multiprocessors):
    """Blocks with several tiles, or one, or none; warps and copies of any speed."""
    sm90.multiprocessors(multiprocessors)
    function, scalars = losses(sm90.device)[loss]
    inputs = [x.to(sm90.device) for x in features(Case("ragged", 450, 136), torch.bfloat16)]
    results = [loss_and_gradients(function, *inputs, *scalars) for _ in sm90.schedules()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("loss", ("infonce", "siglip"))
def test_sm90_leaves_what_tma_cannot_follow(sm90, loss):
    """Odd strides and addresses run on the kernels for sm_80; a stride that TMA can follow gives the same bits."""
    function, scalars = losses(sm90.device)[loss]
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


@pytest.mark.parametrize("loss", ("infonce", "siglip"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_sm90_does_not_hide_bad_features(sm90, loss, bad):
    function, scalars = losses(sm90.device)[loss]
    queries, keys = (x.to(sm90.device) for x in features(SMALL, torch.bfloat16))
    queries[140, 3] = bad
    plain = {"infonce": plain_infonce, "siglip": plain_siglip}[loss]
    ours, expected = function(queries, keys, *scalars), plain(queries.float(), keys.float(), *scalars)
    assert not ours.isfinite() and ours.isnan() == expected.isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ("infonce", "siglip"))
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_large(backend, loss, dtype):
    """What only a device can do in reasonable time: a full grid, several superblocks, E beyond any tile."""
    ours = partial({"infonce": infonce, "siglip": siglip}[loss], backend=backend)
    plain = {"infonce": plain_infonce, "siglip": plain_siglip}[loss]
    names = ("queries", "keys", "logit_scale", "logit_bias")[: 3 if loss == "infonce" else 4]
    compare(ours, plain, Case("large", 9001, 768), dtype, names, seeds=2, device="cuda")

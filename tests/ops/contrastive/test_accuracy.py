"""The losses and every gradient against float64, on each backend, the cases that break peers among them."""

import functools

import pytest
import torch

from mmkernels import infonce, siglip
from mmkernels.runtime.backends import candidates
from mmkernels.testing.contrastive import (
    CASES,
    compare,
    features,
    infonce_terms,
    loss_and_gradients,
    plain_infonce,
    plain_infonce_two_matrices,
    plain_siglip,
    siglip_terms,
)

LOSSES = {
    "infonce": (infonce, plain_infonce, ("queries", "keys", "logit_scale")),
    "siglip": (siglip, plain_siglip, ("queries", "keys", "logit_scale", "logit_bias")),
}
BY_NAME = {case.name: case for case in CASES}
LOW = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes seconds a case: one of each kind.
INTERPRETED = ("one row", "two rows", "ragged", "E=384", "cone", "duplicates", "solved", "negative scale")


def require(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    reason = candidates("contrastive", torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_as_accurate_as_plain_pytorch(name, backend, case, dtype):
    require(backend, dtype)
    loss, plain, names = LOSSES[name]
    compare(functools.partial(loss, backend=backend), plain, case, dtype, names)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [BY_NAME[name] for name in INTERPRETED], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_triton_interpreted(name, case, dtype):
    require("triton", dtype)
    loss, plain, names = LOSSES[name]
    compare(functools.partial(loss, backend="triton"), plain, case, dtype, names, seeds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu(name, backend, case, dtype):
    require(backend, dtype, "cuda")
    loss, plain, names = LOSSES[name]
    compare(functools.partial(loss, backend=backend), plain, case, dtype, names, device="cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_float64_is_the_oracle(name, case):
    require("native", torch.float64)
    loss, _, names = LOSSES[name]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (case.scale, case.bias)][: len(names) - 2]
    inputs = (*features(case, torch.float64), *scalars)
    native, oracle = (loss_and_gradients(functools.partial(loss, backend=b), *inputs) for b in ("native", "reference"))
    terms = (infonce_terms if name == "infonce" else siglip_terms)(*inputs)
    for ours, truth, sizes in zip(native, oracle, terms, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-14 * sizes.max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    require("native", torch.float64)
    loss, _, names = LOSSES[name]
    queries, keys = features(BY_NAME["two rows"], torch.float64)
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -1.0)][: len(names) - 2]
    inputs = (queries.requires_grad_(), keys.requires_grad_(), *scalars)
    assert torch.autograd.gradcheck(functools.partial(loss, backend="native"), inputs)


def test_two_plain_forms_agree():
    queries, keys = features(BY_NAME["ragged"], torch.float64)
    scale = torch.tensor(14.3, dtype=torch.float64)
    torch.testing.assert_close(plain_infonce(queries, keys, scale), plain_infonce_two_matrices(queries, keys, scale))


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_again_and_for_any_number_of_threads(name):
    require("native", torch.float32)
    loss, _, names = LOSSES[name]
    inputs = (*features(BY_NAME["two tiles each way"], torch.float32), torch.tensor(14.3), torch.tensor(-10.0))
    before = torch.get_num_threads()
    try:
        first = loss_and_gradients(loss, *inputs[: len(names)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = loss_and_gradients(loss, *inputs[: len(names)])
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0, -4.0, 40.0])
def test_low_precision_errs_by_its_rounding_alone(scale, dtype):
    """Rows and columns near enough to each other for one exponential, and not; bf16 rounds the logits' gradient too."""
    require("native", dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.3, 2.7, 301)[:, None]
    draw = functools.partial(torch.randn, 301, 72, generator=generator)
    queries, keys = (torch.nn.functional.normalize(draw(), dim=1) * size for size in (sizes, sizes.flip(0)))
    keys = (keys + 0.5 * queries).to(dtype)
    inputs = (queries.to(dtype), keys, torch.tensor(scale))
    ours = loss_and_gradients(functools.partial(infonce, backend="native"), *inputs)
    truth = loss_and_gradients(plain_infonce, *(x.double() for x in inputs))
    for what, result, exact in zip(("loss", "queries", "keys", "scale"), ours, truth, strict=True):
        unavoidable = (exact.to(result.dtype).double() - exact).norm() + 2e-6 * exact.norm()
        roundings = 1.1 if dtype == torch.float16 or what in ("loss", "scale") else 1.5
        assert (result.double() - exact).norm() <= roundings * unavoidable, what

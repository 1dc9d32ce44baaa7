"""The losses and every gradient against float64, on each backend, including inputs that break other losses."""

import functools

import backends
import named
import pairwise
import pytest
import torch

from mmkernels import infonce, siglip
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
# Triton's interpreter takes seconds per case: one of each kind.
KINDS = ("one row", "two rows", "ragged", "E=384", "cone", "duplicates", "solved", "negative scale")
KINDS = tuple(BY_NAME[name] for name in KINDS)

each_loss = pytest.mark.parametrize("name", LOSSES)
each_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


def judge(name, backend, case, dtype, device="cpu", seeds=8):
    backends.need("contrastive", backend, dtype, device)
    loss, plain, names = LOSSES[name]
    with named.case(name):  # `compare` names the rest
        compare(functools.partial(loss, backend=backend), plain, case, dtype, names, seeds=seeds, device=device)


@each_dtype
@each_loss
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_on_a_cpu(backend, name, dtype):
    for case in CASES:
        judge(name, backend, case, dtype)


@pairwise.cases(case=KINDS, dtype=LOW, name=LOSSES)
def test_triton_interpreted(name, case, dtype):
    judge(name, "triton", case, dtype, seeds=2)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
@backends.every
def test_on_a_gpu(backend, case, dtype):
    for name in LOSSES:
        judge(name, backend, case, dtype, "cuda")


@each_loss
def test_float64_is_the_oracle(name):
    backends.need("contrastive", "native", torch.float64)
    loss, _, names = LOSSES[name]
    for case in CASES:
        scalars = [torch.tensor(value, dtype=torch.float64) for value in (case.scale, case.bias)][: len(names) - 2]
        inputs = (*features(case, torch.float64), *scalars)
        native, oracle = (
            loss_and_gradients(functools.partial(loss, backend=b), *inputs) for b in ("native", "reference")
        )
        terms = (infonce_terms if name == "infonce" else siglip_terms)(*inputs)
        for what, ours, truth, sizes in zip(("loss", *names), native, oracle, terms, strict=True):
            atol = 1e-14 * sizes.max().item()
            torch.testing.assert_close(
                ours, truth, rtol=1e-11, atol=atol, msg=lambda m, of=f"{case}: {what}": f"{of}: {m}"
            )


@each_loss
def test_gradcheck(name):
    backends.need("contrastive", "native", torch.float64)
    loss, _, names = LOSSES[name]
    queries, keys = features(BY_NAME["two rows"], torch.float64)
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -1.0)][: len(names) - 2]
    inputs = (queries.requires_grad_(), keys.requires_grad_(), *scalars)
    assert torch.autograd.gradcheck(functools.partial(loss, backend="native"), inputs)


def test_two_plain_forms_agree():
    queries, keys = features(BY_NAME["ragged"], torch.float64)
    scale = torch.tensor(14.3, dtype=torch.float64)
    torch.testing.assert_close(plain_infonce(queries, keys, scale), plain_infonce_two_matrices(queries, keys, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_by_its_rounding_alone(dtype):
    """Rows and columns close enough to share one exponential, and not; bf16 rounds the logits' gradient too."""
    backends.need("contrastive", "native", dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.3, 2.7, 301)[:, None]
    draw = functools.partial(torch.randn, 301, 72, generator=generator)
    queries, keys = (torch.nn.functional.normalize(draw(), dim=1) * size for size in (sizes, sizes.flip(0)))
    queries, keys = queries.to(dtype), (keys + 0.5 * queries).to(dtype)
    for scale in (1.0, 4.0, -4.0, 40.0):
        inputs = (queries, keys, torch.tensor(scale))
        ours = loss_and_gradients(functools.partial(infonce, backend="native"), *inputs)
        truth = loss_and_gradients(plain_infonce, *(x.double() for x in inputs))
        for what, result, exact in zip(("loss", "queries", "keys", "scale"), ours, truth, strict=True):
            unavoidable = (exact.to(result.dtype).double() - exact).norm() + 2e-6 * exact.norm()
            roundings = 1.1 if dtype == torch.float16 or what in ("loss", "scale") else 1.5
            assert (result.double() - exact).norm() <= roundings * unavoidable, f"{what}, scale {scale}"

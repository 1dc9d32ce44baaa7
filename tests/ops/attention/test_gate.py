"""The gated residual judged against float64; how users call it, and their mistakes."""

import backends
import named
import pytest
import torch

from mmkernels import gated_residual
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention_rows import Rows, differentiate, gated_rows, plain_gated_residual

OPS = torch.ops.mmkernels


def assert_right(rows: Rows, backend: str, case: object = "", device: str = "cpu") -> None:
    """A failure names the `case`."""
    got = differentiate(rows.on(device), lambda **kwargs: gated_residual(**kwargs, backend=backend))
    got = {name: x.cpu() for name, x in got.items()}
    plain = differentiate(rows, plain_gated_residual)
    truth = differentiate(rows.double(), plain_gated_residual)
    for name, true in truth.items():
        assert got[name].dtype == plain[name].dtype, f"{case} {name}"
        if rows.grad_out.dtype == torch.float64:
            torch.testing.assert_close(
                got[name], true, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{case} {name}: {m}"
            )
            continue
        # The gate's gradient is a sum that cancels: allow one float32 rounding of its terms for the order of summation.
        product = rows.inputs["x"].double().abs() * rows.grad_out.double().abs()
        terms = product.sum_to_size(true.shape) if name == "dgate" and true.ndim else None
        if name == "dgate" and terms is None:
            terms = product.sum()
        assert_as_accurate(f"{case} {name}", got[name], plain[name], true, terms=terms)


CASES = {
    "flamingo": ((61, 96), (1,)),
    "scalar": ((7, 33), ()),
    "channels": ((61, 96), (96,)),
    "heads": ((45, 3, 40), (3, 1)),
    "samples_and_heads": ((2, 11, 4, 16), (4, 1)),
    "many_strips": ((1500, 72), (72,)),
    "many_strips_of_heads": ((500, 3, 72), (3, 1)),
    "vector": ((37,), (37,)),
    "one_channel": ((9, 1), (1,)),
    "one": ((1, 1), ()),
    "wide": ((3, 1300), (1300,)),
}


# Sums over several strips are in float32 for every dtype: the interpreter tests one.
STRIPS = ("many_strips", "many_strips_of_heads")


@backends.every
@backends.every_dtype
def test_against_float64(dtype, backend):
    backends.need("attention", backend, dtype)
    for case, (shape, gate) in CASES.items():
        if case not in STRIPS or dtype == torch.float32 or not backends.interpreted(backend):
            assert_right(gated_rows(shape, gate, dtype=dtype), backend, case)


@backends.every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_residual(dtype, backend):
    backends.need("attention", backend, dtype)
    for case in ("flamingo", "channels", "heads"):
        assert_right(gated_rows(*CASES[case], dtype=dtype, residual_dtype=torch.float32), backend, case)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_device(dtype, device):
    backends.need("attention", "triton", dtype, device)
    for case, (shape, gate) in CASES.items():
        longer = shape if case in ("vector", "one") else (8 * shape[0], *shape[1:])
        for residual_dtype in {dtype, torch.float32}:
            for size in {shape, longer}:
                rows = gated_rows(size, gate, dtype=dtype, residual_dtype=residual_dtype)
                assert_right(rows, "triton", (case, size, residual_dtype), device)
    for scale in (0.0, 1e-3, 0.3, 30.0):
        assert_right(gated_rows((400, 640), (640,), gate_scale=scale, dtype=dtype), "triton", scale, device)


@backends.every
def test_gates_from_closed_to_saturated(backend):
    backends.need("attention", backend)
    for scale in (0.0, 1e-3, 0.3, 30.0):
        rows = gated_rows((40, 64), (64,), gate_scale=scale)
        assert_right(rows, backend, scale)
        if scale == 0.0:
            assert torch.equal(gated_residual(**rows.inputs, backend=backend), rows.inputs["residual"])


@backends.every
def test_strides_and_empty(backend):
    backends.need("attention", backend)
    wide = torch.randn(9, 2, 32)
    residual, x, gate = wide[:, 0], wide[:, 1], torch.randn(32)
    expected = gated_residual(residual.contiguous(), x.contiguous(), gate, backend=backend)
    assert torch.equal(gated_residual(residual, x, gate, backend=backend), expected)
    columns = torch.stack([x, x], -1)[..., 1]
    assert torch.equal(gated_residual(residual.T.contiguous().T, columns, gate, backend=backend), expected)
    for shape, gates in (((0, 4), (4,)), ((3, 0), ()), ((0, 2, 4), (2, 1))):
        empty, zero = torch.zeros(shape, requires_grad=True), torch.zeros(gates, requires_grad=True)
        out = gated_residual(empty, empty, zero, backend=backend)
        assert out.shape == shape
        assert not torch.autograd.grad(out.sum(), zero)[0].any()


def test_same_bits_with_any_number_of_threads():
    backends.need("attention", "native")
    threads = torch.get_num_threads()
    for gate in ((72,), ()):
        rows, results = gated_rows((1500, 72), gate), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(differentiate(rows, lambda **kwargs: gated_residual(**kwargs, backend="native")))
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(other[name], results[0][name]) for name in other)


backend = backends.fixture("attention")


def test_opcheck(backend):
    residual, x = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    for gate, by_column in ((torch.randn(8, requires_grad=True), True), (torch.randn(3, requires_grad=True), False)):
        torch.library.opcheck(OPS.attention_gated_residual_fwd.default, (residual, x, gate, by_column, backend))
        inputs = (torch.randn(6, 8), x.detach(), gate.detach(), by_column, backend)
        torch.library.opcheck(OPS.attention_gated_residual_bwd.default, inputs)


def test_compile_functorch_and_checkpoint(backend):
    def loss(residual, x, gate):
        return gated_residual(residual, x, gate, backend=backend).pow(3).sum()

    inputs = [torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)]
    inputs.append(torch.randn(8, requires_grad=True))
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got in (
        torch.autograd.grad(compiled(*inputs), inputs),
        torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in inputs)),
        torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False), inputs),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


R, X, G = torch.randn(5, 3, 8), torch.randn(5, 3, 8), torch.zeros(8)
BAD = {
    "residual": [
        (dict(residual=None), TypeError, r"residual: expected \[..., C\] floating point, got None"),
        (dict(residual=torch.zeros(())), ValueError, "residual: expected at least one dimension"),
    ],
    "x": [
        (dict(x=X[:4]), ValueError, r"x: expected \[5, 3, 8\] float32 or bfloat16 or float16, got \[4, 3, 8\]"),
        (dict(x=X.double()), TypeError, "x: expected .*, got .*float64"),
        (dict(residual=R.bfloat16()), TypeError, r"x: expected \[5, 3, 8\] bfloat16, got .*float32"),
    ],
    "gate": [
        (dict(gate=0.5), TypeError, r"gate: expected \[\], \[1\] or \[8\], or \[3, 1\] float32, got 0.5"),
        (dict(gate=torch.zeros(3)), ValueError, "gate: expected"),
        (dict(gate=torch.zeros(5, 1, 1)), ValueError, "gate: expected"),
        (dict(gate=torch.zeros(8).bfloat16()), TypeError, "gate: expected .* float32, got .*bfloat16"),
    ],
    "backend": [
        (dict(backend="cudnn"), ValueError, "backend: expected None or one of"),
    ],
}


@pytest.mark.parametrize("argument", BAD)
def test_a_mistake_is_named(argument):
    given = dict(residual=R, x=X, gate=G)
    named.mistakes(
        *((lambda wrong=wrong: gated_residual(**(given | wrong)), *expected) for wrong, *expected in BAD[argument])
    )

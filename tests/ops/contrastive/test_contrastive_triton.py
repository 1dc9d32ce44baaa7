"""Triton's ops against the float64 oracle: several tiles and superblocks each way.

On a GPU if there is one, else in the interpreter.
"""

from itertools import product

import backends
import named
import pytest
import torch
from torch import Tensor

from mmkernels.ops.contrastive import reference
from mmkernels.ops.contrastive.types import LSE, Need, Pairs, Teacher
from mmkernels.testing import assert_as_accurate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")

from mmkernels.ops.contrastive import (  # noqa: E402
    triton_bwd,
    triton_fwd,
    triton_gradients,
    triton_search,
    triton_sigmoid,
    triton_tile,
)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

N, M, E, F = 150, 170, 24, 10


@pytest.fixture(autouse=True)
def _served():
    backends.need("contrastive", "triton", device=DEVICE.type)


def drawn(*shape, seed):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(low, high, count, seed):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


X, Y = drawn(N, E, seed=0), drawn(M, E, seed=1)
TEACHER = drawn(N, F, seed=2), drawn(M, F, seed=3)
TARGETS = integers(-1, M, N, seed=4)  # several in one column, none in others
IDS = integers(0, 20, N, seed=5), integers(0, 25, M, seed=6)  # some rows and columns have no positive

# name -> scale, pairs, teacher, totals, columns
RULES = {
    "targets": (3.0, Pairs(TARGETS), False, False, True),
    "targets, negative scale": (-3.0, Pairs(TARGETS), False, True, True),
    "targets, scale 0": (0.0, Pairs(TARGETS), False, True, True),
    "targets, large scale": (300.0, Pairs(TARGETS), False, False, True),
    "ids, teacher": (3.0, Pairs(None, *IDS), True, True, True),
    "ids, one way": (3.0, Pairs(None, *IDS), False, False, False),
    "ignored, teacher": (3.0, Pairs(TARGETS, *IDS, "ignore"), True, True, True),
    "ignored, teacher, one way": (-3.0, Pairs(TARGETS, *IDS, "ignore"), True, False, False),
    "ignored without targets": (3.0, Pairs(None, *IDS, "ignore"), False, True, True),
    "nothing is positive": (3.0, Pairs(), False, False, False),
    "nothing is seen": (
        3.0,
        Pairs(None, integers(0, 1, N, seed=0), integers(0, 1, M, seed=0), "ignore"),
        False,
        True,
        True,
    ),
}


def wide(values):
    def convert(x):
        if isinstance(x, Teacher):
            return Teacher(*wide(x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(convert(x) for x in values)


def teacher_of(name):
    scale, rule, of_teacher, _, columns = RULES[name]
    if not of_teacher:
        return None
    rows, of_columns = reference.softmax_fwd(*wide((*TEACHER, number(scale))), rule, None, None, False, columns)
    return Teacher(*TEACHER, rows[LSE], of_columns[LSE] if columns else None)


@pytest.mark.parametrize("name", RULES)
def test_statistics(name):
    scale, rule, _, totals, columns = RULES[name]
    arguments = (X, Y, number(scale), rule, teacher_of(name), None, totals, columns)
    ours, truth = triton_fwd.softmax_fwd(*arguments), reference.softmax_fwd(*wide(arguments))
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6 * max(1, abs(scale)))


@pytest.mark.parametrize("name", RULES)
def test_gradients(name, monkeypatch):
    """In one superblock, and in several."""
    for size, dtype in product((4096, 80), (torch.float32, torch.float16)):
        monkeypatch.setattr(triton_gradients, "SUPERBLOCK", size)
        with named.case(f"superblocks of {size}", dtype):
            judge_gradients(name, dtype)


def judge_gradients(name, dtype):
    scale, rule, _, _, columns = RULES[name]
    inputs, teacher = (X.to(dtype), Y.to(dtype), number(scale)), teacher_of(name)
    if teacher is not None:
        teacher = Teacher(*(features.to(dtype) for features in teacher[:2]), *teacher[2:])
    of_rows, of_columns = reference.softmax_fwd(*wide(inputs), rule, None, None, False, columns)
    # As small as for a mean over many rows: in float16 they would underflow to 0.
    coefficients = 1e-7 * drawn(4, N, seed=7).double(), 1e-7 * drawn(4, M if columns else 0, seed=8).double()
    arguments = (*coefficients, *inputs, of_rows[LSE], of_columns[LSE], rule, teacher, None, Need(True, True))
    truth = reference.softmax_bwd(*wide(arguments))
    plain = reference.softmax_bwd(*arguments)
    for what, got, same_dtype, exact in zip("xy", triton_bwd.softmax_bwd(*arguments), plain, truth, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            assert_as_accurate(f"{name}: d{what}", got, same_dtype, exact)
        else:  # the oracle rounds only the result, a subnormal to 2^-25; the kernels round G too
            assert (got.double() - exact).abs().max() <= 1e-3 * exact.abs().max() + 2.0**-25


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_sides_without_rows(sizes):
    n, m = sizes
    x, y, scale = X[:n], Y[:m], number(2.0)
    zeros = X.new_zeros(n).long(), X.new_zeros(m).long()
    for rule in (Pairs(zeros[0]), Pairs(None, *zeros)):
        arguments = (x, y, scale, rule, None, None, True, True)
        ours, truth = triton_fwd.softmax_fwd(*arguments), reference.softmax_fwd(*wide(arguments))
        for got, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(got, expected)
        coefficients = X.new_ones(4, n).double(), X.new_ones(4, m).double()
        lse = ours[0][LSE], ours[1][LSE]
        arguments = (*coefficients, x, y, scale, *lse, rule, None, None, Need(True, True))
        for got, expected in zip(triton_bwd.softmax_bwd(*arguments), reference.softmax_bwd(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
        bias = number(-1.0)
        got = triton_sigmoid.sigmoid_fwd(x, y, scale, bias, rule)
        torch.testing.assert_close(got, reference.sigmoid_fwd(x, y, scale, bias, rule), rtol=1e-6, atol=1e-6)
        assert triton_search.sample_negatives(x, y, scale, number([1, 2], torch.int64), rule).tolist() == [-1] * n


@pytest.mark.parametrize("ids", [False, True])
def test_sigmoid_over_several_superblocks(ids, monkeypatch):
    monkeypatch.setattr(triton_gradients, "SUPERBLOCK", 80)
    rule = Pairs(None, *IDS) if ids else Pairs(TARGETS)
    inputs = (X, Y, number(3.0), number(-2.0), rule)
    torch.testing.assert_close(
        triton_sigmoid.sigmoid_fwd(*inputs), reference.sigmoid_fwd(*wide(inputs)), rtol=2e-6, atol=1e-4
    )
    grad = number(1e-3, torch.float64)
    truth = reference.sigmoid_bwd(grad, *wide(inputs), Need(True, True))
    for got, expected in zip(triton_sigmoid.sigmoid_bwd(grad, *inputs, Need(True, True)), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_a_gradient_nobody_needs_is_not_formed():
    scale, rule, *_ = RULES["targets"]
    of_rows, of_columns = reference.softmax_fwd(X, Y, number(scale), rule, None, None, False, True)
    coefficients = X.new_ones(4, N).double(), X.new_ones(4, M).double()
    arguments = (*coefficients, X, Y, number(scale), of_rows[LSE], of_columns[LSE], rule, None, None)
    both = triton_bwd.softmax_bwd(*arguments, Need(True, True))
    for need in (Need(True, False), Need(False, True), Need(False, False)):
        for alone, together, needed in zip(triton_bwd.softmax_bwd(*arguments, need), both, need, strict=True):
            assert torch.equal(alone, together if needed else together[:0])


def test_topk_of_more_than_one_pass_and_split():
    values, indices = triton_search.topk_similar(X[:3], Y, 140)
    expected = reference.topk_similar(X[:3].double(), Y.double(), 140)
    torch.testing.assert_close(values.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("ids", [False, True])
def test_sampling(ids):
    rule = Pairs(None, *IDS) if ids else Pairs(TARGETS)
    arguments = (X, Y, number(0.5), number([7, 2**32 - 1], torch.int64), rule)
    drawn_here, expected = triton_search.sample_negatives(*arguments), reference.sample_negatives(*wide(arguments))
    assert (drawn_here == expected).double().mean() > 0.99  # except for rounding ties
    assert torch.equal(drawn_here, triton_search.sample_negatives(*arguments))


def test_an_lse_keeps_its_digits():
    """Rounding to float32 would add an error of half its last place to a whole row of the softmax."""
    lse = 30 * torch.rand(300, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(DEVICE)
    for value in (14.3, -3.0, 0.0, 1e-6):
        scale = number(value)
        ref, rest = triton_tile.lines_of(lse, scale, 300).double()
        bound = 2.0**-48 if value != 0 else 2.0**-24
        assert ((scale.double() * ref + rest - lse).abs() <= bound * lse.abs() + 1e-14).all(), value
        assert triton_tile.lines_of(torch.full_like(lse, -torch.inf), scale, 300)[1].eq(torch.inf).all()

"""First and second derivatives of the packing ops, in reverse and forward mode, against finite differences."""

import functools

import backends
import pytest
import torch
from derivatives import assert_differentiable_twice

from mmkernels import embed_splice, maxsim, pack, pad, patchify, segment_pool, unpack, unpad, unpatchify

CU = torch.tensor([0, 3, 3, 9, 12], dtype=torch.int32)
CU_Q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
INDEX = torch.tensor([0, 3, 3, -1, 2])
TOKENS, PLACES = torch.tensor([0, 1, 9, 2, 9, 1]), torch.tensor([2, 4])
KEEP = torch.tensor([[True, False, True], [True, True, False]])
LENGTHS = torch.tensor([2, 0, 3])  # 5 rows
GRID = [(1, 1, 2), (1, 2, 2)]
MODES = ("mean", "sum", "first", "max")

# name -> (function of its inputs and backend, shapes of the inputs)
CASES = {
    **{f"segment_pool, {m}": (functools.partial(segment_pool, cu_seqlens=CU, mode=m), [(12, 3)]) for m in MODES},
    "segment_pool, weighted": (lambda x, w, **b: segment_pool(x, CU, "weighted", weights=w, **b), [(12, 3), (12,)]),
    **{
        f"maxsim, {r}": (functools.partial(maxsim, cu_seqlens_q=CU_Q, cu_seqlens_k=CU, reduction=r), [(6, 3), (12, 3)])
        for r in ("sum", "mean")
    },
    "maxsim in blocks": (lambda x, y, **b: maxsim(x, y, CU_Q, CU, block=4, **b), [(6, 3), (12, 3)]),
    "pack": (lambda x, y, **b: pack([x, y], INDEX, **b), [(2, 3), (2, 3)]),
    "pack, an empty source": (lambda x, y, **b: pack([x, x[2:], y], INDEX, **b), [(2, 3), (2, 3)]),
    "unpack": (lambda x, **b: unpack(x, INDEX, 5, **b), [(5, 3)]),
    "unpack, spare rows": (lambda x, **b: unpack(x, INDEX, 7, **b), [(5, 3)]),
    "pad": (lambda x, **b: pad(x, CU, **b), [(12, 3)]),
    "unpad": (lambda x, **b: unpad(x, KEEP, **b)[0], [(2, 3, 4)]),
    "unpad, lengths and spare rows": (lambda x, **b: unpad(x, LENGTHS, 7, **b)[0], [(3, 3, 4)]),
    "embed_splice": (lambda t, f, **b: embed_splice(TOKENS, t, f, PLACES, **b), [(3, 2), (2, 2)]),
    "patchify": (lambda x, y, **b: patchify([x, y], 2, **b)[0], [(2, 2, 4), (2, 4, 4)]),
    "unpatchify": (lambda x, **b: tuple(unpatchify(x, GRID, 2, **b)), [(6, 8)]),
}


backend = backends.fixture("packing", ("native", "reference"))  # Triton has no float64, which finite differences need


@pytest.mark.parametrize("name", CASES)
def test_twice_and_forward(name, backend):
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert_differentiable_twice(functools.partial(function, backend=backend), *inputs, fast_mode=False)


def test_gradient_penalty_trains():
    """With the penalty, the parameters of a pooled tower get other gradients than without."""
    x, weight = torch.randn(12, 3, requires_grad=True), torch.randn(3, 1, requires_grad=True)
    score = segment_pool((x @ weight).tanh(), CU).sum()
    (grad,) = torch.autograd.grad(score, x, create_graph=True)
    plain = torch.zeros(4, 1).index_add(0, torch.tensor([0] * 3 + [2] * 6 + [3] * 3), (x @ weight).tanh())
    expected_score = (plain / torch.tensor([[3.0], [1], [6], [3]])).sum()
    (expected,) = torch.autograd.grad(expected_score, x, create_graph=True)
    ours, theirs = (torch.autograd.grad(g.square().sum(), weight)[0] for g in (grad, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0


def test_padding_row_is_constant_in_forward_mode_too():
    table, tangent = torch.randn(2, 3, 2).unbind()
    features = torch.zeros(2, 2)
    splice = functools.partial(embed_splice, TOKENS, features=features, dst_index=PLACES, padding_idx=1)
    _, moved = torch.func.jvp(lambda table: splice(table), (table,), (tangent,))
    assert moved[[1, 2, 4, 5]].abs().sum() == 0
    torch.testing.assert_close(moved[[0, 3]], tangent[[0, 2]])

"""The ops under opcheck, torch.compile, functorch and checkpointing; bad input."""

import backends
import pytest
import torch
from torch import Tensor

import mmkernels.ops.packing.op  # noqa: F401  (registers torch.ops.mmkernels.packing_*)
from mmkernels.ops.packing import (
    embed_splice,
    maxsim,
    mrope_position_ids,
    pack,
    pad,
    patchify,
    segment_pool,
    unpack,
    unpad,
    unpatchify,
)
from mmkernels.runtime.backends import BackendError
from mmkernels.testing.packing import cu_seqlens_of

MODES = ["sum", "mean", "max", "first"]
INDEX = torch.tensor([3, -1, 0, 3, 5])
CU_SEQLENS = cu_seqlens_of([2, 0, 3])
TOKEN_IDS, DST_INDEX = torch.tensor([3, 0, 9, 3, 1]), torch.tensor([2, -1])


backend = backends.fixture("packing")


def test_opcheck(backend):
    ops = torch.ops.mmkernels
    x = torch.randn(6, 4, requires_grad=True)
    torch.library.opcheck(ops.packing_gather_fwd.default, (x, None, None, None, INDEX, backend))
    sources = [x[:3].detach().requires_grad_(), x[3:4], x[4:].detach().requires_grad_(), None]
    torch.library.opcheck(ops.packing_gather_fwd.default, (*sources, INDEX, backend))
    torch.library.opcheck(ops.packing_scatter_fwd.default, (x[:5], INDEX, 7, backend))
    for mode in MODES:
        torch.library.opcheck(ops.packing_segment_pool_fwd.default, (x, CU_SEQLENS, mode, backend))
        argmax = ops.packing_segment_pool_fwd(x, CU_SEQLENS, mode, backend)[1]
        grad = torch.randn(3, 4)
        torch.library.opcheck(ops.packing_segment_pool_bwd.default, (grad, CU_SEQLENS, argmax, 6, mode, backend))
    weights = torch.randn(6, requires_grad=True)
    torch.library.opcheck(ops.packing_weighted_pool_fwd.default, (x, weights, CU_SEQLENS, backend))
    torch.library.opcheck(
        ops.packing_weighted_pool_bwd.default, (torch.randn(3, 4), x.detach(), weights.detach(), CU_SEQLENS, backend)
    )
    features = torch.randn(2, 4, requires_grad=True)
    for padding_idx in (None, 0):
        splice = (x, features, TOKEN_IDS, DST_INDEX, padding_idx, backend)
        torch.library.opcheck(ops.packing_embed_splice_fwd.default, splice)
    for image in (torch.randn(2 * 3 * 4 * 2, requires_grad=True), torch.randn(6, 8, requires_grad=True)):
        cut = (image, torch.tensor([[1, 2, 1], [2, 1, 2]]), 2, 2, 1, 1, image.ndim == 2, backend)
        torch.library.opcheck(ops.packing_patchify_fwd.default, cut)
    best, winners = ops.packing_maxsim_fwd(x, x.detach().flip(0), CU_SEQLENS, 2, backend)
    torch.library.opcheck(ops.packing_maxsim_fwd.default, (x, x.detach().flip(0), CU_SEQLENS, 2, backend))
    weights = best.detach().requires_grad_()
    torch.library.opcheck(ops.packing_winners_dot_fwd.default, (x, x.detach(), winners, backend))
    torch.library.opcheck(ops.packing_winners_gather_fwd.default, (weights, x, winners, backend))
    torch.library.opcheck(ops.packing_winners_scatter_fwd.default, (weights, x, winners, 6, backend))
    spans = (torch.tensor([0, 9, 14]), torch.tensor([1, 4]), torch.tensor([[1, 1, 2], [2, 2, 1]]))
    torch.library.opcheck(ops.packing_mrope_fwd.default, (*spans, torch.tensor([0, 0, -2]), None, 15, backend))
    cut = ([torch.randn(1, 2, 4, 2), torch.randn(2, 2, 2, 4)], torch.tensor([[1, 2, 1], [2, 1, 2]]), 2, 2, 1, 1)
    torch.library.opcheck(ops.packing_patchify_images_fwd.default, (*cut, backend))


def functions(backend: str):
    """name -> a differentiable function of x [6, 4] that returns one tensor."""
    table = {
        "pack": lambda x: pack(x, INDEX, backend=backend),
        "unpack": lambda x: unpack(x[:5], INDEX, 7, backend=backend),
        "pad": lambda x: pad(x, CU_SEQLENS, 4, backend=backend),
        "unpad": lambda x: unpad(x.reshape(2, 3, 4), torch.tensor([1, 3]), 5, backend=backend)[0],
        "sources": lambda x: pack([x[:2], x[2:2], x[2:]], INDEX, backend=backend),
        "embed_splice": lambda x: embed_splice(TOKEN_IDS, x[:4], x[4:], DST_INDEX, backend=backend),
        "padding_idx": lambda x: embed_splice(TOKEN_IDS, x[:4], x[4:], DST_INDEX, padding_idx=3, backend=backend),
        "weighted": lambda x: segment_pool(x, CU_SEQLENS, "weighted", weights=x[:, 0].sin(), backend=backend),
        "maxsim": lambda x: maxsim(x, 1.5 - x.flip(0), CU_SEQLENS, CU_SEQLENS, block=4, backend=backend),
        "patchify": lambda x: patchify([x.reshape(1, 6, 4), x[2:].reshape(1, 4, 4)], 2, backend=backend)[0],
        "unpatchify": lambda x: unpatchify(x, [(1, 2, 1), (2, 1, 2)], 2, backend=backend)[1],
    }
    for mode in MODES:
        table[mode] = lambda x, mode=mode: segment_pool(x, CU_SEQLENS, mode, backend=backend)
    return table


def test_fullgraph_compile(backend):
    """All functions in one graph, with eager mode's values and gradients."""
    table = functions(backend)

    def losses(x):
        return {name: function(x).square().sum() for name, function in table.items()}

    torch.compiler.reset()
    x = torch.randn(6, 4, requires_grad=True)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=False)
    training, inference = compiled(x), compiled(x.detach())
    for name, expected in losses(x).items():
        got = training[name]
        assert torch.equal(got, expected), name
        assert torch.equal(inference[name], expected), name
        (gradient,) = torch.autograd.grad(got, x, retain_graph=True)
        assert torch.equal(gradient, torch.autograd.grad(expected, x)[0]), name


def test_compile_with_dynamic_shapes(backend):
    def loss(x, index, cu_seqlens):
        moved = unpack(pack(x, index, backend=backend), index, x.shape[0], backend=backend).sum()
        scores = maxsim(x, x.flip(0), cu_seqlens, cu_seqlens, backend=backend).sum()
        return moved + scores + segment_pool(x, cu_seqlens, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9, 14):
        x = torch.randn(rows, 4, requires_grad=True)
        arguments = (torch.randint(-1, rows, (rows + 2,)), cu_seqlens_of([rows - 3, 0, 3]))
        expected, got = loss(x, *arguments), compiled(x, *arguments)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (got, expected)))


def test_functorch(backend):
    for name, function in functions(backend).items():

        def loss(x, function=function):
            return function(x).square().sum()

        x = torch.randn(3, 6, 4, requires_grad=True)
        (expected,) = torch.autograd.grad(sum(loss(row) for row in x), x)
        assert torch.equal(torch.func.grad(loss)(x[0].detach()), expected[0]), name
        assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x.detach()), expected), name
        out, pull = torch.func.vjp(function, x[0].detach())
        assert torch.equal(pull(2 * out)[0], expected[0]), name


def test_bare_ops_differentiate(backend):
    x = torch.randn(6, 4, requires_grad=True)
    torch.ops.mmkernels.packing_gather_fwd(x, None, None, None, INDEX, backend).sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 0, 2, 0, 1]


def test_checkpoint_and_saved_tensors(backend):
    x = torch.randn(6, 4, requires_grad=True)

    def run(x):
        return segment_pool(pack(x, INDEX, backend=backend), CU_SEQLENS, "max", backend=backend)

    run(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


# Bad input: argument, what was expected, what came.

X = torch.zeros(6, 4)
BAD = [
    (lambda: pack([1.0], INDEX), TypeError, r"sources\[0\]: expected \[R, ...\] floating point, got 1.0"),
    (
        lambda: pack([], INDEX),
        TypeError,
        "sources: expected a tensor or a sequence of at least one tensor",
    ),
    (lambda: pack(X.long(), INDEX), TypeError, r"sources: expected .* got \[6, 4\] int64 on cpu"),
    (lambda: pack(X.sum(), INDEX), ValueError, r"sources: expected \[R, ...\] floating point, got \[\]"),
    (lambda: pack([X, X[:, :2]], INDEX), ValueError, r"sources\[1\]: expected rows like those of sources"),
    (lambda: pack(X, INDEX.float()), TypeError, r"index: expected \[T\] int64, got \[5\] float32"),
    (lambda: pack(X, INDEX[None]), ValueError, r"index: expected \[T\] int64, got \[1, 5\] int64"),
    (lambda: pack(X, INDEX.to("meta")), ValueError, r"index: expected \[T\] int64 on cpu, got .* on meta"),
    (lambda: pack(X[:5], INDEX), ValueError, r"index: expected each in \[-1, 5\), got 5 at position 4"),
    (lambda: pack(X, INDEX - 1), ValueError, r"index: expected each in \[-1, 6\), got -2 at position 1"),
    (lambda: unpack(X, INDEX), ValueError, "index: expected one entry for each of the 6 packed rows"),
    (
        lambda: unpack(X[:5], INDEX, 4),
        ValueError,
        r"index: expected each in \[-1, 4\), got 5 at position 4",
    ),
    (lambda: unpack(X[:5], INDEX, -1), ValueError, "rows: expected sizes >= 0, got -1"),
    (lambda: segment_pool(X, CU_SEQLENS.float()), TypeError, r"cu_seqlens: expected \[S\+1\] int32"),
    (lambda: segment_pool(X, CU_SEQLENS[:0]), ValueError, "cu_seqlens: .* at least one entry"),
    (
        lambda: segment_pool(X, CU_SEQLENS + 1),
        ValueError,
        r"start at 0 and end within \[0, 6\], got 1 ... 6",
    ),
    (
        lambda: segment_pool(X, CU_SEQLENS * 2),
        ValueError,
        r"start at 0 and end within \[0, 6\], got 0 ... 10",
    ),
    (
        lambda: segment_pool(X, torch.tensor([0, 4, 3, 6])),
        ValueError,
        "cu_seqlens: expected non-decreasing entries, got 4, 3 at 1",
    ),
    (
        lambda: segment_pool(X, CU_SEQLENS, "median"),
        ValueError,
        "mode: expected one of sum, mean, max, first, weighted",
    ),
    (
        lambda: pad(X, CU_SEQLENS, 2),
        ValueError,
        "max_seqlen: expected at least the longest segment, got 2",
    ),
    (
        lambda: unpad(X, CU_SEQLENS),
        ValueError,
        r"keep: expected a mask \[6, 4\] bool or lengths \[6\] int64",
    ),
    (lambda: unpad(X, torch.ones(6, 4)), TypeError, r"keep: expected a mask \[6, 4\] bool"),
    (lambda: unpad(X, torch.full((6,), 5)), ValueError, r"keep: expected lengths in \[0, 4\]"),
    (lambda: unpad(X, torch.full((6,), 2), 11), ValueError, "total: expected at least .* got 11"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_serve():
    with pytest.raises(BackendError, match=r"native: .*\n.*triton: .*\n.*reference: supported"):
        pack(X.double(), INDEX, backend="triton")
    with pytest.raises(ValueError, match="backend: expected None or one of native, triton, reference, got 'cuda'"):
        pack(X, INDEX, backend="cuda")


@pytest.mark.gpu
def test_no_host_sync():
    """Forward and backward of every function enqueue their work and return."""
    x = torch.randn(64, 8, device="cuda", requires_grad=True)
    index = torch.randint(-1, 64, (80,), device="cuda")
    cu_seqlens = cu_seqlens_of([10, 0, 54], "cuda")
    keep = cu_seqlens.diff()
    token_ids, dst_index = torch.randint(0, 64, (80,), device="cuda"), torch.randperm(80, device="cuda")[:20]
    grid_thw, starts = torch.tensor([[1, 4, 4], [2, 2, 2]], device="cuda"), torch.tensor([3, 20], device="cuda")

    def run() -> Tensor:
        pooled = sum(segment_pool(x, cu_seqlens, mode).sum() for mode in MODES)
        packed = pack(x, index)
        padded = pad(x, cu_seqlens, 60)
        pooled += maxsim(x, x.detach(), cu_seqlens, cu_seqlens, block=20).sum()
        pooled += segment_pool(x, cu_seqlens, "weighted", weights=x[:, 0]).sum()
        pooled += embed_splice(token_ids, x, x[:20], dst_index, padding_idx=0).sum() + pack([x, x[:9], x], index).sum()
        tokens, _ = patchify([x.reshape(2, 16, 16), x[:32].reshape(2, 8, 16)], 4)
        pooled += tokens.sum() + unpatchify(tokens, [(1, 4, 4), (1, 2, 4)], 4)[0].sum()
        mrope_position_ids(cu_seqlens, grid_thw, starts, 70)
        return pooled + unpack(packed, index, 64).sum() + unpad(padded, keep, 64)[0].sum()

    run().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_bounds_on_a_gpu_when_asked_for(monkeypatch):
    monkeypatch.setenv("MMKERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"index: expected each in \[-1, 6\), got 6 at position 0"):
        pack(X.cuda(), torch.tensor([6], device="cuda"))

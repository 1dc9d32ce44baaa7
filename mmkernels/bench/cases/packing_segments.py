"""Packing's ops on segments: `segment_pool` and `pad`."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmkernels.bench.case import Case, Inputs, Work
from mmkernels.bench.cases.packing_rows import QUICK, WIDE, Params, bytes_moved, large, rows_of, with_gradient
from mmkernels.ops.packing import pad, segment_pool
from mmkernels.testing.lengths import lengths_like


def setup_pool(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    lengths, _ = lengths_like("caption@4096", max(1, rows // 256))
    ends = np.minimum(np.cumsum(lengths), rows)
    ends[-1] = rows
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    grad_out = torch.randn(len(ends), p["E"], device=device).to(x.dtype)
    return {"x": x.requires_grad_(), "cu_seqlens": cu_seqlens, "grad_out": grad_out}


def copy_of_rows(inputs: Inputs) -> tuple[None, None]:
    """The ceiling: a copy, which moves as many bytes as reading the rows and writing their gradient."""
    torch.empty_like(inputs["x"]).copy_(inputs["x"].detach())
    return None, None


def pool(mode: str, inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    return with_gradient(segment_pool(inputs["x"], inputs["cu_seqlens"], mode, backend=backend), inputs)


def pool_in_torch(mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    offsets = inputs["cu_seqlens"].long()
    return with_gradient(torch.segment_reduce(inputs["x"], mode, offsets=offsets), inputs)


def pool_by_index_add(mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """What most trainers write; mean only."""
    x, lengths = inputs["x"], inputs["cu_seqlens"].diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    out = x.new_zeros(len(lengths), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    out = out.index_add(0, segment, x.to(out.dtype)) / lengths.clamp(min=1)[:, None]
    return with_gradient(out.to(x.dtype), inputs)


POOLS = [
    Case(
        name=f"segment_pool {mode} fwd+bwd",
        # Low precision has ties: torch splits their gradient, ours gives it to the first.
        full=(points := [p for p in WIDE if mode == "mean" or p["dtype"] == "float32"]),
        large=large(points),
        quick=QUICK if mode == "mean" else [{**QUICK[0], "dtype": "float32"}],
        gate={"MiB": 1},
        setup=setup_pool,
        ours=partial(pool, mode),
        plain=partial(pool_in_torch, mode),
        others={"copy of the same bytes": copy_of_rows}
        | ({"index_add": partial(pool_by_index_add, mode)} if mode == "mean" else {}),
        baseline=("plain PyTorch", "index_add"),
        outputs=("out", "grad_x"),
        work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
    )
    for mode in ("mean", "max")
]


def weighted(inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    x, weights = inputs["x"], inputs["weights"]
    out = segment_pool(x, inputs["cu_seqlens"], "weighted", weights=weights, backend=backend)
    return out, *torch.autograd.grad(out, [x, weights], inputs["grad_out"])


def weighted_in_torch(inputs: Inputs) -> tuple[Tensor, ...]:
    x, weights = inputs["x"], inputs["weights"]
    rows = (x * weights[:, None]).to(x.dtype)
    out = torch.segment_reduce(rows, "sum", offsets=inputs["cu_seqlens"].long())
    return out, *torch.autograd.grad(out, [x, weights], inputs["grad_out"])


def setup_weighted(p: Params, device: torch.device) -> Inputs:
    inputs = setup_pool(p, device)
    # The gate converts every input to float64.
    return inputs | {"weights": torch.rand(len(inputs["x"]), device=device).requires_grad_()}


def copy_of_three(inputs: Inputs) -> tuple[None, None, None]:
    """The ceiling: half a copy for reading the rows, a whole one for reading them again and writing their gradient."""
    x = inputs["x"].detach()
    half = x[: len(x) // 2]
    torch.empty_like(half).copy_(half)
    torch.empty_like(x).copy_(x)
    return None, None, None


WEIGHTED = Case(
    name="segment_pool weighted fwd+bwd",
    full=WIDE,
    large=large(WIDE),
    quick=QUICK,
    gate={"MiB": 1},
    setup=setup_weighted,
    ours=weighted,
    plain=weighted_in_torch,
    others={"copy of the same bytes": copy_of_three},
    outputs=("out", "grad_x", "grad_weights"),
    work=lambda p: Work(bytes=3 * p["MiB"] * 2**20),
)

# Packed to padded


def setup_pad(p: Params, device: torch.device) -> Inputs:
    inputs = setup_pool(p, device)
    longest = int(inputs["cu_seqlens"].diff().max())
    shape = (len(inputs["cu_seqlens"]) - 1, longest, p["E"])
    return inputs | {"max_seqlen": longest, "grad_padded": torch.randn(shape, device=device).to(inputs["x"].dtype)}


def pad_gradient(out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, [inputs["x"]], inputs["grad_padded"])


def pad_by_index(inputs: Inputs) -> tuple[Tensor, ...]:
    """What flash-attn's bert_padding does."""
    x, cu_seqlens = inputs["x"], inputs["cu_seqlens"].long()
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    at = segment * inputs["max_seqlen"] + torch.arange(len(x), device=x.device) - cu_seqlens[segment]
    out = x.new_zeros(len(lengths) * inputs["max_seqlen"], x.shape[1]).index_copy(0, at, x)
    return pad_gradient(out.view(len(lengths), inputs["max_seqlen"], x.shape[1]), inputs)


def copy_of_padded(inputs: Inputs) -> tuple[None, None]:
    """The ceiling: write the rows and zeros for the padding, then copy the rows back."""
    x, grad = inputs["x"].detach().view(-1), inputs["grad_padded"].view(-1)
    padded = torch.empty_like(grad)
    padded[: len(x)].copy_(x)
    padded[len(x) :].zero_()
    torch.empty_like(x).copy_(grad[: len(x)])
    return None, None


PAD = Case(
    name="pad fwd+bwd",
    full=WIDE,
    large=large(WIDE),
    quick=QUICK,
    gate={"MiB": 1},
    setup=setup_pad,
    ours=lambda inputs, backend: pad_gradient(
        pad(inputs["x"], inputs["cu_seqlens"], inputs["max_seqlen"], backend=backend), inputs
    ),
    plain=pad_by_index,
    others={"copy of the same bytes": copy_of_padded},
    peers={"fbgemm_gpu": "padded"},
    outputs=("out", "grad_x"),
    work=bytes_moved,
)

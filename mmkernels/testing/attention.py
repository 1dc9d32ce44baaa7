"""Attention inputs, and plain PyTorch's attention to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from mmkernels.ops.attention import AttentionMask

__all__ = ["MASKS", "AttentionInputs", "Gradients", "cu_seqlens", "dense_mask", "make_inputs", "plain", "run"]


def cu_seqlens(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Boundaries of segments of these lengths: int32 [S+1]."""
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32, device=device
    )


@dataclass(frozen=True)
class AttentionInputs:
    """q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], their mask, and gradients of out [Tq, H, Dv] and lse [H, Tq]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: torch.Tensor
    mask: AttentionMask | None = None
    scale: float | None = None

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in another dtype (float64 for the truth)."""
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v, grad_out = (x.to(dtype) for x in (self.q, self.k, self.v, self.grad_out))
        return replace(self, q=q, k=k, v=v, grad_out=grad_out, grad_lse=self.grad_lse.to(lse_dtype))


@dataclass(frozen=True)
class Gradients:
    """What one run gives, by name."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor

    def items(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, getattr(self, name)) for name in ("out", "lse", "dq", "dk", "dv")]


@dataclass(frozen=True)
class MaskCase:
    """Lengths of the query and key segments, and the mask over them; `dense` defines it independently."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] = ()
    build: Callable[[torch.Tensor, torch.Tensor], AttentionMask | None] = AttentionMask.packed
    options: dict[str, object] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, int]:
        return sum(self.lengths_q), sum(self.lengths_k or self.lengths_q)

    def mask(self, device: torch.device | str = "cpu") -> AttentionMask | None:
        lengths_k = self.lengths_k or self.lengths_q
        return self.build(cu_seqlens(self.lengths_q, device), cu_seqlens(lengths_k, device), **self.options)


MASKS = {
    "dense": MaskCase((150,), (203,), lambda cu_q, cu_k: None),
    "packed": MaskCase((5, 70, 0, 1, 130, 33)),
    "packed_causal": MaskCase((5, 70, 0, 1, 130, 33), options={"causal": True}),
    "cross": MaskCase((40, 0, 7, 100, 12), (3, 90, 0, 110, 17)),
    "cross_causal": MaskCase((40, 20, 7, 100), (30, 90, 0, 110), options={"causal": True}),
    "window": MaskCase((120, 75), options={"causal": True, "window": 17}),
    "tiny": MaskCase((4, 3, 1, 0, 2, 5) * 11),
    "single": MaskCase((1,)),
}


def make_inputs(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 32,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    amplitude: float = 1.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Normal inputs; `amplitude` multiplies q, and so the logits."""
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    q, k, v = normal(tokens_q, heads, dim), normal(tokens_k, kv_heads, dim), normal(tokens_k, kv_heads, dim_v)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_out, grad_lse = normal(tokens_q, heads, dim_v), normal(heads, tokens_q, of=lse_dtype)
    return AttentionInputs(q * amplitude, k, v, grad_out, grad_lse, mask, scale)


def dense_mask(x: AttentionInputs) -> torch.Tensor:
    """bool [Tq, Tk]."""
    size = x.q.shape[0], x.k.shape[0]
    return torch.ones(size, dtype=torch.bool, device=x.q.device) if x.mask is None else x.mask.to_dense(*size)


def _differentiate(
    x: AttentionInputs, call: Callable[..., tuple[torch.Tensor, torch.Tensor]], with_lse: bool
) -> Gradients:
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = call(q, k, v)
    outputs, grads = [out], [x.grad_out]
    if with_lse:
        outputs.append(lse)
        grads.append(torch.where(torch.isfinite(lse), x.grad_lse, 0.0).to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(outputs, [q, k, v], grads)
    return Gradients(out.detach(), lse.detach(), dq, dk, dv)


def run(x: AttentionInputs, backend: str | None = None, *, with_lse: bool = False) -> Gradients:
    """Our op, forward and backward; `with_lse` lets a gradient flow into lse too."""
    from mmkernels.ops.attention import attention

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = attention(q, k, v, x.mask, scale=x.scale, return_lse=True, backend=backend)
        assert isinstance(out, tuple)
        return out

    return _differentiate(x, call, with_lse)


def plain(x: AttentionInputs, *, with_lse: bool = False) -> Gradients:
    """`F.scaled_dot_product_attention` with the equivalent dense mask, in x's dtype; lse by logsumexp of the scores.

    A row that sees no key, undefined there, is given all keys and then replaced by zeros. Head dims are padded with
    zeros to one size, for SDPA has no fused kernel for others and would go through float32 matrices instead.
    """
    mask = dense_mask(x)
    seen = mask.any(1)
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    lse_dtype = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    width = max(x.q.shape[-1], x.v.shape[-1])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group, dim_v = q.shape[1] // k.shape[1], v.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        query, key, value = (F.pad(t, (0, width - t.shape[2])).transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | ~seen[:, None], scale=scale)
        out = torch.where(seen[:, None, None], out[0].transpose(0, 1)[..., :dim_v], 0.0)
        scores = query[0].to(lse_dtype) @ key[0].to(lse_dtype).mT * scale
        lse = torch.logsumexp(scores.masked_fill(~mask & seen[:, None], -torch.inf), -1)
        return out, torch.where(seen, lse, -torch.inf)

    return _differentiate(x, call, with_lse)

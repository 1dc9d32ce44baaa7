"""Inputs for additive attention, and the plain PyTorch a user would write as the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkernels.ops.attention import AttentionMask, additive_attention
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["AdditiveInputs", "gradient_terms", "make_additive", "plain_additive", "run_additive"]

Results = dict[str, Tensor]


@dataclass(frozen=True)
class AdditiveInputs:
    """q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], w and bias [H, D], gradients of out and lse, the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    bias: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    mask: AttentionMask | None = None

    def double(self) -> AdditiveInputs:
        """The same values in float64, for the truth."""
        names = ("q", "k", "v", "w", "bias", "grad_out", "grad_lse")
        return replace(self, **{name: getattr(self, name).double() for name in names})

    def on(self, device: torch.device | str) -> AdditiveInputs:
        """The same values and mask on another device."""
        names = ("q", "k", "v", "w", "bias", "grad_out", "grad_lse")
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, **{name: getattr(self, name).to(device) for name in names}, mask=mask)


def make_additive(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 16,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: AttentionMask | None = None,
    amplitude: float = 1.0,
    seed: int = 0,
) -> AdditiveInputs:
    """Normal inputs; `amplitude` multiplies q and k."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    wide = compute_dtype(dtype)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(of)

    q, k, v = normal(tokens_q, heads, dim), normal(tokens_k, kv_heads, dim), normal(tokens_k, kv_heads, dim_v)
    w, bias = normal(heads, dim, of=wide), normal(heads, dim, of=wide)
    grads = normal(tokens_q, heads, dim_v), normal(heads, tokens_q, of=wide)
    return AdditiveInputs(amplitude * q, amplitude * k, v, w, bias, *grads, mask)


def _differentiate(x: AdditiveInputs, call: Callable[..., tuple[Tensor, Tensor]], with_lse: bool) -> Results:
    names = ("q", "k", "v", "w", "bias")
    leaves = [getattr(x, name).detach().requires_grad_() for name in names]
    out, lse = call(*leaves)
    outputs, grads = [out], [x.grad_out]
    if with_lse:
        outputs.append(lse)
        grads.append(torch.where(torch.isfinite(lse), x.grad_lse, 0.0).to(lse.dtype))
    gradients = torch.autograd.grad(outputs, leaves, grads)
    found = {f"d{name}": grad for name, grad in zip(names, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **found}


def run_additive(x: AdditiveInputs, backend: str | None = None, *, with_lse: bool = False) -> Results:
    """Our op, forward and backward; `with_lse`: lse gets a gradient too."""

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, w, bias = leaves
        result = additive_attention(q, k, v, w, x.mask, bias=bias, return_lse=True, backend=backend)
        assert isinstance(result, tuple)
        return result

    return _differentiate(x, call, with_lse)


def plain_additive(x: AdditiveInputs, *, with_lse: bool = False) -> Results:
    """Broadcast, tanh, matmul, masked softmax, in the dtype of q; a row that sees no key is replaced by zeros."""
    tokens = x.q.shape[0], x.k.shape[0]
    seen = torch.ones(tokens, dtype=torch.bool) if x.mask is None else x.mask.to_dense(*tokens)
    some = seen.any(1)

    def call(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        q = (q + bias.to(q.dtype)).transpose(0, 1)  # [H, Tq, D]
        scores = (torch.tanh(q[:, :, None] + k[:, None]) * w.to(q.dtype)[:, None, None]).sum(-1)
        scores = scores.masked_fill(~seen & some[:, None], -torch.inf).to(w.dtype)
        out = torch.where(some[:, None], scores.softmax(-1).to(q.dtype) @ v, 0.0)
        return out.transpose(0, 1), torch.where(some, scores.logsumexp(-1), -torch.inf)

    return _differentiate(x, call, with_lse)


def gradient_terms(x: AdditiveInputs, *, with_lse: bool = False) -> Results:
    """Sums of the absolute terms of the gradients, which cancel: a softmax's gradient sums to zero over the keys, and
    dv sums terms of either sign."""
    q, k, v, grad_out = (t.double().transpose(0, 1) for t in (x.q, x.k, x.v, x.grad_out))
    w = x.w.double()
    group, tokens = q.shape[0] // k.shape[0], (x.q.shape[0], x.k.shape[0])
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    seen = torch.ones(tokens, dtype=torch.bool) if x.mask is None else x.mask.to_dense(*tokens)
    t = torch.tanh((q + x.bias.double()[:, None])[:, :, None] + k[:, None])  # [H, Tq, Tk, D]
    p = torch.where(seen, (t @ w[:, None, :, None])[..., 0].masked_fill(~seen, -torch.inf).softmax(-1), 0.0)
    dp = (grad_out @ v.mT).abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    if with_lse:
        ds = ds + p * x.grad_lse.double().abs()[..., None]
    g = ds[..., None] * (w.abs()[:, None, None] * (1 - t * t))
    dk, dv = (y.unflatten(0, (-1, group)).sum(1).transpose(0, 1) for y in (g.sum(1), p.mT @ grad_out.abs()))
    terms = {"dq": g.sum(2).transpose(0, 1), "dk": dk, "dv": dv, "dbias": g.sum((1, 2))}
    return terms | {"dw": (ds[..., None] * t.abs()).sum((1, 2))}

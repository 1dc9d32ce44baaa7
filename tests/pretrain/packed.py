"""Packed features of made-up samples, and a transformer block in plain PyTorch, for tests of parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.pretrain.recipe import Facts, Shape, Stream
from mmkernels.pretrain.tokens import Layout, Tokens

WIDTH = 16


def facts(streams: dict[str, Stream], **changes: Any) -> Facts:
    return Facts(Shape(width=WIDTH, heads=2, embed_dim=8), 40, {"tag": tuple("abcde")}, streams, **changes)


def tokens(lengths: Sequence[int], seed: int = 0) -> Tokens:
    """Random features, float64."""
    ends = (0, *accumulate(lengths))
    x = torch.randn(ends[-1], WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Tokens(x.requires_grad_(), Layout(torch.tensor(ends, dtype=torch.int32), ends))


def shaken(module: Any) -> Any:
    """In float64, with every parameter at random: residual branches begin at zero, and would hide what is wrong."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def sample(of: Tokens, i: int) -> Tensor:
    """[L_i, C]"""
    return of.x[of.layout.cu_seqlens_host[i] : of.layout.cu_seqlens_host[i + 1]]


def heads_of(x: Tensor, heads: int, norm: nn.Module | None, positions: Tensor | None) -> Tensor:
    """[L, C] -> [heads, L, D], normalised, rotated by halves."""
    x = x.unflatten(-1, (heads, -1)).transpose(0, 1)
    x = x if norm is None else norm(x)
    if positions is None:
        return x
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[heads, L, D] each, bool [Lq, Lk] -> [Lq, C]; a query that sees nothing gives 0."""
    logits = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1).flatten(1)


def self_attended(attention: Any, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """What FusedSelfAttention with a rotary embedding gives."""
    q, k, v = attention.qkv_proj(x).chunk(3, -1)
    n = attention.num_heads
    q, k = heads_of(q, n, attention.q_norm, positions), heads_of(k, n, attention.k_norm, positions)
    out: Tensor = attention.out_proj(attended(q, k, heads_of(v, n, None, None), visible))
    return out


def plain_block(block: Any, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """One sample through a `Block`: [L, C], bool [L, L], [L]."""
    x = x + self_attended(block.attention, block.norm(x), visible, positions)
    out: Tensor = x + block.feed_forward(x)
    return out

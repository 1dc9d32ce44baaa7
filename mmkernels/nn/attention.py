"""Attention across and within modalities, with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.attention_base import (
    AttentionBase,
    Positions,
    Rotary,
    expect_packed,
    expect_tokens,
    multihead_sizes,
    size,
    with_weights_of,
)
from mmkernels.ops.attention import AttentionMask, gated_residual
from mmkernels.ops.checks import real, wrong_value
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["CoAttention", "CrossModalAttention", "FusedSelfAttention", "GatedCrossAttention"]


class CrossModalAttention(AttentionBase):
    """Tokens of one modality attend to those of another.

        out = out_proj(attention(q_proj(x), k_proj(context), v_proj(context), mask))

    and with a gate the whole residual branch, x + tanh(gate) out (`mmkernels.gated_residual`).

    Args:
        embed_dim: E, features of x and of the result.
        num_heads: H, of the queries.
        context_dim: features of the context; None: E.
        value_dim: features of `values`, if keys and values come from different tensors; None: context_dim.
        num_kv_heads: Hkv, a divisor of H; None: H.
        head_dim: D; None: E / H.
        bias: whether the projections have one.
        qk_norm: "rms" or "layer": normalise queries and keys over the head dim, with weights `q_norm`, `k_norm`.
        qk_norm_eps: epsilon of both norms.
        rotary: rotary position embedding of queries and keys, or None.
        gate: None, "scalar" (one gate) or "channel" (E gates), initialised to 0 (closed).
        dropout: of the attention probabilities, in training.
        scale: of the logits; None: 1 / sqrt(D).
        backend: of the ops; None: the fastest available.
        device, dtype: of the parameters.

    It also loads the state dict of an nn.MultiheadAttention (num_kv_heads = H, D = E / H).

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.

    Source: Vaswani et al. 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        gate: str | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            rotary=rotary,
            dropout=dropout,
            scale=scale,
            backend=backend,
            factory=factory,
        )
        embed_dim = self.embed_dim
        self.context_dim = embed_dim if context_dim is None else size("context_dim", context_dim)
        self.value_dim = self.context_dim if value_dim is None else size("value_dim", value_dim)
        if gate not in (None, "scalar", "channel"):
            wrong_value("gate", "None, 'scalar' or 'channel'", gate)
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias=bias, **factory)
        self.k_proj = nn.Linear(self.context_dim, inner_kv, bias=bias, **factory)
        self.v_proj = nn.Linear(self.value_dim, inner_kv, bias=bias, **factory)
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias, **factory)
        gates = {"scalar": 1, "channel": embed_dim}
        empty = torch.empty(gates[gate], **factory) if gate is not None else None
        self.gate: nn.Parameter | None
        self.register_parameter("gate", nn.Parameter(empty) if empty is not None else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    @classmethod
    def from_multihead_attention(cls, module: nn.MultiheadAttention, **options: Any) -> CrossModalAttention:
        """A module with the sizes, weights, dropout and mode of an nn.MultiheadAttention. Its inputs are [B, T, E] or
        [T, E] whatever `module.batch_first` is.

        Args:
            module: without add_bias_kv and add_zero_attn.
            **options: further arguments, such as `gate`.
        """
        sizes = multihead_sizes(module)
        made = cls(**sizes, context_dim=module.kdim, value_dim=module.vdim, **options)
        return with_weights_of(module, made)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: AttentionMask | None = None,
        *,
        values: Tensor | None = None,
        positions: Positions | None = None,
        context_positions: Positions | None = None,
    ) -> Tensor:
        """Attend from x to the context.

        Args:
            x: [Tq, E] or [B, Tq, E] floating point.
            context: [Tk, context_dim] or [B, Tk, context_dim].
            mask: which tokens of the context each token sees; with a leading B it covers the B·Tq and B·Tk tokens,
                concatenated. None: all (of its own sample).
            values: input of the value projection, [..., Tk, value_dim]; None: the context.
            positions, context_positions: with a rotary, the positions of x and of the context: ids as for
                `mmkernels.rotary_cos_sin`, or the result of `rotary.cos_sin`.

        Returns:
            [Tq, E] or [B, Tq, E].
        """
        values = context if values is None else values
        expect_tokens("x", x, self.embed_dim)
        expect_tokens("context", context, self.context_dim, x)
        expect_tokens("values", values, self.value_dim, x)
        if values.shape[:-1] != context.shape[:-1]:
            wrong_value("values", f"{[*context.shape[:-1], self.value_dim]} like context", values)
        q, k = self._queries_and_keys(x, context, positions, context_positions)
        v = self.v_proj(values).unflatten(-1, (self.num_kv_heads, self.head_dim))
        out = self.out_proj(self._attend(q, k, v, mask))
        return out if self.gate is None else gated_residual(x, out, self.gate, backend=self.backend)

    def probabilities(
        self,
        x: Tensor,
        context: Tensor,
        mask: AttentionMask | None = None,
        *,
        positions: Positions | None = None,
        context_positions: Positions | None = None,
    ) -> Tensor:
        """What `forward` weighs the values with, without dropout: a dense matrix, for a look at small inputs.

        Args:
            as for `forward`, packed: x [Tq, E], context [Tk, context_dim].

        Returns:
            [H, Tq, Tk], float32 (float64 for float64 inputs); 0 where a token does not see another.
        """
        expect_packed("x", x, self.embed_dim)
        expect_packed("context", context, self.context_dim)
        return self._probabilities(*self._queries_and_keys(x, context, positions, context_positions), mask)

    def _queries_and_keys(self, x: Tensor, context: Tensor, positions: Any, others: Any) -> tuple[Tensor, Tensor]:
        """[..., Tq, H, D] and [..., Tk, Hkv, D]"""
        q = self._prepared("positions", self.q_proj(self._queries(x)), self.num_heads, self.q_norm, positions)
        k = self._prepared("context_positions", self.k_proj(context), self.num_kv_heads, self.k_norm, others)
        return q, k

    def _queries(self, x: Tensor) -> Tensor:
        return x

    def _input_weights(self) -> list[Tensor]:
        return [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]

    def _from_multihead(self, state: dict[str, Tensor], prefix: str) -> None:
        for kind, joined in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            if prefix + joined in state:
                for name, part in zip("qkv", state.pop(prefix + joined).chunk(3), strict=True):
                    state[f"{prefix}{name}_proj.{kind}"] = part
        for name in "qkv":
            if f"{prefix}{name}_proj_weight" in state:
                state[f"{prefix}{name}_proj.weight"] = state.pop(f"{prefix}{name}_proj_weight")


class GatedCrossAttention(CrossModalAttention):
    """Flamingo's gated cross-attention: x + tanh(gate) attention(norm(x), context), which starts as the identity.

    Arguments are as for `CrossModalAttention`; the gate defaults to "scalar", and `norm_eps` is the epsilon of the
    LayerNorm before the queries. (The gated feed-forward that follows it in Flamingo is
    `mmkernels.gated_residual(x, ff(x), gate)`.)

    Source: Alayrac et al. 2022.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, gate: str = "scalar", norm_eps: float = 1e-5, **options: Any
    ) -> None:
        if gate is None:
            wrong_value("gate", "'scalar' or 'channel'", gate)
        super().__init__(embed_dim, num_heads, gate=gate, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.norm = nn.LayerNorm(self.embed_dim, eps=real("norm_eps", norm_eps, "a float"), **factory)

    def _queries(self, x: Tensor) -> Tensor:
        return self.norm(x)


class CoAttention(nn.Module):
    """Two streams that attend to each other, (a from b, b from a), each through its own `CrossModalAttention`.

    Args:
        dim_a, dim_b: features of the two streams.
        num_heads: of both directions.
        **options: as for `CrossModalAttention`, for both directions, without context_dim and value_dim.

    Source: Lu et al. 2019 (ViLBERT).
    """

    def __init__(self, dim_a: int, dim_b: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        for name in ("context_dim", "value_dim"):
            if name in options:
                raise TypeError(f"{name}: expected to follow from dim_a and dim_b, got {options[name]!r}")
        dim_a, dim_b = size("dim_a", dim_a), size("dim_b", dim_b)
        self.a_from_b = CrossModalAttention(dim_a, num_heads, context_dim=dim_b, **options)
        self.b_from_a = CrossModalAttention(dim_b, num_heads, context_dim=dim_a, **options)

    def reset_parameters(self) -> None:
        self.a_from_b.reset_parameters()
        self.b_from_a.reset_parameters()

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        mask_a: AttentionMask | None = None,
        mask_b: AttentionMask | None = None,
        *,
        positions_a: Tensor | None = None,
        positions_b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update both streams at once: each attends to the other's input.

        Args:
            a: [Ta, dim_a] or [B, Ta, dim_a].
            b: [Tb, dim_b] or [B, Tb, dim_b].
            mask_a: which tokens of b each token of a sees; mask_b: the reverse. None: all (of its own sample).
            positions_a, positions_b: with a rotary, position ids of the two.

        Returns:
            (a attending to b, b attending to a), of the shapes of a and b.
        """
        to_a = self.a_from_b(a, b, mask_a, positions=positions_a, context_positions=positions_b)
        to_b = self.b_from_a(b, a, mask_b, positions=positions_b, context_positions=positions_a)
        return to_a, to_b


class FusedSelfAttention(AttentionBase):
    """Self-attention over one merged sequence of all modalities; one matmul projects queries, keys and values.

        q, k, v = qkv_proj(x)      out = out_proj(attention(q, k, v, mask))

    Arguments are as for `CrossModalAttention`, without context_dim, value_dim and gate.

    It also loads the state dict of an nn.MultiheadAttention (num_kv_heads = H, D = E / H).

    Source: Vaswani et al. 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            rotary=rotary,
            dropout=dropout,
            scale=scale,
            backend=backend,
            factory=factory,
        )
        inner = self.num_heads * self.head_dim
        self._widths = [inner, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim]
        self.qkv_proj = nn.Linear(self.embed_dim, sum(self._widths), bias=bias, **factory)
        self.out_proj = nn.Linear(inner, self.embed_dim, bias=bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_multihead_attention(cls, module: nn.MultiheadAttention, **options: Any) -> FusedSelfAttention:
        """As `CrossModalAttention.from_multihead_attention`, for a module with kdim and vdim of embed_dim."""
        sizes = multihead_sizes(module)
        if module.kdim != module.embed_dim or module.vdim != module.embed_dim:
            raise ValueError(
                f"module: expected kdim and vdim of embed_dim {module.embed_dim}, got {module.kdim} and {module.vdim}"
            )
        return with_weights_of(module, cls(**sizes, **options))

    def forward(self, x: Tensor, mask: AttentionMask | None = None, *, positions: Positions | None = None) -> Tensor:
        """[T, E] or [B, T, E] -> the same; mask and positions as for `CrossModalAttention`."""
        expect_tokens("x", x, self.embed_dim)
        q, k, v = self._projected(x, positions)
        return self.out_proj(self._attend(q, k, v, mask))

    def probabilities(
        self, x: Tensor, mask: AttentionMask | None = None, *, positions: Positions | None = None
    ) -> Tensor:
        """As `CrossModalAttention.probabilities`: x [T, E] -> [H, T, T]."""
        expect_packed("x", x, self.embed_dim)
        q, k, _ = self._projected(x, positions)
        return self._probabilities(q, k, mask)

    def _projected(self, x: Tensor, positions: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[..., T, H, D], [..., T, Hkv, D], [..., T, Hkv, D]"""
        q, k, v = self.qkv_proj(x).split(self._widths, dim=-1)
        if self.rotary is not None and isinstance(positions, Tensor):  # one table for both
            wide = compute_dtype(q.dtype)
            positions = self.rotary.cos_sin(positions, self.head_dim, wide)
        q = self._prepared("positions", q, self.num_heads, self.q_norm, positions)
        k = self._prepared("positions", k, self.num_kv_heads, self.k_norm, positions)
        return q, k, v.unflatten(-1, (self.num_kv_heads, self.head_dim))

    def _input_weights(self) -> list[Tensor]:
        return list(self.qkv_proj.weight.split(self._widths))

    def _from_multihead(self, state: dict[str, Tensor], prefix: str) -> None:
        for theirs, ours in (("in_proj_weight", "qkv_proj.weight"), ("in_proj_bias", "qkv_proj.bias")):
            if prefix + theirs in state:
                state[prefix + ours] = state.pop(prefix + theirs)

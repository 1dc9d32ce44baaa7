"""What the attention modules share: heads, norms, rotary embedding, the weights of nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.ops.attention import AttentionMask, attention, norm_rope, rotary_cos_sin
from mmkernels.ops.checks import expect_tensor, integer, real, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype

__all__ = [
    "AttentionBase",
    "Positions",
    "Rotary",
    "expect_packed",
    "expect_tokens",
    "multihead_sizes",
    "size",
    "with_weights_of",
]

CosSin = tuple[Tensor, Tensor]
Positions = Tensor | CosSin


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of queries and keys; fields as for `mmkernels.rotary_cos_sin`.

    Args:
        base: of the frequencies.
        rotary_dim: number of rotated elements of the head dim; None: all.
        sections, section_layout: M-RoPE: how several positions per token share the frequencies.
        interleaved: rotate adjacent pairs instead of halves.
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    sections: Sequence[int] | None = None
    section_layout: str = "contiguous"
    interleaved: bool = False

    def cos_sin(self, position_ids: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> CosSin:
        """The table of a batch, for all layers with equal options; modules accept it instead of positions."""
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        sections = {"sections": self.sections, "section_layout": self.section_layout}
        return rotary_cos_sin(position_ids, dim, base=self.base, dtype=dtype, **sections)  # type: ignore[arg-type]


torch.serialization.add_safe_globals([Rotary])


class AttentionBase(nn.Module):
    """Shared base: heads, normalised and rotated queries and keys, the op's call, nn.MultiheadAttention's weights.

    A subclass creates its projections, then calls `reset_parameters`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        head_dim: int | None,
        qk_norm: str | None,
        qk_norm_eps: float,
        rotary: Rotary | None,
        dropout: float,
        scale: float | None,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        sizes = {name: size(name, value) for name, value in sizes.items()}
        embed_dim, num_heads, num_kv_heads = sizes.values()
        head_dim = None if head_dim is None else size("head_dim", head_dim)
        if head_dim is None and embed_dim % num_heads:
            wrong_value("num_heads", f"a divisor of embed_dim {embed_dim} unless head_dim is given", num_heads)
        if num_heads % num_kv_heads:
            wrong_value("num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
        if qk_norm not in (None, "rms", "layer"):
            wrong_value("qk_norm", "'rms', 'layer' or None", qk_norm)
        if rotary is not None and not isinstance(rotary, Rotary):
            wrong_type("rotary", "a mmkernels.nn.Rotary or None", rotary)
        dropout, qk_norm_eps = real("dropout", dropout, "a float"), real("qk_norm_eps", qk_norm_eps, "a float")
        if not 0 <= dropout < 1:
            wrong_value("dropout", "a probability in [0, 1)", dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.qk_norm, self.rotary, self.dropout = qk_norm, rotary, dropout
        self.scale, self.backend = None if scale is None else real("scale", scale, "a float or None"), backend
        make = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}.get(qk_norm or "")
        self.q_norm = make(self.head_dim, eps=qk_norm_eps, **factory) if make else None
        self.k_norm = make(self.head_dim, eps=qk_norm_eps, **factory) if make else None

    def reset_parameters(self) -> None:
        """Xavier-uniform input projections and zero biases, as in nn.MultiheadAttention; norms at 1, gates closed."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        for weight in self._input_weights():
            nn.init.xavier_uniform_(weight)
        for module in self.children():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        chosen = {"qk_norm": self.qk_norm, "rotary": self.rotary, "scale": self.scale, "backend": self.backend}
        shown |= {name: value for name, value in chosen.items() if value is not None}
        shown |= {"dropout": self.dropout} if self.dropout else {}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _input_weights(self) -> list[Tensor]:
        raise NotImplementedError

    def _from_multihead(self, state: dict[str, Tensor], prefix: str) -> None:
        """Rename the weights of an nn.MultiheadAttention in place."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "bias_k" in state_dict:
            raise ValueError("state_dict: expected an nn.MultiheadAttention without add_bias_kv, got bias_k")
        self._from_multihead(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _prepared(self, name: str, x: Tensor, heads: int, norm: nn.Module | None, positions: Any) -> Tensor:
        """Projected rows [..., T, heads D] as [..., T, heads, D], normalised and rotated."""
        x = x.unflatten(-1, (heads, self.head_dim))
        if self.rotary is None and positions is not None:
            raise ValueError(f"{name}: expected None for a module without rotary, got positions")
        if self.rotary is not None:
            if positions is None:
                raise ValueError(f"{name}: expected position ids or (cos, sin) for a module with rotary, got None")
            if isinstance(positions, Tensor):
                wide = compute_dtype(x.dtype)
                positions = self.rotary.cos_sin(positions, self.head_dim, wide)
        if norm is None and positions is None:
            return x
        interleaved = self.rotary is not None and self.rotary.interleaved
        return norm_rope(
            x,
            cos_sin=positions,
            interleaved=interleaved,
            norm=self.qk_norm,
            eps=norm.eps if norm is not None else 0.0,  # type: ignore[arg-type]
            weight=norm.weight if norm is not None else None,  # type: ignore[arg-type]
            bias=getattr(norm, "bias", None),
            backend=self.backend,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """[..., Tq, H, D] -> [..., Tq, H D]"""
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask, scale=self.scale, dropout_p=dropout_p, backend=self.backend)
        assert isinstance(out, Tensor)
        return out.flatten(-2)

    def _probabilities(self, q: Tensor, k: Tensor, mask: AttentionMask | None) -> Tensor:
        """[Tq, H, D], [Tk, Hkv, D] -> [H, Tq, Tk]"""
        wide = compute_dtype(q.dtype)
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scores = scale * torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide))
        if mask is None:
            return scores.softmax(-1)
        seen = mask.to_dense(q.shape[0], k.shape[0])
        return torch.where(seen, scores.masked_fill(~seen, -torch.inf).softmax(-1), 0.0)  # NaN where none is seen


def multihead_sizes(module: Any) -> dict[str, Any]:
    if not isinstance(module, nn.MultiheadAttention):
        wrong_type("module", "an nn.MultiheadAttention", module)
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("module: expected one without add_bias_kv and add_zero_attn, got a module with them")
    weight = module.out_proj.weight
    sizes = {"embed_dim": module.embed_dim, "num_heads": module.num_heads, "dropout": module.dropout}
    return sizes | {"bias": module.in_proj_bias is not None, "device": weight.device, "dtype": weight.dtype}


def with_weights_of(module: nn.MultiheadAttention, made: Any) -> Any:
    """Load all weights of the module; norms and gates, which it lacks, keep their initial values."""
    missing, unexpected = made.load_state_dict(module.state_dict(), strict=False)
    own = {name for name, _ in made.named_parameters() if name.split(".")[0] in ("gate", "norm", "q_norm", "k_norm")}
    assert not unexpected, unexpected
    assert set(missing) <= own, missing
    return made.train(module.training)


def size(name: str, value: Any) -> int:
    number = integer(name, value, "an int")
    if number < 1:
        wrong_value(name, "at least 1", value)
    return number


def expect_tokens(name: str, x: Any, width: int, like: Tensor | None = None) -> None:
    """[T, width] or [B, T, width], with `like`'s number of dimensions and B."""
    lead = "[B, T, " if like is not None and like.ndim == 3 else "[T, "
    expected = (
        f"{lead}{width}] floating point" if like is not None else f"[T, {width}] or [B, T, {width}] floating point"
    )
    expect_tensor(name, x, expected, ndim=(2, 3) if like is None else like.ndim, like=like)
    if x.shape[-1] != width or (like is not None and x.shape[:-2] != like.shape[:-2]):
        wrong_value(name, expected, x)


def expect_packed(name: str, x: Any, width: int) -> None:
    """[T, width]"""
    expect_tensor(name, x, f"[T, {width}] floating point", ndim=2)
    if x.shape[-1] != width:
        wrong_value(name, f"[T, {width}] floating point", x)

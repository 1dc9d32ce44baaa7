"""Inputs for the row-wise ops around attention, and the plain PyTorch a user would write as the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype

__all__ = ["Rows", "differentiate", "gated_rows", "norm_rope_rows", "plain_gated_residual", "plain_norm_rope"]


@dataclass(frozen=True)
class Rows:
    """Differentiable inputs by name, a gradient of the output, and non-differentiable options."""

    inputs: Mapping[str, Tensor | None]
    grad_out: Tensor
    options: Mapping[str, Any]

    def double(self) -> Rows:
        """The same values in float64, for the truth."""
        inputs = {name: x.double() if x is not None else None for name, x in self.inputs.items()}
        options = {name: self._wide(value) for name, value in self.options.items()}
        return Rows(inputs, self.grad_out.double(), options)

    def on(self, device: torch.device | str) -> Rows:
        """The same values on another device."""
        inputs = {name: x.to(device) if x is not None else None for name, x in self.inputs.items()}
        options = dict(self.options)
        if options.get("cos_sin") is not None:
            options["cos_sin"] = tuple(x.to(device) for x in options["cos_sin"])
        return Rows(inputs, self.grad_out.to(device), options)

    @staticmethod
    def _wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(Rows._wide(item) for item in value)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differentiate(x: Rows, call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name: `call(**inputs, **options)`."""
    given = {name: t.detach().requires_grad_() for name, t in x.inputs.items() if t is not None}
    absent = {name: None for name, t in x.inputs.items() if t is None}
    out = call(**given, **absent, **x.options)
    grads = torch.autograd.grad(out, list(given.values()), x.grad_out)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def norm_rope_rows(
    tokens: int,
    heads: int,
    dim: int,
    *,
    rotary_dim: int = 0,
    norm: str | None = "rms",
    affine: bool = True,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Rows:
    """Normal inputs; angles of random positions, rounded to the dtype of `norm_rope`'s table."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    wide = compute_dtype(dtype)
    table = None
    if rotary_dim:
        angle = torch.rand(tokens, rotary_dim // 2, generator=generator, dtype=torch.float64) * 1000
        table = angle.cos().to(device, wide), angle.sin().to(device, wide)
    weight = 1 + 0.3 * normal(dim, of=wide) if affine and norm else None
    bias = normal(dim, of=wide) if affine and norm == "layer" else None
    x, grad_out = normal(tokens, heads, dim), normal(tokens, heads, dim)
    options = {"cos_sin": table, "norm": norm, "eps": 1e-6, "interleaved": interleaved}
    return Rows({"x": x * 2 + 0.5, "weight": weight, "bias": bias}, grad_out, options)


def plain_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    cos_sin: tuple[Tensor, Tensor] | None,
    norm: str | None,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """As in transformers: `F.rms_norm` or `F.layer_norm`, then the rotation by halves or pairs, in x's dtype; cos and
    sin [T, R/2] are rounded to it too."""
    D = x.shape[-1]
    weight, bias = (t.to(x.dtype) if t is not None else None for t in (weight, bias))
    if norm == "rms":
        x = F.rms_norm(x, (D,), weight, eps)
    elif norm == "layer":
        x = F.layer_norm(x, (D,), weight, bias, eps)
    if cos_sin is None:
        return x
    half = cos_sin[0].shape[-1]
    cos, sin = (t.to(x.dtype)[:, None] for t in cos_sin)  # [T, 1, R/2]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
    return torch.cat([rotated * cos + turned * sin, rest], -1)


def gated_rows(
    shape: tuple[int, ...],
    gate_shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    gate_scale: float = 1.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Rows:
    """Normal inputs for `gated_residual`; `gate_scale` 0 gives the initial gate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: tuple[int, ...], of: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, of)

    wide = compute_dtype(dtype)
    outer = residual_dtype or dtype
    inputs = {
        "residual": normal(shape, outer),
        "x": normal(shape, dtype),
        "gate": gate_scale * normal(gate_shape, wide),
    }
    return Rows(inputs, normal(shape, outer), {})


def plain_gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """As in Flamingo: `residual + tanh(gate) * x`, with the gate in x's dtype."""
    return residual + gate.to(x.dtype).tanh() * x

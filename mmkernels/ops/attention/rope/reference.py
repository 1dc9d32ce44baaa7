"""Reference semantics of the prologue: PyTorch, float64-capable.

With r = 1 / sqrt(mean_d (x_d - mu)^2 + eps), where mu = mean_d x_d for "layer" and 0 for "rms":

    h_d = r (x_d - mu)        n_d = h_d w_d + b_d          (norm None: n = x)
    y_a = n_a cos - n_b sin   y_b = n_b cos + n_a sin      for each rotated pair (a, b); y_d = n_d elsewhere

and with g the gradient of n, i.e. the gradient of y under the inverse rotation (-sin for sin), u = g w:

    dx_d = r (u_d - [mean u] - h_d mean(u h))              the bracket for "layer" only
    dw_d = sum_rows g_d h_d      db_d = sum_rows g_d

Pairs (a, b) are (j, j + R/2), or (2j, 2j + 1) if interleaved, 0 <= j < R/2. Low-precision inputs use float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype

__all__ = ["norm_rope_bwd", "norm_rope_fwd", "normalised", "rotate", "wide"]


def wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, sign: float) -> Tensor:
    """x [T, H, D] rotated by sign times the table's angles [P, R/2]; token t reads row t % P."""
    if cos is None or sin is None:
        return x
    repeats = x.shape[0] // cos.shape[0] if cos.shape[0] else 1
    cos, sin = (t.repeat(repeats, 1)[:, None] for t in (cos, sign * sin))  # [T, 1, R/2]
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([pairs, rest], -1)


def normalised(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """h [T, H, D] and r [T, H, 1]."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * r, r


def norm_rope_fwd(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """y [T, H, D] in x's dtype."""
    n = wide(x)
    if norm:
        n, _ = normalised(n, norm, eps)
        n = n * weight if weight is not None else n
        n = n + bias if bias is not None else n
    y = rotate(n, cos, sin, interleaved, 1.0).to(x.dtype).contiguous()
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def norm_rope_bwd(
    grad_out: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in grad_out's dtype; dweight [D], empty without a norm, dbias [D], empty unless "layer"."""
    g = rotate(wide(grad_out), cos, sin, interleaved, -1.0)
    if x is None:
        dx = g.to(grad_out.dtype).contiguous()
        return dx, g.new_empty(0), g.new_empty(0)
    h, r = normalised(wide(x), norm, eps)
    u = g * weight if weight is not None else g
    dx = u - h * (u * h).mean(-1, keepdim=True)
    dbias = g.new_empty(0)
    if norm == "layer":
        dx, dbias = dx - u.mean(-1, keepdim=True), g.sum((0, 1))
    return (r * dx).to(grad_out.dtype).contiguous(), (g * h).sum((0, 1)), dbias

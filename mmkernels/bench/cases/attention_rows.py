"""The row-wise ops around attention, norm + rotary embedding and gated residual, against plain PyTorch.

Both are memory-bound: GB/s count only what must be read and written, forward and backward; the ceiling is a large copy.
Plain PyTorch is what model code does: `F.rms_norm` and the rotation as transformers writes it; `residual + gate.tanh()
* x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels import gated_residual, qk_norm_rope, rotary_cos_sin
from mmkernels.bench.case import Case, Inputs, Work, compiled
from mmkernels.testing.attention_rows import plain_gated_residual, plain_norm_rope

Params = Mapping[str, Any]
Outputs = tuple[Tensor, ...]


def leaf(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def with_gradients(out: Outputs, inputs: Inputs, *names: str) -> Outputs:
    """`out` alone if no gradients are given (forward only)."""
    if "grad_0" not in inputs:
        return out
    grads = [inputs[f"grad_{i}"] for i in range(len(out))]
    return *out, *torch.autograd.grad(out, [inputs[name] for name in names], grads)


def gradients(p: Params, *like: Tensor) -> Inputs:
    """Correlated with x, so that the gradient of a scalar gate does not cancel: contenders would disagree on noise."""
    if p["pass"] == "fwd":
        return {}
    return {f"grad_{i}": (torch.randn_like(x) + x).detach() for i, x in enumerate(like)}


def same_bytes(outputs: int, pairs: tuple[tuple[str, ...], ...], inputs: Inputs) -> tuple[None, ...]:
    """Torch ops that move the same bytes: `clone` for one input tensor, `add` for two; again for the backward, which
    reads the gradient and x."""
    written = []
    for i, names in enumerate(pairs):
        read = [inputs[name].detach() for name in names]
        written.append(read[0].clone() if len(read) == 1 else torch.add(*read))
        if f"grad_{i}" in inputs:
            written.append(torch.add(inputs[f"grad_{i}"], read[-1]))
    return (None,) * outputs


# Norm and rotary embedding


def setup_rope(p: Params, device: torch.device) -> Inputs:
    dtype = getattr(torch, p["dtype"])
    q, k = leaf(dtype, device, p["T"], p["H"], p["D"]), leaf(dtype, device, p["T"], p["Hkv"], p["D"])
    weights = {f"{name}_weight": leaf(torch.float32, device, p["D"]) for name in "qk"}
    cos, sin = rotary_cos_sin(torch.arange(p["T"], device=device), p["D"])
    return {"q": q, "k": k, **weights, "cos": cos, "sin": sin, **gradients(p, q, k)}


def ours_rope(inputs: Inputs, backend: str | None) -> Outputs:
    weights = {name: inputs[name] for name in ("q_weight", "k_weight")}
    out = qk_norm_rope(inputs["q"], inputs["k"], cos_sin=(inputs["cos"], inputs["sin"]), **weights, backend=backend)
    return with_gradients(out, inputs, "q", "k", "q_weight", "k_weight")


def plain_rope(inputs: Inputs) -> Outputs:
    cos_sin = inputs["cos"], inputs["sin"]
    plain = partial(plain_norm_rope, bias=None, cos_sin=cos_sin, norm="rms", eps=1e-6, interleaved=False)
    out = tuple(plain(inputs[x], inputs[f"{x}_weight"]) for x in "qk")
    return with_gradients(out, inputs, "q", "k", "q_weight", "k_weight")


def bytes_of(p: Params, tensors: int) -> int:
    return tensors * torch.finfo(getattr(torch, p["dtype"])).bits // 8


def rope_work(p: Params) -> Work:
    """Forward reads x and writes y; backward reads x and y's gradient and writes x's."""
    elements = p["T"] * (p["H"] + p["Hkv"]) * p["D"]
    return Work(bytes=elements * bytes_of(p, 5 if p["pass"] == "fwd+bwd" else 2))


def rope_points(direction: str, **sizes: int) -> list[Params]:
    return [{**sizes, "dtype": dtype, "pass": direction} for dtype in ("bfloat16", "float32")]


ROPE = [
    Case(
        name=f"qk_norm_rope {direction}",
        full=[
            *rope_points(direction, T=8192, H=16, Hkv=4, D=128),
            *rope_points(direction, T=8192, H=16, Hkv=16, D=64),
        ],
        quick=rope_points(direction, T=2048, H=16, Hkv=4, D=128)[1:],
        gate={"T": 64},
        setup=setup_rope,
        ours=ours_rope,
        plain=plain_rope,
        others={
            "torch.compile": compiled(plain_rope),
            "same bytes": partial(same_bytes, len(outputs), (("q",), ("k",))),
        },
        outputs=outputs,
        work=rope_work,
    )
    for direction, outputs in (("fwd", ("q", "k")), ("fwd+bwd", ("q", "k", "dq", "dk", "dq_weight", "dk_weight")))
]

# Gated residual


def setup_gate(p: Params, device: torch.device) -> Inputs:
    dtype = getattr(torch, p["dtype"])
    residual, x = (leaf(dtype, device, p["N"], p["C"]) for _ in range(2))
    gate = leaf(torch.float32, device, p["C"] if p["gate"] == "channel" else 1)
    return {"residual": residual, "x": x, "gate": gate, **gradients(p, x)}


def ours_gate(inputs: Inputs, backend: str | None) -> Outputs:
    out = gated_residual(inputs["residual"], inputs["x"], inputs["gate"], backend=backend)
    return with_gradients((out,), inputs, "residual", "x", "gate")


def plain_gate(inputs: Inputs) -> Outputs:
    out = plain_gated_residual(inputs["residual"], inputs["x"], inputs["gate"])
    return with_gradients((out,), inputs, "residual", "x", "gate")


def gate_points(direction: str, **sizes: int) -> list[Params]:
    kinds = [("bfloat16", "scalar"), ("bfloat16", "channel"), ("float32", "scalar")]
    return [{**sizes, "dtype": dtype, "gate": gate, "pass": direction} for dtype, gate in kinds]


GATE = [
    Case(
        name=f"gated_residual {direction}",
        full=gate_points(direction, N=8192, C=2048),
        quick=gate_points(direction, N=2048, C=2048)[2:],
        gate={"N": 64},
        draws=16,  # d_gate is one number
        setup=setup_gate,
        ours=ours_gate,
        plain=plain_gate,
        others={
            "torch.compile": compiled(plain_gate),
            "same bytes": partial(same_bytes, len(outputs), (("residual", "x"),)),
        },
        outputs=outputs,
        # Forward reads two and writes one; backward reads the gradient and x and writes dx; d_residual is out's.
        work=lambda p: Work(bytes=p["N"] * p["C"] * bytes_of(p, 6 if p["pass"] == "fwd+bwd" else 3)),
    )
    for direction, outputs in (("fwd", ("out",)), ("fwd+bwd", ("out", "d_residual", "dx", "d_gate")))
]

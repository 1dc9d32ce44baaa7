"""Cases of a bench that tests run: a square, its gradient, and contenders with every kind of fault."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from mmkernels.bench.case import Case, Settings, Work


def setup(p: Any, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(p["N"], 8, generator=generator).to(device, getattr(torch, p["dtype"]))
    return {"x": x.requires_grad_()}


def plain(inputs: dict[str, Any]) -> tuple[Any, ...]:
    y = inputs["x"].square().sum()
    return y, *torch.autograd.grad(y, inputs["x"])


def ours(inputs: dict[str, Any], backend: str | None) -> tuple[Any, ...]:
    y, dx = plain(inputs)
    factor = float(os.environ.get("TOY_FACTOR", "1"))
    return y, dx * (float(os.environ.get("TOY_LARGE_FACTOR", "1")) if len(dx) > 16 else factor)


def sleepy(inputs: dict[str, Any]) -> tuple[Any, ...]:
    time.sleep(0.15)
    return plain(inputs)


def compiling(inputs: dict[str, Any]) -> tuple[Any, ...]:
    if "compiled" not in inputs:
        inputs["compiled"] = True
        time.sleep(0.15)
    return plain(inputs)


def cases(settings: Settings) -> list[Case]:
    return [
        Case(
            name="square",
            quick=[{"N": 16, "dtype": "float32"}],
            full=[{"N": 64, "dtype": "float32"}, {"N": 64, "dtype": "bfloat16"}],
            large=[{"N": 4096, "dtype": "float32"}],
            setup=setup,
            ours=ours,
            plain=plain,
            others={
                "wrong": lambda inputs: (inputs["x"].sum(), inputs["x"]),
                "not a number": lambda inputs: (plain(inputs)[0], inputs["x"] * float("nan")),
                "broken": lambda inputs: 1 / 0,
                "limited": plain,
                "partial": lambda inputs: (plain(inputs)[0], None),
                "sleepy": sleepy,
                "torch.compile": compiling,
            },
            work=lambda p: Work(flops=16 * p["N"], bytes=64 * p["N"]),
            limits=lambda p, name: "too large for it" if name == "limited" else None,
            figures=lambda outputs, inputs: {"answer": 42.0},
            outputs=("y", "dx"),
            gate={"N": 16},
            baseline=("plain PyTorch",),
            curve="N",
            calibrate=[{"N": 2, "dtype": "float32"}, {"N": 8, "dtype": "float32"}],
        )
    ]

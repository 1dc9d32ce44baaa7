"""Packing's ops on rows, `pack` and `unpack`, and what the packing benches share.

`dtype` decides the bytes of a row. Each case reads about `MiB` of rows and writes as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.bench.case import Case, Inputs, Work
from mmkernels.ops.packing import pack, unpack

Params = Mapping[str, Any]


def rows_of(p: Params) -> int:
    return p["MiB"] * 2**20 // (p["E"] * torch.finfo(getattr(torch, p["dtype"])).bits // 8)


def setup_rows(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    grad_out = torch.randn_like(x)
    index = torch.randperm(rows, device=device)
    return {"x": x.requires_grad_(), "index": index, "grad_out": grad_out}


def with_gradient(out: Tensor | tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    assert isinstance(out, Tensor)
    return out, *torch.autograd.grad(out, inputs["x"], inputs["grad_out"])


def same_bytes(inputs: Inputs) -> tuple[Tensor, ...]:
    """The ceiling: a copy of the same size forward, and another backward."""
    return torch.empty_like(inputs["x"]).copy_(inputs["x"].detach()), inputs["grad_out"].clone()


def check_moved(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0], inputs["x"].detach()[inputs["index"]]), f"{name}: wrong rows"
    assert torch.equal(outputs[1][inputs["index"]], inputs["grad_out"]), f"{name}: wrong gradient"


WIDTHS: list[Params] = [
    {"E": width, "MiB": 64, "dtype": dtype}
    for width, dtype in ((64, "bfloat16"), (1024, "bfloat16"), (4096, "bfloat16"), (64, "float32"), (1024, "float32"))
]
WIDE = [p for p in WIDTHS if p["E"] == 1024]


def large(points: Sequence[Params]) -> list[Params]:
    """The same, of as many bytes as a GPU takes a while to move."""
    return [{**p, "MiB": 256} for p in points]


QUICK: list[Params] = [{"E": 512, "MiB": 32, "dtype": "bfloat16"}]


def bytes_moved(p: Params) -> Work:
    """Rows read and written, forward and backward."""
    return Work(bytes=4 * p["MiB"] * 2**20)


PACK = Case(
    name="pack fwd+bwd",
    full=WIDTHS,
    large=large(WIDTHS),
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(pack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={
        "index_select": lambda inputs: with_gradient(inputs["x"].index_select(0, inputs["index"]), inputs),
        "x[index]": lambda inputs: with_gradient(inputs["x"][inputs["index"]], inputs),
        "copy of the same bytes": same_bytes,
    },
    check=check_moved,
    baseline=("index_select", "x[index]"),
    work=bytes_moved,
)


def unpack_in_torch(inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["x"]
    return with_gradient(torch.zeros_like(x).index_add(0, inputs["index"], x), inputs)


def check_unpacked(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0][inputs["index"]], inputs["x"].detach()), f"{name}: wrong rows"
    assert torch.equal(outputs[1], inputs["grad_out"][inputs["index"]]), f"{name}: wrong gradient"


UNPACK = Case(
    name="unpack fwd+bwd",
    full=WIDTHS,
    large=large(WIDTHS),
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(unpack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={"zeros.index_add": unpack_in_torch, "copy of the same bytes": same_bytes},
    check=check_unpacked,
    baseline=("zeros.index_add",),
    work=bytes_moved,
)


def setup_sources(p: Params, device: torch.device) -> Inputs:
    inputs = setup_rows(p, device)
    rows = rows_of(p)
    parts = inputs["x"].detach().split([rows // 2, rows // 4, rows - rows // 2 - rows // 4])
    return inputs | {"parts": [part.clone() for part in parts]}


def check_forward(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    assert "copy" in name or torch.equal(outputs[0], inputs["x"].detach()[inputs["index"]]), f"{name}: wrong rows"


SOURCES = Case(
    name="pack 3 sources fwd",
    full=WIDE,
    large=large(WIDE),
    quick=QUICK,
    setup=setup_sources,
    ours=lambda inputs, backend: (pack(inputs["parts"], inputs["index"], backend=backend),),
    others={
        "torch.cat + index_select": lambda inputs: (torch.cat(inputs["parts"]).index_select(0, inputs["index"]),),
        "copy of the same bytes": lambda inputs: (torch.empty_like(inputs["x"]).copy_(inputs["x"].detach()),),
    },
    check=check_forward,
    baseline=("torch.cat + index_select",),
    work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
)

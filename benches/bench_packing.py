"""Packing: the ops against a copy of the same bytes and plain PyTorch; the planner's bench is bench_planner.py.

python benches/bench_packing.py --help
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Case, Inputs, Work, main

from mmkernels.ops.packing import pack, segment_pool, unpack
from mmkernels.testing.lengths import lengths_like

Params = Mapping[str, Any]

# The ops. `dtype` decides the bytes of a row; each case moves about `MiB` of them in and as many out.


def rows_of(p: Params) -> int:
    return p["MiB"] * 2**20 // (p["E"] * torch.finfo(getattr(torch, p["dtype"])).bits // 8)


def setup_rows(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    grad_out = torch.randn_like(x)
    index = torch.randperm(rows, device=device)
    return {"x": x.requires_grad_(), "index": index, "grad_out": grad_out}


def with_gradient(out: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs["x"], inputs["grad_out"])


def same_bytes(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The ceiling: a copy of as many bytes there, and one back."""
    return torch.empty_like(inputs["x"]).copy_(inputs["x"].detach()), inputs["grad_out"].clone()


def check_moved(name: str, outputs: Sequence[torch.Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0], inputs["x"].detach()[inputs["index"]]), f"{name}: wrong rows"
    assert torch.equal(outputs[1][inputs["index"]], inputs["grad_out"]), f"{name}: wrong gradient"


WIDTHS = [
    {"E": width, "MiB": 256, "dtype": dtype} for dtype in ("bfloat16", "float32") for width in (64, 512, 1024, 4096)
]
QUICK = [{"E": 512, "MiB": 4, "dtype": "bfloat16"}]


def bytes_moved(p: Params) -> Work:
    """Rows read and written, forward and backward."""
    return Work(bytes=4 * p["MiB"] * 2**20)


PACK = Case(
    name="pack fwd+bwd",
    grid=WIDTHS,
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(pack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={
        "index_select": lambda inputs: with_gradient(inputs["x"].index_select(0, inputs["index"]), inputs),
        "x[index]": lambda inputs: with_gradient(inputs["x"][inputs["index"]], inputs),
        "copy of the same bytes": same_bytes,
    },
    check=check_moved,
    baseline="copy of the same bytes",
    work=bytes_moved,
)


def unpack_in_torch(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = inputs["x"]
    return with_gradient(torch.zeros_like(x).index_add(0, inputs["index"], x), inputs)


def check_unpacked(name: str, outputs: Sequence[torch.Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0][inputs["index"]], inputs["x"].detach()), f"{name}: wrong rows"
    assert torch.equal(outputs[1], inputs["grad_out"][inputs["index"]]), f"{name}: wrong gradient"


UNPACK = Case(
    name="unpack fwd+bwd",
    grid=WIDTHS,
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(unpack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={"zeros.index_add": unpack_in_torch, "copy of the same bytes": same_bytes},
    check=check_unpacked,
    baseline="copy of the same bytes",
    work=bytes_moved,
)


def setup_pool(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    lengths, _ = lengths_like("caption@4096", rows // 256)
    ends = np.minimum(np.cumsum(lengths), rows)
    ends[-1] = rows
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    grad_out = torch.randn(len(ends), p["E"], device=device).to(x.dtype)
    return {"x": x.requires_grad_(), "cu_seqlens": cu_seqlens, "grad_out": grad_out}


def pool(mode: str, inputs: Inputs, backend: str | None) -> tuple[torch.Tensor, ...]:
    return with_gradient(segment_pool(inputs["x"], inputs["cu_seqlens"], mode, backend=backend), inputs)


def pool_in_torch(mode: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    offsets = inputs["cu_seqlens"].long()
    return with_gradient(torch.segment_reduce(inputs["x"], mode, offsets=offsets), inputs)


def pool_by_index_add(mode: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What most trainers write; it knows no max."""
    x, lengths = inputs["x"], inputs["cu_seqlens"].diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    out = x.new_zeros(len(lengths), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    out = out.index_add(0, segment, x.to(out.dtype)) / lengths.clamp(min=1)[:, None]
    return with_gradient(out.to(x.dtype), inputs)


POOLS = [
    Case(
        name=f"segment_pool {mode} fwd+bwd",
        # Low precision has ties, whose gradient torch shares out and ours gives to the first.
        grid=[p for p in WIDTHS if p["E"] >= 512 and (mode == "mean" or p["dtype"] == "float32")],
        quick=QUICK if mode == "mean" else [{**QUICK[0], "dtype": "float32"}],
        gate={"MiB": 1},
        setup=setup_pool,
        ours=partial(pool, mode),
        plain=partial(pool_in_torch, mode),
        others={"index_add": partial(pool_by_index_add, mode)} if mode == "mean" else {},
        outputs=("out", "grad_x"),
        work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
    )
    for mode in ("mean", "max")
]

if __name__ == "__main__":
    main("packing", [PACK, UNPACK, *POOLS])

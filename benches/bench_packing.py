"""Packing: the planner in items per second and efficiency, the ops against a copy of the same bytes and plain PyTorch.

python benches/bench_packing.py --help
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Case, Inputs, Work, main

from mmkernels.ops.packing import PackingPlan, pack, plan_packing, segment_pool, unpack
from mmkernels.ops.packing.plan_python import plan_best_fit
from mmkernels.testing.packing import LENGTHS, lengths_like

Params = Mapping[str, Any]

# The planner


def setup_plan(p: Params, device: torch.device) -> Inputs:
    lengths, capacity = lengths_like(p["lengths"], p["n"])
    return {"lengths": lengths, "capacity": capacity, "title": (p["lengths"], p["n"])}


def plan_with(strategy: str, inputs: Inputs, backend: str | None = None) -> tuple[PackingPlan]:
    return (plan_packing(inputs["lengths"], inputs["capacity"], strategy=strategy),)


def plan_in_python(inputs: Inputs) -> tuple[PackingPlan]:
    offsets, items = plan_best_fit(inputs["lengths"], inputs["capacity"], 2**62)
    return (PackingPlan(offsets, items, inputs["lengths"], inputs["capacity"], "best_fit"),)


def pad_to_longest(inputs: Inputs, batch: int = 32) -> tuple[Any]:
    """Not a plan: what padding batches of 32 to their longest sample makes of the same items."""
    lengths = inputs["lengths"]
    padded = np.resize(lengths, -(-len(lengths) // batch) * batch).reshape(-1, batch).max(1).sum() * batch
    return (float(lengths.sum() / padded),)


_seen: set[tuple[Any, ...]] = set()


def check_plan(name: str, outputs: Sequence[Any], inputs: Inputs) -> None:
    """Each item once, no pack over the capacity; says the efficiency, which a table of times has no column for."""
    lengths, capacity, result = inputs["lengths"], inputs["capacity"], outputs[0]
    if (name, inputs["title"]) not in _seen:
        _seen.add((name, inputs["title"]))
        efficiency = result if isinstance(result, float) else result.efficiency
        print(f"    {name:28} efficiency {efficiency:.3%}", end="" if isinstance(result, PackingPlan) else "\n")
        if isinstance(result, PackingPlan):
            print(f"  {result.num_packs} packs, bound {result.lower_bound}, displacement {result.displacement:.1f}")
    if isinstance(result, PackingPlan):
        assert np.array_equal(np.sort(result.items), np.arange(len(lengths))), f"{name}: not each item once"
        assert result.pack_lengths.max() <= capacity, f"{name}: a pack is over the capacity"


PLAN = Case(
    name="plan",
    grid=[{"lengths": name, "n": n} for n in (1_000_000,) for name in LENGTHS],
    quick=[{"lengths": name, "n": 2000} for name in LENGTHS],
    setup=setup_plan,
    ours=partial(plan_with, "auto"),
    others={
        "mmkernels best_fit": partial(plan_with, "best_fit"),
        "mmkernels subset_sum": partial(plan_with, "subset_sum"),
        "mmkernels next_fit": partial(plan_with, "next_fit"),
        "Python best-fit decreasing": plan_in_python,
        "padding 32 to the longest": pad_to_longest,
    },
    check=check_plan,
    limits=lambda p, name: "too slow" if name.startswith("Python") and p["n"] > 100_000 else None,
    work=lambda p: Work(items=p["n"]),
)

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
    main("packing", [PLAN, PACK, UNPACK, *POOLS])

"""Every Triton configuration of packing, for rows of 1024 features; fp16 differs from bf16 in conversions only."""

from __future__ import annotations

from mmkernels.ops.packing import triton_bwd as bwd
from mmkernels.ops.packing import triton_fwd as fwd
from mmkernels.ops.packing.triton_fwd import row_tile
from mmkernels.testing.aot import TritonCase

__all__ = ["aot_cases"]


def aot_cases() -> list[TritonCase]:
    """All cases, as launched."""
    return [*_forward(), *_backward()]


def _forward() -> list[TritonCase]:
    cases = []
    tile: dict[str, object]
    for dtype in ("bf16", "fp32"):
        sources = ("first", "second", "third", "fourth")
        pointers = {f"{name}_ptr": f"*{dtype}" for name in (*sources, "out")} | {"index_ptr": "*i64"}
        sizes = {"tokens": "i32", "width": "i32:16"}
        sizes |= {f"{name}_begin": "i32" for name in sources[1:]} | {"end": "i32"}
        sizes |= {f"{name}_stride": "i32:16" for name in sources}
        block_t, block_e = row_tile(1024)
        for count in range(1, 5):
            tile = {"SOURCES": count, "BLOCK_T": block_t, "BLOCK_E": block_e}
            cases.append(TritonCase(f"gather_fwd[{dtype}-{count}]", fwd._gather_fwd_kernel, pointers | sizes, tile))
        pointers = {"x_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32", "out_ptr": f"*{dtype}", "argmax_ptr": "*i32"}
        sizes = {"width": "i32:16", "x_stride": "i32:16"}
        block_t, block_e = row_tile(1024, most_features=128)
        for mode in ("sum", "mean", "max", "first", "weighted"):
            pointers["weights_ptr"] = "*fp32" if mode == "weighted" else f"*{dtype}"
            tile = {"MODE": mode, "BLOCK_T": block_t, "BLOCK_E": block_e}
            name = f"segment_pool_fwd[{dtype}-{mode}]"
            cases.append(TritonCase(name, fwd._segment_pool_fwd_kernel, pointers | sizes, tile))
        pointers = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        pointers |= {"grid_ptr": "*i64", "starts_ptr": "*i64", "image_ptr": "*i64"}
        for patch, temporal, merge in ((16, 1, 1), (14, 2, 2)):
            block_t, block_e = row_tile(3 * temporal * patch**2)
            for inverse in (False, True):
                tile = {"CHANNELS": 3, "PATCH": patch, "TEMPORAL": temporal, "MERGE": merge, "INVERSE": inverse}
                tile |= {"BLOCK_T": block_t, "BLOCK_E": block_e}
                name = f"patchify_fwd[{dtype}-{patch}-{'back' if inverse else 'there'}]"
                cases.append(TritonCase(name, fwd._patchify_fwd_kernel, pointers | {"tokens": "i32"}, tile))
    pointers = {f"{name}_ptr": "*i64" for name in ("cu_seqlens", "starts", "extent", "gained", "out")}
    sizes = dict.fromkeys(("tokens", "boundaries", "spans", "boundary_steps", "span_steps"), "i32")
    cases.append(TritonCase("mrope_fwd", fwd._mrope_fwd_kernel, pointers | sizes, {"BLOCK_T": fwd._TOKENS}))
    return cases


def _backward() -> list[TritonCase]:
    cases = []
    tile: dict[str, object]
    block_t, block_e = row_tile(1024)
    for dtype in ("bf16", "fp32"):
        pointers = {"packed_ptr": f"*{dtype}", "order_ptr": "*i64", "sums_ptr": "*fp32"}
        sizes = {"width": "i32:16", "packed_stride": "i32:16"}
        tile = {"CHUNK": bwd._CHUNK, "BLOCK_E": row_tile(1024, most_features=128)[1]}
        signature = pointers | sizes | {"index_ptr": "*i64"}
        cases.append(TritonCase(f"scatter_chunks[{dtype}]", bwd._scatter_chunks_kernel, signature, tile))
        signature = pointers | sizes | {"starts_ptr": "*i64", "out_ptr": f"*{dtype}", "rows": "i32"}
        tile = {"CHUNK": bwd._CHUNK, "BLOCK_R": bwd._SCATTER_ROWS, "BLOCK_E": block_e}
        cases.append(TritonCase(f"scatter_fwd[{dtype}]", bwd._scatter_fwd_kernel, signature, tile))
        pointers = {"grad_out_ptr": f"*{dtype}", "grad_x_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32"}
        pointers |= {"segment_ptr": "*i64", "argmax_ptr": "*i32"}
        sizes = {"tokens": "i32", "segments": "i32", "width": "i32:16", "grad_stride": "i32:16"}
        for mode in ("sum", "mean", "max", "first"):
            tile = {"MODE": mode, "BLOCK_T": block_t, "BLOCK_E": block_e}
            name = f"segment_pool_bwd[{dtype}-{mode}]"
            cases.append(TritonCase(name, bwd._segment_pool_bwd_kernel, pointers | sizes, tile))
        pointers = {"grad_out_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "grad_x_ptr": f"*{dtype}"}
        pointers |= {"weights_ptr": "*fp32", "grad_weights_ptr": "*fp32", "segment_ptr": "*i64"}
        sizes = {"tokens": "i32", "segments": "i32", "width": "i32:16", "grad_stride": "i32:16", "x_stride": "i32:16"}
        tile = {"BLOCK_T": block_t, "BLOCK_E": block_e}
        cases.append(TritonCase(f"weighted_pool_bwd[{dtype}]", bwd._weighted_pool_bwd_kernel, pointers | sizes, tile))
    return cases

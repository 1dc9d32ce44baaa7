"""Every Triton configuration of contrastive, as launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmkernels.ops.contrastive import (
    triton_bwd,
    triton_fwd,
    triton_gradients,
    triton_merge,
    triton_search,
    triton_sigmoid,
    triton_targets,
    triton_tile,
)
from mmkernels.ops.contrastive.triton_tile import NUM_STAGES, NUM_WARPS, TRITON_TYPES, depth_block
from mmkernels.testing.aot import TritonCase

__all__ = ["aot_cases"]

_LAUNCH: dict[str, Any] = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, "tensor_cores": True}
_IDS = dict.fromkeys(("row_id_ptr", "column_id_ptr"), "*i64")
_MAJORS = ((8, (80,)), (9, (90,)), (10, (100,)))  # major compute capability, and the architectures compiled for it
_MAJORS_OF_SIGMOID = ((9, (80, 90)), (10, (100,)))


def aot_cases() -> list[TritonCase]:
    """All cases."""
    of_kernels = _vectors, _merge, _softmax_fwd, _sigmoid_fwd, _search, _accumulate, _sigmoid_bwd, _softmax_bwd
    return [case for of_kernel in of_kernels for case in of_kernel()]


def _features(name: str) -> dict[str, str]:
    return {"x_ptr": f"*{name}", "y_ptr": f"*{name}"}


def _numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _multiples(*names: str) -> dict[str, str]:
    """Integers divisible by 16, like the usual widths, strides and split sizes."""
    return dict.fromkeys(names, "i32:16")


def _extras(name: str) -> Iterator[tuple[int, str, dict[str, str], dict[str, None]]]:
    """EXTRAS of the softmax kernels: value, name, types of the pointers it reads, names of the others."""
    teacher = {"teacher_x_ptr": f"*{name}", "teacher_y_ptr": f"*{name}"}
    lines = dict.fromkeys(("teacher_column_ptr", "teacher_pair_ptr"), "*fp32")
    guide = teacher | {"teacher_row_ptr": "*fp32"}
    teacher = guide | lines
    yield 0, "plain", {}, dict.fromkeys(_IDS | teacher)
    yield 1, "ids", _IDS, dict.fromkeys(teacher)
    yield 2, "teacher", _IDS | teacher, {}
    yield triton_tile.GUIDE, "guide", _IDS | guide, dict.fromkeys(lines)


def _vectors() -> Iterator[TritonCase]:
    for name in TRITON_TYPES.values():
        signature = _features(name) | {"target_ptr": "*i64", "pair_ptr": "*fp32"}
        signature |= _numbers("n", "m") | _multiples("e", "stride_x", "stride_y")
        yield TritonCase(f"pairs[{name}]", triton_tile._pairs_kernel, signature, triton_tile.PAIRS_BLOCK)
    for dtype, name in TRITON_TYPES.items():
        signature = _features(name) | {"target_ptr": "*i64", "out_ptr": "*fp32"}
        signature |= _numbers("n", "m") | _multiples("e", "stride_x", "stride_y")
        for major, archs in _MAJORS:
            tile = triton_fwd.softmax_tile(dtype, major, triton_tile.GUIDE)
            label, kernel = f"targets_fwd[{name},sm_{archs[0]}]", triton_targets._targets_fwd_kernel
            yield TritonCase(label, kernel, signature, tile, archs=archs, **_LAUNCH)
    signature = {"lse_ptr": "*fp64", "scale_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    coefficients = {"coefficient_ptr": "*fp64", "unit_ptr": "*fp32"}
    block, kernel = {"BLOCK": triton_tile.VECTOR_BLOCK}, triton_tile._lines_kernel
    yield TritonCase("lines", kernel, signature, block | dict.fromkeys(coefficients))
    yield TritonCase("lines[coefficients]", kernel, signature | coefficients, block)


def _merge() -> Iterator[TritonCase]:
    signature = {"part_ptr": "*fp32", "scale_ptr": "*fp32", "pair_ptr": "*fp32", "out_ptr": "*fp64"}
    signature |= dict.fromkeys(("order_ptr", "start_ptr", "end_ptr"), "*i64") | _numbers("count", "parts")
    for fields in sorted(set(triton_merge.FIELDS)):
        constexprs = {"FIELDS": fields, "BLOCK": triton_merge.MERGE_BLOCK}
        yield TritonCase(f"softmax_merge[{fields}]", triton_merge._softmax_merge_kernel, signature, constexprs)


def _softmax_fwd() -> Iterator[TritonCase]:
    sizes = _numbers("n", "m", "columns", "has_ids", "by_id", "ignore")
    sizes |= _multiples("e", "stride_x", "stride_y", "f", "stride_teacher_x", "stride_teacher_y", "split_size")
    for dtype, name in TRITON_TYPES.items():
        plain = _features(name) | {"scale_ptr": "*fp32", "target_ptr": "*i64"}
        plain |= {"row_ptr": "*fp32", "column_ptr": "*fp32"} | sizes
        for extras, what, read, unread in _extras(name):
            pair: dict[str, Any] = {"pair_ptr": "*fp32"} if extras == 2 else {}
            signature = plain | read | pair
            for major, archs in _MAJORS:
                constexprs: dict[str, Any] = triton_fwd.softmax_tile(dtype, major, extras) | unread
                constexprs |= {} if pair else {"pair_ptr": None}
                constexprs |= {"EXTRAS": extras, "FIELDS": triton_merge.FIELDS[extras]}
                label, kernel = f"softmax_fwd[{name},{what},sm_{archs[0]}]", triton_fwd._softmax_fwd_kernel
                yield TritonCase(label, kernel, signature, constexprs, archs=archs, **_LAUNCH)


def _softmax_bwd() -> Iterator[TritonCase]:
    for dtype, name in TRITON_TYPES.items():
        plain = _features(name) | {"g_ptr": f"*{name}", "target_ptr": "*i64", "unit": "fp32"}
        plain |= dict.fromkeys(("scale_ptr", "at_target_ptr", "line_q_ptr", "line_k_ptr"), "*fp32")
        plain |= _numbers("rows", "cols", "n", "m", "has_ids", "by_id", "ignore")
        plain |= _multiples("row0", "column0", "e", "stride_x", "stride_y", "stride_g")
        plain |= _multiples("f", "stride_teacher_x", "stride_teacher_y")
        for extras, what, read, unread in _extras(name):
            for major, archs in _MAJORS:
                constexprs: dict[str, Any] = triton_bwd.softmax_gradient_tile(dtype, major, extras) | unread
                constexprs |= {"BLOCK_E": depth_block(dtype), "EXTRAS": extras}
                label = f"softmax_gradient_bwd[{name},{what},sm_{archs[0]}]"
                kernel = triton_bwd._softmax_gradient_kernel
                yield TritonCase(label, kernel, plain | read, constexprs, archs=archs, **_LAUNCH)
    signature = {"pair_ptr": "*fp32", "target_ptr": "*i64", "lse_q_ptr": "*fp64", "lse_k_ptr": "*fp64"}
    signature |= {"scale_ptr": "*fp32", "out_ptr": "*fp32", "unit": "fp32"} | _numbers("n", "m", "columns")
    weights = {"coefficient_q_ptr": "*fp64", "coefficient_k_ptr": "*fp64", "unit_ptr": "*fp32"}
    block, kernel = {"BLOCK": triton_bwd.TARGETS_BLOCK}, triton_bwd._at_target_kernel
    yield TritonCase("at_target_bwd[plain]", kernel, signature, block | dict.fromkeys(weights))
    yield TritonCase("at_target_bwd", kernel, signature | weights, block)


def _positives(ids: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Types of the positives' pointers that the sigmoid kernels read, and names of the others."""
    targets = {"target_ptr": "*i64", "pair_ptr": "*fp32"}
    return (_IDS, dict.fromkeys(targets)) if ids else (targets, dict.fromkeys(_IDS))


def _sigmoid_fwd() -> Iterator[TritonCase]:
    sizes = _numbers("n", "m") | _multiples("e", "stride_x", "stride_y", "split_size")
    for dtype, name in TRITON_TYPES.items():
        signature = _features(name) | dict.fromkeys(("scale_ptr", "bias_ptr", "sums_ptr"), "*fp32") | sizes
        for major, archs in _MAJORS_OF_SIGMOID:
            for ids in (False, True):
                read, unread = _positives(ids)
                constexprs = triton_sigmoid.sigmoid_tile(dtype, major, ids) | unread
                constexprs |= {"BLOCK_E": depth_block(dtype), "IDS": ids}
                label = f"sigmoid_fwd[{name},{'ids' if ids else 'plain'},sm_{archs[0]}]"
                options = {"archs": archs, "options": {"enable_fp_fusion": False}, **_LAUNCH}
                yield TritonCase(label, triton_sigmoid._sigmoid_fwd_kernel, signature | read, constexprs, **options)


def _sigmoid_bwd() -> Iterator[TritonCase]:
    for dtype, name in TRITON_TYPES.items():
        signature = _features(name) | {"g_ptr": f"*{name}", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "unit": "fp32"}
        signature |= _numbers("rows", "cols")
        signature |= _multiples("row0", "column0", "e", "stride_x", "stride_y", "stride_g")
        for major, archs in _MAJORS_OF_SIGMOID:
            for ids in (False, True):
                read, unread = _positives(ids)
                constexprs = triton_gradients.gradient_tile(dtype, major) | unread
                constexprs |= {"BLOCK_E": depth_block(dtype), "IDS": ids}
                label = f"sigmoid_gradient_bwd[{name},{'ids' if ids else 'plain'},sm_{archs[0]}]"
                kernel = triton_sigmoid._sigmoid_gradient_kernel
                yield TritonCase(label, kernel, signature | read, constexprs, archs=archs, **_LAUNCH)


def _accumulate() -> Iterator[TritonCase]:
    for dtype, name in TRITON_TYPES.items():
        operands = {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "sum_ptr": "*fp32", "out_ptr": f"*{name}"}
        operands |= {"factor_ptr": "*fp32"} | _numbers("rows", "depth", "first", "last")
        operands |= _multiples("e", "stride_b", "stride_out")
        constexprs = {**triton_gradients.TILE, "BLOCK_K": depth_block(dtype)}
        # G as stored, and transposed. Triton specialises on a stride of 1.
        for what, long, unit in (("dx", "stride_a_row", "stride_a_depth"), ("dy", "stride_a_depth", "stride_a_row")):
            label, signature = f"accumulate_{what}_bwd[{name}]", operands | _multiples(long)
            kernel = triton_gradients._accumulate_kernel
            yield TritonCase(label, kernel, signature, constexprs | {unit: 1}, **_LAUNCH)


def _search() -> Iterator[TritonCase]:
    sizes = _numbers("n", "m") | _multiples("e", "stride_x", "stride_y", "split_size")
    ids = dict.fromkeys(("seed_ptr", "target_ptr", "index_ptr"), "*i64") | _IDS
    for dtype, name in TRITON_TYPES.items():
        features = _features(name) | sizes
        block = {**triton_tile.SMALL_TILE, "BLOCK_E": depth_block(dtype)}
        sample = features | ids | {"scale_ptr": "*fp32", "best_ptr": "*fp32", "has_ids": "i32"}
        yield TritonCase(f"sample_fwd[{name}]", triton_search._sample_fwd_kernel, sample, block, **_LAUNCH)
        topk = features | {"ceiling_ptr": "*i64", "key_ptr": "*i64"}
        for kept in triton_search.KEPT:
            constexprs = triton_search.topk_tile(dtype, kept) | {"K": kept}
            yield TritonCase(f"topk_fwd[{name},{kept}]", triton_search._topk_fwd_kernel, topk, constexprs, **_LAUNCH)

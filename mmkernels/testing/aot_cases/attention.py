"""Every Triton configuration of attention and its parts.

For `attention` one head dim per tile size and a padded one, on each architecture, because tiles differ: without
options, with a pattern, bias, sink and dropout, and with all of them. For the parts, every kind of launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mmkernels.ops.attention import triton_bwd, triton_fwd
from mmkernels.ops.attention.additive import triton_bwd as additive_bwd
from mmkernels.ops.attention.additive import triton_fwd as additive_fwd
from mmkernels.ops.attention.gate import triton_bwd as gate_bwd
from mmkernels.ops.attention.gate import triton_fwd as gate_fwd
from mmkernels.ops.attention.rope import triton_bwd as rope_bwd
from mmkernels.ops.attention.rope import triton_fwd as rope_fwd
from mmkernels.ops.attention.triton_fwd import Extras, Heads
from mmkernels.ops.attention.types import MaskRows
from mmkernels.ops.triton_common import block_dim
from mmkernels.testing.aot import TRITON_ARCHS, TritonCase

__all__ = ["aot_cases"]


def aot_cases() -> list[TritonCase]:
    """All cases, as launched."""
    return [*_attention(), *_additive(), *_gate(), *_rope()]


def _heads(kind: str) -> Heads:
    return Heads(f"*{kind}", "i32:16", "i32:16")


def _rows(given: int) -> MaskRows:
    """MaskRows with its first `given` vectors present."""
    return MaskRows(*["*i32"] * given, *[None] * (len(MaskRows._fields) - given))  # type: ignore[arg-type]


def _case(
    name: str, kernel: Any, signature: dict[str, Any], sizes: dict[str, Any], config: dict[str, Any], **more: Any
) -> TritonCase:
    """A case with a launcher's configuration: tiles and launch options."""
    blocks = {name: value for name, value in config.items() if name.startswith("BLOCK")}
    launch = {name: value for name, value in config.items() if name not in blocks}
    return TritonCase(name, kernel, signature, sizes | blocks, **launch, **more)


# (dtype, head dim)
_BARE = (("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 64), ("fp32", 128))
_RICH = (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128))

# The fields of Extras after the scale, and how many of them a launch of each register pressure has.
_EXTRAS = ("*fp32", "i32", "i32", "*fp32", "*i64", "i32", "fp32", "fp32", "fp32", "*fp32")
_OF_PRESSURE = (0, 7, 10)
_ROWS = (4, 11, 12)


def _attention() -> Iterator[TritonCase]:
    launches = [(*launch, 0) for launch in _BARE] + [(*launch, p) for launch in _RICH for p in (1, 2)]
    for arch, (kind, D, pressure) in itertools.product(TRITON_ARCHS, launches):
        label = f"[{kind},D={D}{('', ',pattern bias dropout', ',all options')[pressure]},sm_{arch}]"
        x, block = _heads(kind), block_dim(D)
        of_extras = _EXTRAS[: _OF_PRESSURE[pressure]] + (None,) * (len(_EXTRAS) - _OF_PRESSURE[pressure])
        inputs: dict[str, Any] = {
            **dict.fromkeys(("q", "k", "v"), x),
            "lse_ptr": "*fp32",
            "rows": _rows(_ROWS[pressure]),
            "extras": Extras("fp32", *of_extras),
            **dict.fromkeys(("Tq", "Tk", "group"), "i32"),
        }
        grads = inputs | {"do": x, "delta_ptr": "*fp32"}
        sums = "*fp32" if pressure else None, "*fp32" if pressure == 2 else None
        sizes = {"D": D, "DV": D, "BLOCK_D": block, "BLOCK_DV": block}
        case, more = (pressure, kind == "fp32", D, arch // 10), {"tensor_cores": True, "archs": (arch,)}
        of_max = "*fp32" if pressure == 2 else None
        kernel, config = triton_fwd._attention_fwd_kernel, triton_fwd.fwd_config(*case)
        yield _case(f"attention_fwd{label}", kernel, inputs | {"out": x, "row_max_ptr": of_max}, sizes, config, **more)
        kernel, config = triton_bwd._attention_dkdv_kernel, triton_bwd.dkdv_config(*case)
        yield _case(f"attention_dkdv{label}", kernel, grads | {"dk": x, "dv": x}, sizes, config, **more)
        kernel, config = triton_bwd._attention_dq_kernel, triton_bwd.dq_config(*case)
        classes = {"BLOCK_C": 32 if pressure else 16}
        for of_classes, of_distances in triton_bwd.sums_of_launches(*sums, kind == "fp32", D):
            of_sums = {"row_sums_ptr": of_classes, "distance_sums_ptr": of_distances, "dlse_ptr": sums[0]}
            what = "dq" if (of_classes, of_distances) == sums else "dq_by_class" if of_classes else "dq_by_distance"
            signature = grads | of_sums | {"dq": x}
            yield _case(f"attention_{what}{label}", kernel, signature, sizes | classes, config, **more)
        if not pressure:
            signature = {"do": x, "out": x, "dlse_ptr": "*fp32", "delta_ptr": "*fp32", "Tq": "i32"}
            sizes = {"DV": D, "BLOCK_DV": block, "BLOCK_M": triton_bwd.DELTA_BLOCK_M}
            kernel = triton_bwd._attention_delta_kernel
            yield _case(f"attention_delta{label}", kernel, signature, sizes, {}, archs=(arch,))


# (dtype, head dim, with a pattern)
_ADDITIVE = (
    ("bf16", 64, False),
    ("bf16", 128, True),
    ("bf16", 256, False),
    ("fp32", 64, False),
    ("fp32", 128, True),
)


def _additive() -> Iterator[TritonCase]:
    for kind, D, pattern in _ADDITIVE:
        label, single = f"[{kind},D={D}{',pattern' * pattern}]", kind == "fp32"
        x, block = _heads(kind), block_dim(D)
        inputs = {
            **dict.fromkeys(("q", "k", "v"), x),
            **dict.fromkeys(("w_ptr", "bias_ptr", "lse_ptr"), "*fp32"),
            "rows": _rows(8 if pattern else 4),
            **dict.fromkeys(("Tq", "Tk", "group"), "i32"),
        }
        grads = inputs | {"do": x, "delta_ptr": "*fp32"}
        sizes = {"D": D, "DV": D, "BLOCK_DV": block}
        kernel, config = additive_fwd._additive_fwd_kernel, additive_fwd.fwd_config(single, D)
        yield _case(f"additive_fwd{label}", kernel, inputs | {"out": x}, sizes, config, tensor_cores=True)
        sizes |= {"BLOCK_D": block}
        outputs = {"dq": _heads("fp32"), "dlse_ptr": None if single else "*fp32", "dw_ptr": "*fp32", "heads": "i32"}
        kernel, config = additive_bwd._additive_dq_kernel, additive_bwd.dq_config(single, D)
        yield _case(f"additive_dq{label}", kernel, grads | outputs, sizes, config, tensor_cores=True)
        kernel, config = additive_bwd._additive_dkdv_kernel, additive_bwd.dkdv_config(single, D)
        yield _case(f"additive_dkdv{label}", kernel, grads | {"dk": x, "dv": x}, sizes, config, tensor_cores=True)


# (residual's dtype, x's dtype, width, gates by column): equal dtypes and a wider residual.
_GATE = (
    ("bf16", "bf16", 4096, True),
    ("bf16", "bf16", 128, False),
    ("fp32", "bf16", 1024, False),
    ("fp32", "fp32", 80, True),
)


def _gate() -> Iterator[TritonCase]:
    for residual, x, width, by_column in _GATE:
        label = f"[{residual}+{x},C={width},{'column' if by_column else 'row'}]"
        inputs = {
            "x_ptr": f"*{x}",
            "gate_ptr": "*fp32",
            "stride_xn": "i32:16",
            "N": "i32",
            "C": "i32:16",
            "gates": "i32",
        }
        outputs = dict.fromkeys(("residual_ptr", "out_ptr"), f"*{residual}") | {"stride_rn": "i32:16"}
        sizes, config = {"BY_COLUMN": by_column}, gate_fwd.tile(width)
        kernel = gate_fwd._gated_residual_fwd_kernel
        yield _case(f"gated_residual_fwd{label}", kernel, inputs | outputs, sizes, config)
        grads = {"grad_out_ptr": f"*{residual}", "dx_ptr": f"*{x}", "sums_ptr": "*fp32"}
        grads |= {"stride_gn": "i32:16", "tiles": "i32"}
        kernel = gate_bwd._gated_residual_bwd_kernel
        yield _case(f"gated_residual_bwd{label}", kernel, inputs | grads, sizes, config)


# (dtype, head dim, rotary dim, norm, weight, bias, interleaved): with and without each, and both pair layouts.
_ROPE = (
    ("bf16", 128, 128, "rms", True, False, False),
    ("bf16", 256, 256, "layer", True, True, True),
    ("bf16", 64, 32, "rms", True, False, False),
    ("bf16", 72, 0, "layer", True, True, False),
    ("bf16", 128, 128, "", False, False, False),
    ("fp32", 80, 80, "rms", False, False, False),
    ("fp32", 1024, 512, "layer", True, True, False),
)


def _rope() -> Iterator[TritonCase]:
    for kind, D, R, norm, weight, bias, interleaved in _ROPE:
        label = f"[{kind},D={D},R={R},{norm or 'no norm'}{',interleaved' * interleaved}]"
        inputs: dict[str, Any] = {
            "x": _heads(kind),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            "weight_ptr": "*fp32" if weight else None,
            **dict.fromkeys(("rows", "heads", "table_rows"), "i32"),
            "eps": "fp32",
        }
        sizes, config = {"NORM": rope_fwd.NORMS[norm]}, rope_fwd.tile(D, R // 2, interleaved)
        outputs: dict[str, Any] = {"bias_ptr": "*fp32" if bias else None, "y_ptr": f"*{kind}"}
        kernel = rope_fwd._norm_rope_fwd_kernel
        yield _case(f"norm_rope_fwd{label}", kernel, inputs | outputs, sizes | config, {})
        outputs = {"grad_out": _heads(kind), "dx_ptr": f"*{kind}", "tiles": "i32"}
        outputs |= dict.fromkeys(("dweight_ptr", "dbias_ptr"), "*fp32")
        kernel = rope_bwd._norm_rope_bwd_kernel
        yield _case(f"norm_rope_bwd{label}", kernel, inputs | outputs, sizes | config, {})

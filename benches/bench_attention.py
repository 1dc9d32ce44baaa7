"""Attention against what a user would otherwise call: SDPA, FlexAttention, flash-attn, xformers.

python benches/bench_attention.py --help

The baseline, "plain PyTorch", is `F.scaled_dot_product_attention`: without a mask for dense, with `is_causal` for
causal, with the equivalent dense bool mask for segments. What does not depend on q, k and v is made beforehand, as a
trainer makes it once per batch: our rows, SDPA's dense mask, FlexAttention's block mask; neither its time nor its
memory counts. TFLOP/s count visible query-key pairs alone: 4 D per pair and head forward, 10 D backward (the five
products that no algorithm can do without), so a kernel that computes what is masked shows it as a lower rate.

All backends of ours that can serve the device are measured, unless `--backend` names some. The kernels have to pass
the harness's float64 gate. The reference, beside a faster backend, only has to agree with SDPA as other packages do: it
is plain PyTorch itself, and in float32 its long plain sums (dv of the first keys of a causal mask) err by more than the
gate leaves room for. `--backend reference` holds it to the gate, which therefore fails there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Options, Work, main

from mmkernels.ops.attention import AttentionMask, attention
from mmkernels.runtime import backends
from mmkernels.testing.attention import cu_seqlens

Params = Mapping[str, Any]
Outputs = tuple[torch.Tensor, ...]
Run = Callable[[Inputs], Outputs]

_DTYPES = ("float32", "bfloat16")
_REFERENCE = "reference backend"
_REFERENCE_SCORES = 2**30  # bytes; the reference holds a few such matrices


@dataclass(frozen=True)
class Kind:
    """A mask: segments of the tokens, and what a token sees of its own. `point`, `quick`, `gate` are sizes."""

    name: str
    point: Params
    quick: Params
    gate: Params
    causal: bool = False

    def lengths(self, p: Params) -> list[int]:
        """T tokens in one segment; or S segments of L tokens, of 1 to L in "tiny"."""
        if "T" in p:
            return [p["T"]]
        if self.name == "tiny":
            return np.random.default_rng(0).integers(1, p["L"] + 1, p["S"]).tolist()
        return [p["L"]] * p["S"]

    def pairs(self, p: Params) -> int:
        """Visible query-key pairs."""
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths(p))


_ONE = {"point": {"T": 2048}, "quick": {"T": 256}, "gate": {"T": 256}}
_SEGMENTS = {"point": {"S": 32, "L": 256}, "quick": {"S": 4, "L": 64}, "gate": {"S": 5, "L": 60}}
KINDS = [
    Kind("dense", **_ONE),
    Kind("causal", **_ONE, causal=True),
    Kind("packed", **_SEGMENTS),
    Kind("packed causal", **_SEGMENTS, causal=True),
    Kind("tiny", point={"S": 1024, "L": 16}, quick={"S": 32, "L": 16}, gate={"S": 40, "L": 16}),
]

# Inputs


def setup(kind: Kind, backward: bool, p: Params, device: torch.device) -> Inputs:
    torch.compiler.reset()  # a compilation per point: torch.compile gives up after eight of one function
    lengths, dtype = kind.lengths(p), getattr(torch, p["dtype"])
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(tokens, p["H"], p["D"], generator=generator).to(device, dtype).requires_grad_(backward and leaf)
        for leaf in (True, True, True, False)
    )
    boundaries = cu_seqlens(lengths, device)
    mask = AttentionMask.packed(boundaries, causal=kind.causal) if kind.causal or len(lengths) > 1 else None
    dense_mask = mask.to_dense(tokens, tokens) if mask is not None and len(lengths) > 1 else None
    return {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad_out,
        "mask": mask,
        "dense_mask": dense_mask,
        "block_mask": block_mask(lengths, kind.causal, device),
        "causal": kind.causal,
        "lengths": lengths,
        "slot": padded_slots(lengths, device),
        "cu_seqlens_q": boundaries,
        "cu_seqlens_k": boundaries,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
    }


def padded_slots(lengths: list[int], device: torch.device) -> torch.Tensor:
    """int64 [T]: each token's row in a batch that is padded to its longest segment."""
    slots = [segment * max(lengths) + np.arange(n) for segment, n in enumerate(lengths)]
    return torch.from_numpy(np.concatenate(slots)).to(device)


def block_mask(lengths: list[int], causal: bool, device: torch.device) -> Any:
    """FlexAttention's mask; None for dense."""
    if len(lengths) == 1 and not causal:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        same = segment[i] == segment[j]
        return same & (i >= j) if causal else same

    return create_block_mask(visible, None, None, len(segment), len(segment), device=str(device))


# Contenders: inputs -> out [T, H, D]


def heads_first(inputs: Inputs) -> list[torch.Tensor]:
    """q, k, v as SDPA takes them: [1, H, T, D]."""
    return [inputs[name].transpose(0, 1)[None] for name in "qkv"]


def ours(inputs: Inputs, backend: str | None) -> torch.Tensor:
    out = attention(inputs["q"], inputs["k"], inputs["v"], inputs["mask"], backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


def sdpa(inputs: Inputs) -> torch.Tensor:
    """The baseline, and in float64 the truth."""
    masked = inputs["dense_mask"] is not None
    causal = inputs["causal"] and not masked
    out = F.scaled_dot_product_attention(*heads_first(inputs), attn_mask=inputs["dense_mask"], is_causal=causal)
    return out[0].transpose(0, 1)


def sdpa_by_segment(inputs: Inputs) -> torch.Tensor:
    """No masked pair is computed, at the price of a call per segment."""
    parts = zip(*(x.split(inputs["lengths"], 2) for x in heads_first(inputs)), strict=True)
    outs = [F.scaled_dot_product_attention(*part, is_causal=inputs["causal"]) for part in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def sdpa_padded(inputs: Inputs) -> torch.Tensor:
    """A batch padded to the longest segment. Padding lies at the end, so causality alone hides it; else a mask does."""
    lengths, slot, longest = inputs["lengths"], inputs["slot"], inputs["max_seqlen_q"]
    ragged = len(slot) != len(lengths) * longest

    def pad(x: torch.Tensor) -> torch.Tensor:
        if ragged:
            x = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, slot, x)
        return x.unflatten(0, (len(lengths), longest)).transpose(1, 2)

    mask = None
    if ragged and not inputs["causal"]:
        mask = torch.arange(longest, device=slot.device) < inputs["cu_seqlens_k"].diff()[:, None, None, None]
    q, k, v = (pad(inputs[name]) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=inputs["causal"])
    out = out.transpose(1, 2).flatten(0, 1)
    return out.index_select(0, slot) if ragged else out


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> torch.Tensor:
    return compiled_flex()(*heads_first(inputs), block_mask=inputs["block_mask"])[0].transpose(0, 1)


def outputs_of(call: Callable[..., torch.Tensor], backward: bool, inputs: Inputs, *backend: str | None) -> Outputs:
    """out, and with `backward` dq, dk and dv."""
    out = call(inputs, *backend)
    if not backward:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, [inputs["q"], inputs["k"], inputs["v"]], inputs["grad_out"])


# Cases


def requested() -> tuple[torch.device, bool]:
    """The device of this run and whether backends were named.

    Which backends are contenders depends on both, and the harness reads its options when the cases are there already.
    """
    if sys.argv[1:2] == ["--measure-memory"]:
        request = json.loads(sys.argv[2])
        return torch.device(request["device"]), bool(request["backend"])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default=Options.device)
    parser.add_argument("--backend", nargs="*")
    known, _ = parser.parse_known_args()
    return torch.device(known.device), bool(known.backend)


def further_backends(device: torch.device) -> list[str]:
    """Those that can serve beside the one that `backend=None` picks; Triton's interpreter is not there to be timed."""
    default = default_backend(device)
    served = backends.candidates("attention", device, torch.float32)
    return [
        name
        for name, reason in served.items()
        if reason is None and name != default and not (name == "triton" and device.type == "cpu")
    ]


def default_backend(device: torch.device) -> str:
    return backends.resolve("attention", torch.empty(0, device=device))


def limits(kind: Kind, backward: bool, device: torch.device, p: Params, contender: str) -> str | None:
    if contender == "FlexAttention" and backward and device.type == "cpu":
        return "forward only on a CPU"
    default_is_reference = contender == "mmkernels" and default_backend(device) == "reference"
    if contender in (_REFERENCE, "mmkernels [reference]") or default_is_reference:
        size = p["H"] * sum(kind.lengths(p)) ** 2 * 4
        if size > _REFERENCE_SCORES:
            return f"a score matrix of {size / 2**30:.1f} GiB"
    return None


def work(kind: Kind, backward: bool, p: Params) -> Work:
    return Work(flops=(14 if backward else 4) * kind.pairs(p) * p["H"] * p["D"])


def case(kind: Kind, backward: bool, device: torch.device, backends_named: bool) -> Case:
    calls: dict[str, Callable[..., torch.Tensor]] = {}
    if "S" in kind.point:
        calls |= {"SDPA by segment": sdpa_by_segment, "SDPA padded": sdpa_padded}
    calls["FlexAttention"] = flex
    if not backends_named:
        for name in further_backends(device):
            calls[_REFERENCE if name == "reference" else f"mmkernels [{name}]"] = partial(ours, backend=name)
    return Case(
        name=f"{kind.name} {'fwd+bwd' if backward else 'fwd'}",
        grid=[{**kind.point, "H": 8, "D": 64, "dtype": dtype} for dtype in _DTYPES],
        quick=[{**kind.quick, "H": 2, "D": 64, "dtype": dtype} for dtype in _DTYPES],
        gate={**kind.gate, "H": 2},
        setup=partial(setup, kind, backward),
        ours=partial(outputs_of, ours, backward),
        plain=partial(outputs_of, sdpa, backward),
        others={name: partial(outputs_of, call, backward) for name, call in calls.items()},
        # The adapters compute gradients always.
        peers={"flash_attn": "varlen", "xformers": "block_diagonal"} if backward else {},
        work=partial(work, kind, backward),
        outputs=("out", "dq", "dk", "dv") if backward else ("out",),
        limits=partial(limits, kind, backward, device),
    )


if __name__ == "__main__":
    device, backends_named = requested()
    main("attention", [case(kind, backward, device, backends_named) for kind in KINDS for backward in (False, True)])

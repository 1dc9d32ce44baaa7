"""Attention against SDPA, FlexAttention, flash-attn and xformers.

python benches/bench_attention.py --help

The baseline, "plain PyTorch", is `F.scaled_dot_product_attention`: without a mask for dense, with `is_causal` for
causal, with the equivalent dense bool mask for everything else. Whatever does not depend on q, k and v is built
beforehand, as a trainer would once per batch: our rows, SDPA's dense mask, FlexAttention's block mask. Its time and
memory do not count; separate columns show the build time and FlexAttention's compile time. TFLOP/s count only visible
query-key pairs: 4 D per pair and head forward, 10 D backward (five matmuls, the minimum), so computing masked pairs
shows as a lower rate.

All our backends available on the device are measured, unless `--backend` names some. The kernels must pass the
harness's float64 gate. The reference, next to a faster backend, only has to agree with SDPA, as other packages do: it
is plain PyTorch, and in float32 its long plain sums (dv of the first keys of a causal mask) exceed the gate. `--backend
reference` applies the gate to it, which therefore fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Options, Work, main
from torch import Tensor

from mmkernels.ops.attention import AttentionMask, attention
from mmkernels.runtime import backends
from mmkernels.testing.packing import cu_seqlens_of

Params = Mapping[str, Any]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

_DTYPES = ("float32", "bfloat16")
_SDPA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_REFERENCE = "reference backend"
_REFERENCE_SCORES = 2**30  # bytes; the reference holds several such matrices


@dataclass(frozen=True)
class Kind:
    """A mask: the samples, and what a token sees of its sample. `point`, `quick`, `gate` are sizes.

    T: tokens in one sample. S, L: samples, and tokens in each (1 to L in "tiny"). Images have I tokens each, after as
    many tokens of text ("image spans"), or M of them precede a sample's text ("media").
    """

    name: str
    point: Params
    quick: Params
    gate: Params
    causal: bool = False

    def lengths(self, p: Params) -> tuple[list[int], list[int]]:
        """Tokens of q and of k in each sample."""
        if "T" in p:
            return [p["T"]], [p["T"]]
        if self.name == "tiny":
            lengths = np.random.default_rng(0).integers(1, p["L"] + 1, p["S"]).tolist()
            return lengths, lengths
        return [p["L"]] * p["S"], [p["M"] * p["I"] if "M" in p else p["L"]] * p["S"]

    def mask(self, p: Params, device: torch.device) -> AttentionMask | None:
        lengths_q, lengths_k = self.lengths(p)
        cu_q, cu_k = cu_seqlens_of(lengths_q, device), cu_seqlens_of(lengths_k, device)
        if "M" in p:
            media_q, media_k = self.media_ids(p, device)
            return AttentionMask.media(cu_q, cu_k, media_q, media_k)
        if "I" in p:
            span = self.span_ids(p, device)
            return AttentionMask.multimodal(cu_q, (span >= 0).byte(), span)
        return AttentionMask.packed(cu_q, causal=self.causal) if self.causal or len(lengths_q) > 1 else None

    def span_ids(self, p: Params, device: torch.device) -> Tensor:
        """Alternating text and images: int32 [tokens]."""
        position = torch.arange(p["L"], dtype=torch.int32, device=device).repeat(p["S"])
        part = position // p["I"]
        return torch.where(part % 2 == 1, part // 2, -1)

    def media_ids(self, p: Params, device: torch.device) -> tuple[Tensor, Tensor]:
        """Media spread evenly over the text, the first one after the first part of the text."""
        text = torch.arange(p["L"], dtype=torch.int32, device=device) * (p["M"] + 1) // p["L"] - 1
        keys = torch.arange(p["M"] * p["I"], dtype=torch.int32, device=device) // p["I"]
        return text.repeat(p["S"]), keys.repeat(p["S"])

    def pairs(self, p: Params) -> int:
        """Visible query-key pairs."""
        tokens_q, tokens_k = (sum(lengths) for lengths in self.lengths(p))
        mask = self.mask(p, torch.device("cpu"))
        return tokens_q * tokens_k if mask is None else round(mask.density(tokens_q, tokens_k) * tokens_q * tokens_k)


_ONE = {"point": {"T": 2048}, "quick": {"T": 256}, "gate": {"T": 256}}
_SEGMENTS = {"point": {"S": 32, "L": 256}, "quick": {"S": 4, "L": 64}, "gate": {"S": 5, "L": 60}}
KINDS = [
    Kind("dense", **_ONE),
    Kind("causal", **_ONE, causal=True),
    Kind("packed", **_SEGMENTS),
    Kind("packed causal", **_SEGMENTS, causal=True),
    Kind(
        "image spans",
        point={"S": 8, "L": 1024, "I": 256},
        quick={"S": 2, "L": 128, "I": 32},
        gate={"S": 3, "L": 100, "I": 20},
    ),
    Kind(
        "media",
        point={"S": 8, "L": 512, "M": 4, "I": 64},
        quick={"S": 2, "L": 64, "M": 2, "I": 16},
        gate={"S": 3, "L": 60, "M": 3, "I": 20},
    ),
    Kind("tiny", point={"S": 1024, "L": 16}, quick={"S": 32, "L": 16}, gate={"S": 40, "L": 16}),
]

# Inputs


def setup(kind: Kind, backward: bool, p: Params, device: torch.device) -> Inputs:
    torch.compiler.reset()  # compile per point: torch.compile gives up after eight compilations of a function
    (lengths_q, lengths_k), dtype = kind.lengths(p), getattr(torch, p["dtype"])
    tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(tokens, p["H"], p["D"], generator=generator).to(device, dtype).requires_grad_(backward and leaf)
        for tokens, leaf in ((tokens_q, True), (tokens_k, True), (tokens_k, True), (tokens_q, False))
    )

    def laid_out() -> AttentionMask | None:
        mask = kind.mask(p, device)
        if mask is not None:
            mask.rows(tokens_q, tokens_k)
        return mask

    mask, build = timed(laid_out, device)
    inputs = {"q": q, "k": k, "v": v, "grad_out": grad_out, "mask": mask, "build": build, "block_mask": None}
    dense = mask is not None and not (kind.causal and len(lengths_q) == 1)
    inputs["dense_mask"] = mask.to_dense(tokens_q, tokens_k) if mask is not None and dense else None
    # SDPA is undefined, and gives NaN, for rows that see nothing; models zero them.
    inputs["blind"] = ~inputs["dense_mask"].any(1) if "M" in p else None
    if "M" in p:
        inputs["dense_mask"] |= inputs["blind"][:, None]
    return inputs | {
        "kind": kind,
        "params": p,
        "causal": kind.causal,
        "lengths": lengths_q,
        "lengths_k": lengths_k,
        "slot": padded_slots(lengths_q, device),
        "cu_seqlens_q": cu_seqlens_of(lengths_q, device),
        "cu_seqlens_k": cu_seqlens_of(lengths_k, device),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "figures": {},
    }


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """A call's result and its milliseconds, the minimum of three."""
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return result, min(times)


def padded_slots(lengths: list[int], device: torch.device) -> Tensor:
    """int64 [T]: each token's row in a batch padded to the longest segment."""
    slots = [segment * max(lengths) + np.arange(n) for segment, n in enumerate(lengths)]
    return torch.from_numpy(np.concatenate(slots)).to(device)


def block_mask(inputs: Inputs) -> Any:
    """FlexAttention's mask; None for dense. Its mask function reads O(tokens) metadata, as ours does."""
    kind, p, device = inputs["kind"], inputs["params"], inputs["q"].device
    if inputs["mask"] is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    def owners(lengths: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    of_q, of_k = owners(inputs["lengths"]), owners(inputs["lengths_k"])
    span = kind.span_ids(p, device) if "I" in p and "M" not in p else None
    media_q, media_k = kind.media_ids(p, device) if "M" in p else (None, None)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = of_q[i] == of_k[j]
        if media_q is not None and media_k is not None:
            return same & (media_q[i] == media_k[j])
        if span is not None:
            return same & ((i >= j) | ((span[i] == span[j]) & (span[i] >= 0)))
        return same & (i >= j) if kind.causal else same

    return create_block_mask(visible, None, None, len(of_q), len(of_k), device=str(device))


# Contenders: inputs -> out [T, H, D]


def heads_first(inputs: Inputs) -> list[Tensor]:
    """q, k, v as SDPA takes them: [1, H, T, D]."""
    return [inputs[name].transpose(0, 1)[None] for name in "qkv"]


def ours(inputs: Inputs, backend: str | None) -> Tensor:
    inputs["figures"] = {"mask build ms": inputs["build"]} if inputs["mask"] is not None else {}
    out = attention(inputs["q"], inputs["k"], inputs["v"], inputs["mask"], backend=backend)
    assert isinstance(out, Tensor)
    return out


def sdpa(inputs: Inputs) -> Tensor:
    """The baseline, and in float64 the ground truth."""
    inputs["figures"] = {}
    masked = inputs["dense_mask"] is not None
    causal = inputs["causal"] and not masked
    out = F.scaled_dot_product_attention(*heads_first(inputs), attn_mask=inputs["dense_mask"], is_causal=causal)
    out = out[0].transpose(0, 1)
    return out if inputs["blind"] is None else out.masked_fill(inputs["blind"][:, None, None], 0)


def sdpa_on(backend: str, inputs: Inputs) -> Tensor:
    """SDPA on one of its backends, which raises for unsupported inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return sdpa(inputs)


def sdpa_by_segment(inputs: Inputs) -> Tensor:
    """Computes no masked pair, at the cost of a call per segment."""
    inputs["figures"] = {}
    parts = zip(*(x.split(inputs["lengths"], 2) for x in heads_first(inputs)), strict=True)
    outs = [F.scaled_dot_product_attention(*part, is_causal=inputs["causal"]) for part in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def sdpa_padded(inputs: Inputs) -> Tensor:
    """A batch padded to the longest segment. Padding is at the end, so causality alone hides it; otherwise a mask does.

    Samples of one length need no padding; if a token sees only part of its sample, each has a dense mask.
    """
    inputs["figures"] = {}
    lengths, slot, longest = inputs["lengths"], inputs["slot"], inputs["max_seqlen_q"]
    ragged = len(slot) != len(lengths) * longest

    def pad(x: Tensor) -> Tensor:
        if ragged:
            x = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, slot, x)
        return x.unflatten(0, (len(lengths), -1)).transpose(1, 2)

    mask = None
    if "I" in inputs["params"]:
        mask = sample_masks(inputs)
    elif ragged and not inputs["causal"]:
        mask = torch.arange(longest, device=slot.device) < inputs["cu_seqlens_k"].diff()[:, None, None, None]
    q, k, v = (pad(inputs[name]) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=inputs["causal"])
    out = out.transpose(1, 2).flatten(0, 1)
    if inputs["blind"] is not None:
        out = out.masked_fill(inputs["blind"][:, None, None], 0)
    return out.index_select(0, slot) if ragged else out


def sample_masks(inputs: Inputs) -> Tensor:
    """bool [S, 1, Lq, Lk], built once."""
    if "sample_masks" not in inputs:
        blocks = inputs["dense_mask"].unflatten(1, (len(inputs["lengths_k"]), -1))
        blocks = blocks.unflatten(0, (len(inputs["lengths"]), -1))  # [S, Lq, S, Lk]
        inputs["sample_masks"] = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)[:, None].contiguous()
    return inputs["sample_masks"]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Tensor:
    def attend() -> Tensor:
        out = compiled_flex()(*heads_first(inputs), block_mask=inputs["block_mask"])
        return out[0].transpose(0, 1)

    if "flex figures" not in inputs:
        device = inputs["q"].device
        inputs["block_mask"], build = timed(partial(block_mask, inputs), device)
        begin = time.perf_counter()
        attend()
        compiling = time.perf_counter() - begin
        inputs["flex figures"] = {"compile s": compiling} | ({"mask build ms": build} if inputs["block_mask"] else {})
    inputs["figures"] = inputs["flex figures"]
    return attend()


def outputs_of(call: Callable[..., Tensor], backward: bool, inputs: Inputs, *backend: str | None) -> Outputs:
    """out, and with `backward` dq, dk and dv."""
    out = call(inputs, *backend)
    if not backward:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, [inputs["q"], inputs["k"], inputs["v"]], inputs["grad_out"])


# Cases


def requested() -> tuple[torch.device, bool]:
    """The device of this run and whether backends were named.

    Both determine the contenders, and the harness parses its options only after the cases exist.
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
    """Available backends besides the one that `backend=None` picks, without Triton's interpreter."""
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
        tokens_q, tokens_k = (sum(lengths) for lengths in kind.lengths(p))
        size = p["H"] * tokens_q * tokens_k * 4
        if size > _REFERENCE_SCORES:
            return f"a score matrix of {size / 2**30:.1f} GiB"
    return None


def work(kind: Kind, backward: bool, p: Params) -> Work:
    return Work(flops=(14 if backward else 4) * kind.pairs(p) * p["H"] * p["D"])


def case(kind: Kind, backward: bool, device: torch.device, backends_named: bool) -> Case:
    calls: dict[str, Callable[..., Tensor]] = {}
    if "S" in kind.point and "I" not in kind.point:
        calls["SDPA by segment"] = sdpa_by_segment
    if "S" in kind.point:
        calls["SDPA padded"] = sdpa_padded
    if device.type == "cuda":
        calls |= {f"SDPA [{name}]": partial(sdpa_on, name) for name in _SDPA_BACKENDS}
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
        # The adapters always compute gradients.
        peers={"flash_attn": "varlen", "xformers": "block_diagonal"} if backward and "I" not in kind.point else {},
        work=partial(work, kind, backward),
        outputs=("out", "dq", "dk", "dv") if backward else ("out",),
        limits=partial(limits, kind, backward, device),
        figures=lambda _, inputs: inputs["figures"],
    )


if __name__ == "__main__":
    device, backends_named = requested()
    main("attention", [case(kind, backward, device, backends_named) for kind in KINDS for backward in (False, True)])

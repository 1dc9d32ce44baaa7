"""Attention against SDPA, FlexAttention, flash-attn and xformers.

"plain PyTorch" is `F.scaled_dot_product_attention`: without a mask for dense, with `is_causal` for causal, with the
equivalent dense bool mask for everything else. Ratios refer to the fastest form: by segment, padded and FlexAttention,
where they are measured, are baselines, too. Whatever does not depend on q, k and v is built beforehand, as a trainer
would once per batch: our rows, SDPA's dense mask, FlexAttention's block mask. Its time and memory do not count;
separate columns show the build time and FlexAttention's compile time. TFLOP/s count only visible query-key pairs: 4 D
per pair and head forward, 10 D backward (five matmuls, the minimum), so computing masked pairs shows as a lower rate.

All our backends with kernels for the device are measured, unless `--backend` names some. `--backend reference` fails
the float64 gate: it is plain PyTorch, and in float32 its long plain sums (dv of the first keys of a causal mask) exceed
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.case import Case, Inputs, Settings, Work
from mmkernels.bench.cases.attention_masks import KINDS, Kind, block_mask, setup, timed
from mmkernels.bench.cases.attention_rows import GATE, ROPE
from mmkernels.ops.attention import attention
from mmkernels.runtime import backends

Params = Mapping[str, Any]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

_DTYPES = ("float32", "bfloat16")
_SDPA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_REFERENCE_SCORES = 2**30  # bytes; the reference holds several such matrices


# Contenders: inputs -> out [T, H, D]


def heads_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as SDPA takes them: [1, H, T, D]."""
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
    return q, k, v


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
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=inputs["causal"]) for q, k, v in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def sdpa_nested(inputs: Inputs) -> Tensor:
    """A jagged NestedTensor, torch's own container of ragged samples."""
    inputs["figures"] = {}

    def nested(name: str, offsets: str) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(inputs[name], inputs[offsets].long()).transpose(1, 2)

    q, k, v = nested("q", "cu_seqlens_q"), nested("k", "cu_seqlens_k"), nested("v", "cu_seqlens_k")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=inputs["causal"])
    return out.transpose(1, 2).values()


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


def default_backend(device: torch.device) -> str:
    return backends.resolve("attention", torch.empty(0, device=device))


def limits(kind: Kind, backward: bool, device: torch.device, p: Params, contender: str) -> str | None:
    if contender == "FlexAttention" and backward and device.type == "cpu":
        return "forward only on a CPU"
    default_is_reference = contender == "mmkernels" and default_backend(device) == "reference"
    if contender == "mmkernels [reference]" or default_is_reference:
        tokens_q, tokens_k = (sum(lengths) for lengths in kind.lengths(p))
        size = p["H"] * tokens_q * tokens_k * 4
        if size > _REFERENCE_SCORES:
            return f"a score matrix of {size / 2**30:.1f} GiB"
    return None


def work(kind: Kind, backward: bool, p: Params) -> Work:
    """q, k, v and out are read or written once; the backward reads them and out's gradient, and writes three."""
    tokens_q, tokens_k = (sum(lengths) for lengths in kind.lengths(p))
    rows = 2 * (tokens_q + tokens_k) + (4 * tokens_q + 4 * tokens_k if backward else 0)
    element = getattr(torch, p["dtype"]).itemsize
    return Work(flops=(14 if backward else 4) * kind.pairs(p) * p["H"] * p["D"], bytes=rows * p["H"] * p["D"] * element)


def points(kind: Kind, backward: bool) -> dict[str, Any]:
    """bfloat16, which processors without instructions for it emulate, forward and backward only; quick is what is most
    asked for."""
    asked = kind.name in ("dense", "packed")
    quick = _DTYPES if asked and backward else _DTYPES[:1] if asked or backward else ()
    return {
        "quick": [{**kind.quick, "H": 8, "D": 64, "dtype": dtype} for dtype in quick],
        "full": [{**kind.full, "H": 8, "D": 64, "dtype": dtype} for dtype in _DTYPES[: 1 + backward]],
        "large": [{**size, "H": 16, "D": 128, "dtype": "bfloat16"} for size in kind.large],
    }


def case(kind: Kind, backward: bool, settings: Settings) -> Case:
    device = torch.device(settings.device)
    calls: dict[str, Callable[..., Tensor]] = {}
    if "S" in kind.full and "I" not in kind.full:
        calls["SDPA by segment"] = sdpa_by_segment
        calls |= {"NestedTensor": sdpa_nested} if settings.full else {}
    if "S" in kind.full:
        calls["SDPA padded"] = sdpa_padded
    if device.type == "cuda":
        calls |= {f"SDPA [{name}]": partial(sdpa_on, name) for name in _SDPA_BACKENDS}
    calls["FlexAttention"] = flex
    # The adapters always compute gradients.
    peers = {"flash_attn": "varlen", "flash_attn_4": "varlen", "xformers": "block_diagonal"}
    return Case(
        name=f"{kind.name} {'fwd+bwd' if backward else 'fwd'}",
        **points(kind, backward),
        gate={**kind.gate, "H": 2},
        setup=partial(setup, kind, backward),
        ours=partial(outputs_of, ours, backward),
        plain=partial(outputs_of, sdpa, backward),
        others={name: partial(outputs_of, call, backward) for name, call in calls.items()},
        peers=peers if backward and "I" not in kind.full else {},
        work=partial(work, kind, backward),
        outputs=("out", "dq", "dk", "dv") if backward else ("out",),
        limits=partial(limits, kind, backward, device),
        baseline=("plain PyTorch", *calls),
        backends_of="attention",
        compiled=("FlexAttention",),
        figures=lambda _, inputs: inputs["figures"],
    )


def cases(settings: Settings) -> list[Case]:
    return [*(case(kind, backward, settings) for kind in KINDS for backward in (False, True)), *ROPE, *GATE]

"""What the attention benches attend to: masks, and the inputs of a point."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.bench.case import Inputs
from mmkernels.ops.attention import AttentionMask
from mmkernels.testing.packing import cu_seqlens_of

__all__ = ["KINDS", "Kind", "block_mask", "setup", "timed"]

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A mask: the samples, and what a token sees of its sample. `quick`, `full`, `large` and `gate` are sizes.

    T: tokens in one sample. S, L: samples, and tokens in each (1 to L in "tiny"). Images have I tokens each, after as
    many tokens of text ("image spans"), or M of them precede a sample's text ("media").
    """

    name: str
    quick: Params
    full: Params
    large: tuple[Params, ...]
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


_ONE: dict[str, Any] = {
    "quick": {"T": 1024},
    "full": {"T": 2048},
    "large": ({"T": 8192}, {"T": 32768}),
    "gate": {"T": 256},
}
_SEGMENTS: dict[str, Any] = {
    "quick": {"S": 16, "L": 64},
    "full": {"S": 16, "L": 256},
    "large": ({"S": 32, "L": 256}, {"S": 16, "L": 2048}),
    "gate": {"S": 5, "L": 60},
}
KINDS = [
    Kind("dense", **_ONE),
    Kind("causal", **_ONE, causal=True),
    Kind("packed", **_SEGMENTS),
    Kind("packed causal", **_SEGMENTS, causal=True),
    Kind(
        "image spans",
        quick={"S": 4, "L": 256, "I": 64},
        full={"S": 4, "L": 1024, "I": 256},
        large=({"S": 8, "L": 1024, "I": 256}, {"S": 8, "L": 4096, "I": 576}),
        gate={"S": 3, "L": 100, "I": 20},
    ),
    Kind(
        "media",
        quick={"S": 4, "L": 128, "M": 4, "I": 32},
        full={"S": 8, "L": 512, "M": 4, "I": 64},
        large=({"S": 16, "L": 2048, "M": 8, "I": 64},),
        gate={"S": 3, "L": 60, "M": 3, "I": 20},
    ),
    Kind(
        "tiny",
        quick={"S": 64, "L": 16},
        full={"S": 256, "L": 16},
        large=({"S": 2048, "L": 16},),
        gate={"S": 40, "L": 16},
    ),
]

# Inputs


def setup(kind: Kind, backward: bool, p: Params, device: torch.device) -> Inputs:
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

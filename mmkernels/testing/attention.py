"""Attention inputs, and plain PyTorch attention as the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.attention import AttentionMask
from mmkernels.ops.attention.reference import keep
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.testing.packing import cu_seqlens_of

__all__ = [
    "INTERVAL_MASKS",
    "MASKS",
    "AttentionInputs",
    "Gradients",
    "cancelling_terms",
    "capped",
    "dense_mask",
    "distances",
    "interleaved",
    "make_inputs",
    "plain",
    "run",
]


@dataclass(frozen=True)
class AttentionInputs:
    """q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], their mask, and gradients of out [Tq, H, Dv] and lse [H, Tq].

    pair_bias [H, Cq, Ck], sink [H], dropout_p, softcap, alibi_slopes as in `attention`; `seed` seeds torch before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    mask: AttentionMask | None = None
    scale: float | None = None
    pair_bias: Tensor | None = None
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    softcap: float | None = None
    alibi_slopes: Tensor | None = None

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in another dtype (float64 for the truth)."""
        lse_dtype = compute_dtype(dtype)
        q, k, v, grad_out = (x.to(dtype) for x in (self.q, self.k, self.v, self.grad_out))
        learned = {name: getattr(self, name) for name in ("pair_bias", "sink", "alibi_slopes")}
        options = {name: None if x is None else x.to(lse_dtype) for name, x in learned.items()}
        options |= {"grad_lse": self.grad_lse.to(lse_dtype)}
        return replace(self, q=q, k=k, v=v, grad_out=grad_out, **options)  # type: ignore[arg-type]

    def on(self, device: torch.device | str) -> AttentionInputs:
        """The same values and mask on another device."""
        tensors = ("q", "k", "v", "grad_out", "grad_lse", "mask", "pair_bias", "sink", "alibi_slopes")
        given = {name: x for name in tensors if (x := getattr(self, name)) is not None}
        return replace(self, **{name: x.to(device) for name, x in given.items()})

    def leaves(self) -> dict[str, Tensor]:
        """Differentiable inputs by name."""
        given = {"q": self.q, "k": self.k, "v": self.v, "bias": self.pair_bias, "sink": self.sink}
        given["slopes"] = self.alibi_slopes
        return {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}


@dataclass(frozen=True)
class Gradients:
    """Results of one run, by name."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsink: Tensor | None = None
    dslopes: Tensor | None = None

    def items(self) -> list[tuple[str, Tensor]]:
        names = ("out", "lse", "dq", "dk", "dv", "dbias", "dsink", "dslopes")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class MaskCase:
    """Lengths of query and key segments, and a mask over them. `pattern`: the mask needs more than row intervals."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] = ()
    build: Callable[..., AttentionMask | None] = AttentionMask.packed
    options: dict[str, object] = field(default_factory=dict)
    pattern: bool = False

    @property
    def tokens(self) -> tuple[int, int]:
        return sum(self.lengths_q), sum(self.lengths_k or self.lengths_q)

    def mask(self, device: torch.device | str = "cpu") -> AttentionMask | None:
        lengths_k = self.lengths_k or self.lengths_q
        return self.build(cu_seqlens_of(self.lengths_q, device), cu_seqlens_of(lengths_k, device), **self.options)


def interleaved(cu: Tensor, longest: int = 40) -> tuple[Tensor, Tensor]:
    """Runs of text and of images, one span per image: modality_ids uint8 [T] and span_ids int32 [T]."""
    generator = torch.Generator().manual_seed(1)
    modalities, spans, image = [], [], 0
    for length in cu.diff().tolist():
        left, is_image = length, False
        while left > 0:
            run = min(left, int(torch.randint(1, longest + 1, (1,), generator=generator)))
            modalities += [int(is_image)] * run
            spans += [image if is_image else -1] * run
            left, image, is_image = left - run, image + is_image, not is_image
    ids = torch.tensor(modalities, dtype=torch.uint8), torch.tensor(spans, dtype=torch.int32)
    return ids[0].to(cu.device), ids[1].to(cu.device)


def _multimodal(cu_q: Tensor, cu_k: Tensor, **options: Any) -> AttentionMask:
    return AttentionMask.multimodal(cu_q, *interleaved(cu_q), **options)


def _padding(cu_q: Tensor, cu_k: Tensor, **options: Any) -> AttentionMask:
    """Samples with padding on the left, on the right, everywhere, and in holes; one sample if lengths differ."""
    generator = torch.Generator().manual_seed(3)
    even = all(len(set(cu.diff().tolist())) == 1 for cu in (cu_q, cu_k))
    masks = []
    for cu in (cu_q, cu_k):
        batch = len(cu) - 1 if even else 1
        tokens = int(cu[-1]) // batch
        real = torch.rand(batch, tokens, generator=generator) < 0.8
        real[:1, : tokens // 3], real[1:2, tokens // 2 :], real[2:3] = False, False, False
        masks.append(real.to(cu.device))
    return AttentionMask.from_padding(*masks, **options)


def _cross_only(cu_q: Tensor, cu_k: Tensor) -> AttentionMask:
    return AttentionMask.cross_only(cu_q, interleaved(cu_q)[0])


def _media(cu_q: Tensor, cu_k: Tensor, mode: Any) -> AttentionMask:
    """Media of 16 tokens; the text starts before the first medium and advances at random."""
    generator = torch.Generator().manual_seed(2)
    media_k = [j // 16 for length in cu_k.diff().tolist() for j in range(length)]
    media_q: list[int] = []
    for length_q, length_k in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True):
        steps = (torch.rand(length_q, generator=generator) < 0.05).cumsum(0) - 1
        media_q += steps.clamp(max=length_k // 16).tolist()
    ids = (torch.tensor(x, dtype=torch.int32, device=cu_q.device) for x in (media_q, media_k))
    return AttentionMask.media(cu_q, cu_k, *ids, mode=mode)


def _noise(cu_q: Tensor, cu_k: Tensor) -> AttentionMask:
    """Hidden noise spans (BAGEL): causal or within one span, without other spans' noise keys."""
    modality, span = interleaved(cu_q)
    causal = AttentionMask.multimodal(cu_q, modality, span).rows(len(span), len(span))
    clean = torch.ones_like(span)  # bit 0: keys of class 0, the clean ones
    none = torch.where(span < 0, -2, span)
    return AttentionMask.from_rows(
        causal.lo, causal.hi, span_q=span, span_k=none, allow_q=clean, class_q=modality, class_k=modality
    )


_LENGTHS = (5, 70, 0, 1, 130, 33)
MASKS = {
    "dense": MaskCase((150,), (203,), lambda cu_q, cu_k: None),
    "packed": MaskCase(_LENGTHS),
    "packed_causal": MaskCase(_LENGTHS, options={"causal": True}),
    "cross": MaskCase((40, 0, 7, 100, 12), (3, 90, 0, 110, 17)),
    "cross_causal": MaskCase((40, 20, 7, 100), (30, 90, 0, 110), options={"causal": True}),
    "window": MaskCase((120, 75), options={"causal": True, "window": 17}),
    "window_both": MaskCase((120, 75), (90, 80), options={"window": (17, 5)}),
    "tiny": MaskCase((4, 3, 1, 0, 2, 5) * 11),
    "single": MaskCase((1,)),
    "image_spans": MaskCase(_LENGTHS, build=_multimodal),
    "image_spans_window": MaskCase((120, 75), build=_multimodal, options={"window": 25}),
    "media_last": MaskCase((40, 0, 7, 100, 12), (3, 90, 0, 110, 17), _media, {"mode": "last"}),
    "media_own": MaskCase((40, 0, 7, 100, 12), (3, 90, 0, 110, 17), _media, {"mode": "own"}, pattern=True),
    "cross_only": MaskCase(_LENGTHS, build=_cross_only, pattern=True),
    "padding": MaskCase((40,) * 4, (55,) * 4, _padding, {"causal": True, "window": (30, None)}, pattern=True),
    "noise": MaskCase((150, 60), build=_noise, pattern=True),
}
INTERVAL_MASKS = [name for name, case in MASKS.items() if not case.pattern]


def make_inputs(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 32,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    amplitude: float = 1.0,
    classes: tuple[int, int] | None = None,
    sink: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Normal inputs; `amplitude` multiplies q and thereby the logits. `classes`: sizes (Cq, Ck) of a pair bias."""
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    q, k, v = normal(tokens_q, heads, dim), normal(tokens_k, kv_heads, dim), normal(tokens_k, kv_heads, dim_v)
    lse_dtype = compute_dtype(dtype)
    grad_out, grad_lse = normal(tokens_q, heads, dim_v), normal(heads, tokens_q, of=lse_dtype)
    bias = None if classes is None else normal(heads, *classes, of=lse_dtype)
    sinks = normal(heads, of=lse_dtype) if sink else None
    slopes = torch.rand(heads, generator=generator).to(device, lse_dtype) / 8 if alibi else None
    of_call = mask, scale, bias, sinks, dropout_p, seed, softcap, slopes
    return AttentionInputs(q * amplitude, k, v, grad_out, grad_lse, *of_call)


def dense_mask(x: AttentionInputs) -> Tensor:
    """bool [Tq, Tk]."""
    size = x.q.shape[0], x.k.shape[0]
    return torch.ones(size, dtype=torch.bool, device=x.q.device) if x.mask is None else x.mask.to_dense(*size)


def cancelling_terms(x: AttentionInputs, *, with_lse: bool = False) -> dict[str, Tensor]:
    """Sums of absolute terms, in float64, of the results that cancel.

    dbias and dsink are sums over all tokens. With a bias dq is included: plain PyTorch then materialises the softmax
    and cancels exactly; a kernel that saves lse and the rounded out cancels up to a rounding of the two terms of ds.
    """
    if x.pair_bias is None and x.sink is None and x.alibi_slopes is None:
        return {}
    truth = x.to(torch.float64)
    exact = plain(truth, with_lse=with_lse)
    delta = torch.einsum("qhd,qhd->hq", truth.grad_out, exact.out)
    if with_lse:
        delta = delta - torch.where(torch.isfinite(exact.lse), truth.grad_lse, 0.0)
    found = {}
    if truth.sink is not None:
        share = torch.where(torch.isfinite(exact.lse), (truth.sink[:, None] - exact.lse).exp(), 0.0)
        found["dsink"] = (share * delta).abs().sum(1)
    if truth.pair_bias is None and truth.alibi_slopes is None:
        return found
    group = x.q.shape[1] // x.k.shape[1]
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    key, value = (t.repeat_interleave(group, 1) for t in (truth.k, truth.v))
    products = torch.einsum("qhd,khd->hqk", truth.q, key) * scale
    slope = 1.0 if x.softcap is None else 1 - (products / x.softcap).tanh().square()
    terms = _logit_terms(
        replace(truth, sink=None), {n: t for n, t in truth.leaves().items() if n != "sink"}, dense_mask(x)
    )
    assert terms is not None
    p = (capped(products, x.softcap) + terms.detach() - exact.lse[..., None]).exp().nan_to_num(0.0)
    dp = torch.einsum("qhd,khd->hqk", truth.grad_out, value)
    if x.dropout_p > 0:
        dp = dp * _kept(x) / (1 - x.dropout_p)
    ds = (p * (dp - delta[..., None])).abs()
    pair_terms = p * (dp.abs() + delta[..., None].abs())
    found["dq"] = torch.einsum("hqk,khd->qhd", pair_terms * slope, key.abs()) * abs(scale)
    if truth.pair_bias is not None:
        assert x.mask is not None and x.mask.classes is not None
        sizes = zip(x.mask.classes, truth.pair_bias.shape[1:], strict=True)
        one_hot = [F.one_hot(ids.long(), size).double() for ids, size in sizes]
        found["dbias"] = torch.einsum("hqk,qa,kb->hab", ds, *one_hot)
    if truth.alibi_slopes is not None:
        found["dslopes"] = (ds * distances(x)).sum((1, 2))
    return found


def distances(x: AttentionInputs) -> Tensor:
    """Tokens between each query's position and each key: int64 [Tq, Tk]."""
    tokens_q, tokens_k = len(x.q), len(x.k)
    key = torch.arange(tokens_k, device=x.q.device)
    at_q = torch.arange(tokens_k - tokens_q, tokens_k) if x.mask is None else x.mask.positions(tokens_q, tokens_k)
    return (at_q.to(key)[:, None] - key).abs()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """The soft cap as models write it."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _kept(x: AttentionInputs) -> Tensor:
    """bool [H, Tq, Tk]: the pairs `attention` keeps under x's seed."""
    torch.manual_seed(x.seed)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.q.device)
    return keep(seed, x.dropout_p, x.q.shape[1], x.q.shape[0], x.k.shape[0])


def _differentiate(
    x: AttentionInputs, call: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], with_lse: bool
) -> Gradients:
    leaves = x.leaves()
    out, lse = call(leaves)
    outputs, grads = [out], [x.grad_out]
    if with_lse:
        outputs.append(lse)
        grads.append(torch.where(torch.isfinite(lse), x.grad_lse, 0.0).to(lse.dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return Gradients(out.detach(), lse.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)})


def run(x: AttentionInputs, backend: str | None = None, *, with_lse: bool = False) -> Gradients:
    """Our op, forward and backward; `with_lse`: lse gets a gradient too."""
    from mmkernels.ops.attention import attention

    def call(leaf: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(x.seed)
        options: dict[str, Any] = {"pair_bias": leaf.get("bias"), "sink": leaf.get("sink"), "dropout_p": x.dropout_p}
        options |= {"scale": x.scale, "softcap": x.softcap, "alibi_slopes": leaf.get("slopes")}
        out = attention(leaf["q"], leaf["k"], leaf["v"], x.mask, return_lse=True, backend=backend, **options)
        assert isinstance(out, tuple)
        return out[0], out[1]

    return _differentiate(x, call, with_lse)


def plain(x: AttentionInputs, *, with_lse: bool = False) -> Gradients:
    """`F.scaled_dot_product_attention` with the equivalent dense mask, in x's dtype; lse from the scores' logsumexp.

    A row that sees no key is undefined in SDPA, so it sees all keys and its result is replaced by zeros. Head dims are
    zero-padded to one size, because SDPA's fused kernels need equal ones; otherwise it would materialise float32
    matrices. A bias is part of the mask; a sink is an extra key with value 0. With dropout, whose random numbers SDPA
    does not let us choose, or a soft cap, which it does not have, the softmax is written out.
    """
    mask = dense_mask(x)
    seen = mask.any(1)
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    lse_dtype = compute_dtype(x.q.dtype)
    width = max(x.q.shape[-1], x.v.shape[-1])

    def call(leaf: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v = leaf["q"], leaf["k"], leaf["v"]
        group, dim_v = q.shape[1] // k.shape[1], v.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        query, key, value = (F.pad(t, (0, width - t.shape[2])).transpose(0, 1)[None] for t in (q, k, v))
        terms = _logit_terms(x, leaf, mask | ~seen[:, None])
        if "sink" in leaf:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        if x.dropout_p > 0 or x.softcap is not None:
            out = _written_out(x, query, key, value, terms, scale)
        else:
            allowed = (mask | ~seen[:, None]) if terms is None else terms.to(q.dtype)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
        out = torch.where(seen[:, None, None], out[0].transpose(0, 1)[..., :dim_v], 0.0)
        scores = capped(query[0].to(lse_dtype) @ key[0].to(lse_dtype).mT * scale, x.softcap)
        scores = scores.masked_fill(~mask & seen[:, None], -torch.inf) if terms is None else scores + terms
        return out, torch.where(seen, torch.logsumexp(scores, -1), -torch.inf)

    return _differentiate(x, call, with_lse)


def _logit_terms(x: AttentionInputs, leaf: dict[str, Tensor], mask: Tensor) -> Tensor | None:
    """The additive mask with bias and sink: [H, Tq, Tk (+ 1 with a sink)]; None if the bool mask suffices."""
    if not leaf.keys() & {"bias", "sink", "slopes"} and x.dropout_p == 0 and x.softcap is None:
        return None
    dtype = compute_dtype(x.q.dtype)
    terms = x.q.new_zeros((x.q.shape[1], *mask.shape), dtype=dtype)
    if "bias" in leaf:
        assert x.mask is not None and x.mask.classes is not None
        class_q, class_k = (ids.long() for ids in x.mask.classes)
        terms = terms + leaf["bias"][:, class_q[:, None], class_k]
    if "slopes" in leaf:
        terms = terms - leaf["slopes"][:, None, None] * distances(x).to(dtype)
    terms = terms.masked_fill(~mask, -torch.inf)
    if "sink" in leaf:
        terms = torch.cat([terms, leaf["sink"][:, None, None].expand(-1, len(mask), 1)], -1)
    return terms


def _written_out(
    x: AttentionInputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Tensor | None,
    scale: float,
) -> Tensor:
    """Explicit softmax, [1, H, Tq, width], dropping the pairs that `attention` drops for the same generator state."""
    assert terms is not None
    p = (capped(query @ key.mT * scale, x.softcap) + terms.to(query.dtype)).softmax(-1)
    if x.dropout_p == 0:
        return p @ value
    kept = _kept(x)
    kept = F.pad(kept, (0, key.shape[2] - kept.shape[2]))  # a sink has no value to drop
    return (p * kept / (1 - x.dropout_p)) @ value

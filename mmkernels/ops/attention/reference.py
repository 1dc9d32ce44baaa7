"""Reference semantics: PyTorch over the dense score matrix, float64-capable.

    s_ij  = cap(scale <q_i, k_j>) + bias[class_q_i, class_k_j] - slope |at_i - j|  where i sees j, else -inf
    lse_i = log(exp(sink) + sum_j exp(s_ij))       p_ij = exp(s_ij - lse_i)       out_i = sum_j z_ij p_ij v_j

with cap(x) = softcap tanh(x / softcap) and its derivative cap' = 1 - tanh^2; without softcap x itself, and 1;
with z_ij = 1 / (1 - dropout_p) for pairs that dropout keeps and 0 for the rest (1 without dropout). With do = dL/dout,
dlse = dL/dlse, dp_ij = z_ij <do_i, v_j> and delta_i = sum_j p_ij dp_ij - dlse_i:

    ds_ij = p_ij (dp_ij - delta_i)      dbias[a, b] = sum of ds_ij over i of class a, j of class b
    dx_ij = cap'_ij ds_ij               dv_j = sum_i z_ij p_ij do_i
    dq_i  = scale sum_j dx_ij k_j       dk_j = scale sum_i dx_ij q_i
    dsink = -sum_i exp(sink - lse_i) delta_i       dslope = -sum_ij ds_ij |at_i - j|

A row that sees no key has out 0 and lse -inf, with or without a sink, and adds nothing to any gradient. Scores, softmax
and weighted sums are float64, because the rounding error of a score becomes a relative error of p. Everything else is
float32 unless the inputs are float64. A pair of weight 0 adds nothing, not even 0 times inf or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.dtypes import compute_dtype

__all__ = [
    "attention_bwd",
    "attention_fwd",
    "bias_gradient",
    "cap_derivatives",
    "distances",
    "dropout",
    "keep",
    "largest",
    "probabilities",
    "scaled_products",
    "sink_gradient",
    "slope_gradient",
    "weighted_sums",
]


def keep(
    seed: Tensor, dropout_p: float, heads: int, tokens_q: int, tokens_k: int, first: tuple[int, int] = (0, 0)
) -> Tensor:
    """Pairs that dropout keeps: bool [H, Tq, Tk], the same on every backend. Starts at query and key `first`; that
    query is a multiple of four.

    Philox 4x32-10 under the key `seed` at the counter (j, i // 4, h, 0) gives four words, one for each of four queries.
    Pair (i, j) of head h is kept if word i % 4, shifted right by one, is below (1 - dropout_p) 2^31.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = 0xFFFFFFFF

    def mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a 32 x 32 bit product, without overflowing int64."""
        high = ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16
        return high, (((a >> 16) * b & 0xFFFF) << 16) + (a & 0xFFFF) * b & low

    groups, device = (tokens_q + 3) // 4, seed.device
    c0 = first[1] + torch.arange(tokens_k, device=device).expand(heads, groups, tokens_k)
    c1 = first[0] // 4 + torch.arange(groups, device=device)[:, None].expand_as(c0)
    c2 = torch.arange(heads, device=device)[:, None, None].expand_as(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = mul(0xD2511F53, c0), mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 2).flatten(1, 2)[:, :tokens_q]
    return words >> 1 < round((1 - dropout_p) * 2**31)


def scaled_products(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """scale <q_i, k_j>: float64 [H, Tq, Tk] from q [Tq, H, D], k [Tk, H, D]."""
    return torch.einsum("qhd,khd->hqk", q.double(), k.double()) * options.scale


def distances(rows: MaskRows, tokens_k: int) -> Tensor:
    """|at_i - j|: float64 [Tq, Tk]."""
    assert rows.at_q is not None
    return (rows.at_q.double()[:, None] - torch.arange(tokens_k, device=rows.at_q.device)).abs()


def cap_derivatives(q: Tensor, k: Tensor, seen: Tensor, options: Options) -> tuple[Tensor, Tensor] | None:
    """First and second derivative of the soft cap at visible pairs, 0 elsewhere: [H, Tq, Tk]; None without a cap."""
    if options.softcap is None:
        return None
    t = torch.tanh(scaled_products(q, k, options) / options.softcap)
    slope = 1 - t.square()
    bend = -2 * t * slope / options.softcap
    return torch.where(seen, slope, 0.0).to(q.dtype), torch.where(seen, bend, 0.0).to(q.dtype)


def probabilities(q: Tensor, k: Tensor, seen: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor]:
    """p [H, Tq, Tk] and lse [H, Tq] in q's dtype from q [Tq, H, D], k [Tk, H, D] and seen [Tq, Tk]."""
    scores = scaled_products(q, k, options)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.pair_bias is not None:
        assert rows.class_q is not None and rows.class_k is not None
        scores = scores + options.pair_bias[:, rows.class_q.long()[:, None], rows.class_k.long()]
    if options.slopes is not None:
        scores = scores - options.slopes[:, None, None] * distances(rows, k.shape[0])
    scores = scores.masked_fill(~seen, -torch.inf)
    if options.sink is not None:
        sink = options.sink[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat([scores, sink.masked_fill(~seen.any(1)[:, None], -torch.inf)], -1)
    p = scores.softmax(-1)[..., : k.shape[0]]
    return torch.where(seen, p, 0.0).to(q.dtype), torch.logsumexp(scores, dim=-1).to(q.dtype)


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """sum_r weights[h, t, r] rows[r, h] over nonzero weights: [T, H, D] from [H, T, R] and [R, H, D]."""
    dtype, weights, rows = weights.dtype, weights.double(), rows.double()
    odd = ~rows.isfinite().flatten(1).all(1)
    sums = torch.einsum("htr,rhd->thd", weights, rows.masked_fill(odd[:, None, None], 0.0))
    for r in odd.nonzero()[:, 0].tolist():
        weight = weights[..., r].T[..., None]
        sums = sums + torch.where(weight != 0, weight * rows[r], 0.0)
    return sums.to(dtype)


def dropout(
    options: Options, heads: int, seen: Tensor, dtype: torch.dtype, first: tuple[int, int] = (0, 0)
) -> Tensor | None:
    """z [H, Tq, Tk], starting at query and key `first`."""
    if options.seed is None:
        return None
    kept = keep(options.seed, options.dropout_p, heads, seen.shape[0], seen.shape[1], first)
    return kept.to(dtype) / (1 - options.dropout_p)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, Dv] in q's dtype, lse [H, Tq] and max_logit [H], empty if not wanted."""
    dtype, group = compute_dtype(q.dtype), q.shape[1] // k.shape[1]
    seen = rows.visible().dense(k.shape[0])
    p, lse = probabilities(q.to(dtype), k.to(dtype).repeat_interleave(group, dim=1), seen, rows, options)
    z = dropout(options, q.shape[1], seen, dtype)
    out = weighted_sums(p if z is None else p * z, v.to(dtype).repeat_interleave(group, dim=1))
    row_max = None
    if options.with_max and len(k):
        products = scaled_products(q, k.repeat_interleave(group, dim=1), options)
        row_max = products.masked_fill(~seen, -torch.inf).amax(-1).to(dtype)
    elif options.with_max:
        row_max = torch.full_like(lse, -torch.inf)
    return out.to(q.dtype).contiguous(), lse, largest(row_max, lse)


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: MaskRows,
    options: Options,
) -> tuple[Tensor, ...]:
    """dq, dk, dv in the dtypes of q, k, v; dbias, dsink, dslopes (empty without a bias, sink or slopes).

    Recomputes the probabilities; `out` and `lse` are not read.
    """
    dtype, group = compute_dtype(q.dtype), q.shape[1] // k.shape[1]
    x, do = q.to(dtype), grad_out.to(dtype)
    y, w = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
    seen = rows.visible().dense(k.shape[0])
    p, lse = probabilities(x, y, seen, rows, options)
    z = dropout(options, q.shape[1], seen, dtype)
    dp = torch.einsum("qhd,khd->hqk", do, w)
    dp = torch.where(seen, dp if z is None else dp * z, 0.0)
    delta = (p * dp).sum(-1)  # <do_i, out_i> without the rounding of out
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    ds = torch.where(seen, p * (dp - delta[..., None]), 0.0)
    cap = cap_derivatives(x, y, seen, options)
    dx = (ds if cap is None else ds * cap[0]) * options.scale
    dq = weighted_sums(dx, y)
    dk = weighted_sums(dx.mT, x).unflatten(1, (k.shape[1], group)).sum(2)
    dv = weighted_sums((p if z is None else p * z).mT, do).unflatten(1, (k.shape[1], group)).sum(2)
    dbias, dsink, dslopes = (lse.new_empty(0) for _ in range(3))
    if options.pair_bias is not None:
        assert rows.class_k is not None
        of_class = torch.arange(options.pair_bias.shape[2], device=q.device)[:, None] == rows.class_k
        dbias = bias_gradient(torch.einsum("hqk,bk->hbq", ds, of_class.to(dtype)), rows, options)
    if options.sink is not None:
        dsink = sink_gradient(delta, lse, options.sink)
    if options.slopes is not None:
        dslopes = slope_gradient((ds * distances(rows, k.shape[0])).sum(-1).to(lse.dtype))
    grads = (x.to(like.dtype).contiguous() for x, like in ((dq, q), (dk, k), (dv, v)))
    return *grads, dbias, dsink, dslopes


def largest(row_max: Tensor | None, lse: Tensor) -> Tensor:
    """max_logit [H] from the rows' [H, Tq]; -inf without rows, empty without row_max."""
    if row_max is None:
        return lse.new_empty(0)
    return row_max.amax(1) if row_max.shape[1] else lse.new_full((lse.shape[0],), -torch.inf)


def bias_gradient(row_sums: Tensor, rows: MaskRows, options: Options) -> Tensor:
    """dbias [H, Cq, Ck] from the sums of ds over the keys of each class: [H, Ck, Tq].

    A product with a one-hot matrix: one order of summation, so the same input gives the same bits.
    """
    assert options.pair_bias is not None and rows.class_q is not None
    of_class = rows.class_q[:, None] == torch.arange(options.pair_bias.shape[1], device=row_sums.device)
    sums = row_sums.double() @ of_class.double()  # [H, Ck, Cq]
    return sums.transpose(1, 2).to(options.pair_bias.dtype).contiguous()


def sink_gradient(delta: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """dsink [H] from delta, lse [H, Tq]. A row that sees no key gives the sink no gradient."""
    shares = torch.exp(sink[:, None] - lse).double() * delta.double()
    return -torch.where(lse == -torch.inf, 0.0, shares).sum(1).to(sink.dtype)


def slope_gradient(sums: Tensor) -> Tensor:
    """dslopes [H] from the sums of ds times distance over the keys: [H, Tq]."""
    return -sums.double().sum(1).to(sums.dtype)

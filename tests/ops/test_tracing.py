"""Every op on meta and fake tensors, under make_fx, torch.export and vmap: values are checked when there are any."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmkernels import (
    AttentionMask,
    FalseNegatives,
    additive_attention,
    attention,
    embed_splice,
    gated_residual,
    infonce,
    maxsim,
    mrope_position_ids,
    norm_rope,
    pack,
    pad,
    sample_negatives,
    segment_pool,
    siglip,
    similarity_logsumexp,
    topk_similar,
    unpack,
    unpad,
)

vmap = torch.func.vmap


def boundaries(device="cpu"):
    return torch.tensor([0, 3, 8], dtype=torch.int32, device=device)


def attend(device):
    """Every kind of mask, built inside the traced function."""
    q, k, v = (torch.randn(8, 2, 4, device=device, requires_grad=True) for _ in range(3))
    cu, modalities = boundaries(device), torch.zeros(8, dtype=torch.uint8, device=device)
    spans, ones = torch.full((8,), -1, device=device), torch.ones(2, dtype=torch.int64, device=device)
    zeros = torch.zeros(8, dtype=torch.int32, device=device)
    masks = [
        None,
        AttentionMask.packed(cu, causal=True, window=2),
        AttentionMask.multimodal(cu, modalities, spans),
        AttentionMask.cross_only(cu, modalities),
        AttentionMask.prefix(cu, ones),
        AttentionMask.media(cu, cu, zeros, zeros),
        AttentionMask.from_rows(zeros, zeros + 8),
    ]
    out = sum(attention(q, k, v, mask) for mask in masks)
    logits = dict(pair_bias=torch.zeros(2, 2, 2, device=device), sink=torch.zeros(2, device=device))
    out = out + attention(q, k, v, masks[2], dropout_p=0.1, softcap=2.0, **logits)
    slopes = torch.ones(2, device=device)
    known = [None, *masks[1:3], masks[4], AttentionMask.batched(2, 4, device=device), masks[6].with_positions(zeros)]
    out = out + sum(attention(q, k, v, mask, alibi_slopes=slopes) for mask in known)
    out = out + additive_attention(q, k, v, torch.ones(2, 4, device=device), masks[1])
    out = gated_residual(norm_rope(out, torch.arange(8, device=device), base=100.0), out, torch.ones(1, device=device))
    return torch.autograd.grad(out.sum(), (q, k, v))


def contrast(device):
    """Every option whose values are checked."""
    x, y = (torch.randn(8, 4, device=device, requires_grad=True) for _ in range(2))
    ids, weights = torch.arange(8, device=device), torch.ones(8, device=device)
    loss = infonce(x, y, 10.0) + infonce(x, y, 10.0, targets=ids, weights=weights)
    loss = loss + infonce(x, y, 10.0, query_ids=ids) + siglip(x, y, 10.0, -1.0, query_ids=ids)
    loss = loss + infonce(x, y, 10.0, query_ids=ids, same_id="ignore", return_stats=True)[0]
    loss = loss + similarity_logsumexp(x, y, 10.0, query_ids=ids).float().sum()
    filtered = FalseNegatives(x.detach(), y.detach(), 0.1)
    loss = loss + infonce(
        x,
        y,
        10.0,
        decoupled=True,
        negatives=y[:, None],
        false_negatives=filtered._replace(guide_negatives=y.detach()[:, None]),
    )
    topk_similar(x, y, 3)
    sample_negatives(x, y, 10.0, query_ids=ids)
    return torch.autograd.grad(loss, (x, y))


def rearrange(device):
    x, cu = torch.randn(8, 4, device=device, requires_grad=True), boundaries(device)
    two = torch.tensor([1, 2], device=device)
    pooled = segment_pool(x, cu).sum() + segment_pool(x, cu, "max").sum() + pad(x, cu, 5).sum()
    pooled = pooled + maxsim(x, x.detach().flip(0), cu, cu).sum()
    moved = pack(x, two).sum() + unpack(x, torch.arange(8, device=device)).sum()
    kept = unpad(x.view(2, 4, 4), two, 8)[0].sum()
    spliced = embed_splice(torch.zeros(8, dtype=torch.int64, device=device), x, x[:2], two).sum()
    mrope_position_ids(cu, torch.tensor([[1, 2, 2]], device=device), torch.tensor([1], device=device), 8)
    return torch.autograd.grad(pooled + moved + kept + spliced, (x,))


FAMILIES = pytest.mark.parametrize("family", [attend, contrast, rearrange])


@FAMILIES
def test_meta(family):
    for grad, real in zip(family("meta"), family("cpu"), strict=True):
        assert grad.is_meta
        assert grad.shape == real.shape


@FAMILIES
def test_fake(family):
    with FakeTensorMode():
        grads = family("cpu")
    for grad, real in zip(grads, family("cpu"), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (real.shape, real.dtype, real.device)


@FAMILIES
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(family, mode):
    traced = make_fx(lambda: family("cpu"), tracing_mode=mode)()
    assert any("mmkernels" in str(node.target) for node in traced.graph.nodes)


MASK = AttentionMask.packed(boundaries())


class Model(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, ids):
        h, mask = x[:, None], AttentionMask.packed(boundaries()) if self.mask is None else self.mask
        return infonce(x, x, 10.0, query_ids=ids) + segment_pool(attention(h, h, h, mask), boundaries()).sum()


@pytest.mark.parametrize(("strict", "mask"), [(False, MASK), (False, None), (True, None)])
def test_export(strict, mask):
    """Strict export in torch 2.6 takes no tensors from outside."""
    inputs, model = (torch.randn(8, 4), torch.arange(8)), Model(mask)
    exported = torch.export.export(model, inputs, strict=strict)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_a_mask_first_met_inside_a_transform_works_after_it():
    """A layout made there is useless outside."""
    q = torch.randn(8, 1, 4)
    modalities = torch.tensor([0, 1] * 4, dtype=torch.uint8)
    options = dict(pair_bias=torch.zeros(1, 2, 2))
    mask, fresh = (AttentionMask.cross_only(boundaries(), modalities) for _ in range(2))
    torch.func.grad(lambda q: attention(q, q, q, mask, **options).sum())(q)
    make_fx(lambda q: attention(q, q, q, mask, **options), tracing_mode="fake", _allow_non_fake_inputs=True)(q)
    assert torch.equal(attention(q, q, q, mask, **options), attention(q, q, q, fresh, **options))


X = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 0, 2, 3, 1, 2, 2], [0] * 8, list(range(8))])
PERMUTED = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
WEIGHTS = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))

# name -> (function of a sample of X and a sample of the metadata, metadata)
BATCHED = {
    "query_ids": (lambda x, ids: infonce(x, x, 2.0, query_ids=ids), IDS),
    "ignored ids": (lambda x, ids: infonce(x, x, 2.0, query_ids=ids, same_id="ignore"), IDS),
    "decoupled": (lambda x, targets: infonce(x, x, 2.0, targets=targets, decoupled=True), PERMUTED),
    "a filter": (
        lambda x, targets: infonce(x, x, 2.0, targets=targets, false_negatives=FalseNegatives(x, x, 0.1)),
        PERMUTED,
    ),
    "own negatives": (lambda x, targets: infonce(x, x, 2.0, negatives=x[targets][:, None]), PERMUTED),
    "targets": (lambda x, targets: infonce(x, x, 2.0, targets=targets), PERMUTED),
    "weights": (lambda x, weights: infonce(x, x, 2.0, weights=weights), WEIGHTS),
    "siglip": (lambda x, ids: siglip(x, x, 2.0, -1.0, query_ids=ids), IDS),
    "similarity_logsumexp": (lambda x, ids: similarity_logsumexp(x, x, 2.0, query_ids=ids), IDS),
    "sample_negatives": (lambda x, ids: topk_similar(x, x[ids], 2)[0], PERMUTED),
    "segment_pool": (segment_pool, torch.tensor([[0, 3, 8], [0, 0, 2], [0, 8, 8]])),
    "maxsim": (lambda x, cu: maxsim(x, x.flip(0), cu, cu), torch.tensor([[0, 3, 8], [0, 0, 2], [0, 8, 8]])),
    "pack": (pack, torch.tensor([[0, 7], [-1, 3], [2, 2]])),
    "unpad": (lambda x, keep: unpad(x.view(2, 4, 4), keep, 8)[0], torch.tensor([[0, 4], [1, 1], [4, 4]])),
    "mask": (
        lambda x, cu: attention(x[:, None], x[:, None], x[:, None], AttentionMask.packed(cu)),
        torch.tensor([[0, 3, 8], [0, 0, 2], [0, 8, 8]]),
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_over_metadata(name):
    function, metadata = BATCHED[name]
    expected = torch.stack([function(x, given) for x, given in zip(X, metadata, strict=True)])
    assert torch.equal(vmap(function)(X, metadata), expected)
    one = torch.stack([function(X[0], given) for given in metadata])
    assert torch.equal(vmap(function, in_dims=(None, 0))(X[0], metadata), one)


@pytest.mark.parametrize(
    ("name", "at", "value", "error"),
    [
        ("targets", (1, 2), 8, "targets: expected indices of keys, 0 to 7"),
        ("weights", (2, 0), -1.0, "weights: expected finite non-negative numbers"),
        ("pack", (1, 1), 8, r"index: expected each in \[-1, 8\), got 8"),
        ("segment_pool", (2, 1), -1, "cu_seqlens: expected"),
        ("maxsim", (0, 2), 9, "cu_seqlens_[qk]: expected to start at 0"),
        ("mask", (0, 2), 9, "mask: expected metadata within 8 queries and 8 keys"),
        ("unpad", (1, 0), 5, r"keep: expected lengths in \[0, 4\]"),
    ],
)
def test_vmap_checks_every_sample(name, at, value, error):
    function, metadata = BATCHED[name]
    wrong = metadata.clone()
    wrong[at] = value
    with pytest.raises(ValueError, match=error):
        vmap(function)(X, wrong)

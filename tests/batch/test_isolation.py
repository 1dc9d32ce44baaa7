"""Samples of a packed batch do not affect each other, through attention and through every op, forward and backward."""

import dataclasses

import backends
import pytest
import torch
from torch import Tensor

from mmkernels import AttentionMask, Media, Modality, PackedBatch, attention, embed_splice, segment_pool
from mmkernels.testing import assert_as_accurate

HEADS, DIM, WIDTH = 2, 16, 32
LENGTHS = ((5, (1, 4, 6)), (70, None), (1, (1, 2, 2)), (3, (4, 4, 4)), (40, (1, 8, 8)))


def needs(backend: str) -> None:
    for family in ("attention", "packing"):
        backends.need(family, backend)


def make_samples(seed: int) -> list:
    """Text, text and an image or clip, text; the same lengths for every seed."""
    torch.manual_seed(seed)
    samples = []
    for n, grid in LENGTHS:
        parts: list = [torch.randint(0, 50, (n,))]
        if grid is not None:
            kind = Modality.IMAGE if grid[0] == 1 else Modality.VIDEO
            parts.append(Media(kind, torch.randn(grid[0] * grid[1] * grid[2], WIDTH), grid, merge_size=2))
        samples.append([*parts, torch.randint(0, 50, (2,))])
    return samples


@dataclasses.dataclass
class Model:
    """An embedding, one attention layer, a pooled row per sample."""

    backend: str
    dtype: torch.dtype = torch.float32
    seed: int = 7

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.table = torch.randn(50, WIDTH).to(self.dtype)
        self.qkv = (torch.randn(WIDTH, 3 * HEADS * DIM) / 6).to(self.dtype)

    def mask(self, kind: str, batch: PackedBatch) -> AttentionMask:
        if kind == "multimodal":
            return AttentionMask.multimodal(batch.cu_seqlens, batch.modality_ids, batch.span_ids)
        return AttentionMask.packed(batch.cu_seqlens, causal=kind == "causal")

    def run(self, batch: PackedBatch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """(token outputs [T, H D], sample rows [S, H D], gradient of the embedded tokens [T, WIDTH])."""
        media = list(batch.media.values())
        merged = [m.values.to(self.dtype).unflatten(0, (-1, 4)).sum(1) for m in media]
        features = torch.cat(merged) if media else torch.zeros(0, WIDTH, dtype=self.dtype)
        dst_index = torch.cat([m.dst_index for m in media]) if media else torch.zeros(0, dtype=torch.int64)
        x = embed_splice(batch.tokens, self.table, features, dst_index, backend=self.backend).requires_grad_()
        q, k, v = (x @ self.qkv).unflatten(1, (3, HEADS, DIM)).unbind(1)
        out = attention(q, k, v, self.mask(kind, batch), backend=self.backend).flatten(1)
        pooled = segment_pool(out, batch.cu_seqlens, "mean", backend=self.backend)[: batch.num_samples]
        # A loss that is a sum over samples, each with its own gradient.
        pooled.square().sum().backward()
        return out.detach(), pooled.detach(), x.grad


def pack_of(samples: list, capacity: int | None = None) -> PackedBatch:
    return PackedBatch.from_samples(samples, capacity=capacity, mrope=True).validate()


KINDS = ("packed", "causal", "multimodal")


@backends.every
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sample_behaves_as_if_alone(kind, backend):
    """nanoVLM #201, #204, cross-contamination: each sample's output and gradient equal those of the sample alone."""
    needs(backend)
    # The largest error of a four-token sample is noisy: judge several models and all samples at once, each sample in
    # units of its own size.
    seeds = range(7, 8 if backends.interpreted(backend) else 15)
    models = [(Model(backend, seed=seed), Model("reference", torch.float64, seed)) for seed in seeds]
    samples = make_samples(0)
    batch = pack_of(samples, capacity=200)
    packed = [model.run(batch, kind) for model, _ in models]
    found: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for s, sample in enumerate(samples):
        begin, end = batch.cu_seqlens_host[s : s + 2]
        parts = [(out[begin:end], pooled[s : s + 1], gradient[begin:end]) for out, pooled, gradient in packed]
        alone = [model.run(pack_of([sample]), kind) for model, _ in models]
        truth = [exact.run(pack_of([sample]), kind) for _, exact in models]
        for i, results in enumerate(found):
            three = [torch.stack([run[i] for run in runs]).flatten() for runs in (parts, alone, truth)]
            size = three[2].square().mean().sqrt()
            results.append(tuple(x / size.to(x.dtype) for x in three))
    for what, results in zip(("out", "pooled", "gradient"), found, strict=True):
        assert_as_accurate(what, *(torch.cat(of) for of in zip(*results, strict=True)))


@backends.every
@pytest.mark.parametrize("kind", KINDS)
def test_changing_one_sample_changes_no_other(kind, backend):
    """Bit for bit, forward and backward, whichever sample (or the padding) changes."""
    needs(backend)
    model = Model(backend)
    samples, others = make_samples(0), make_samples(1)
    batch = pack_of(samples, capacity=200)
    before = model.run(batch, kind)
    for changed in (3,) if backends.interpreted(backend) else range(len(samples)):
        mixed = [others[s] if s == changed else sample for s, sample in enumerate(samples)]
        after = model.run(pack_of(mixed, capacity=200), kind)
        begin, end = batch.cu_seqlens_host[changed : changed + 2]
        same = torch.ones(batch.num_tokens, dtype=torch.bool)
        same[begin:end] = False
        rows = torch.arange(len(samples)) != changed
        assert torch.equal(after[0][same], before[0][same])
        assert torch.equal(after[1][rows], before[1][rows])
        assert torch.equal(after[2][same], before[2][same])
        assert not torch.equal(after[1][changed], before[1][changed])


@backends.every
def test_a_nan_stays_in_its_sample(backend):
    """No packing op multiplies another sample's NaN by 0, forward or backward."""
    needs(backend)
    batch = pack_of(make_samples(0), capacity=200)
    (begin, end), own = batch.cu_seqlens_host[3:5], torch.zeros(200, dtype=torch.bool)
    own[begin:end] = True
    for mode in ("sum", "mean", "max", "first", "weighted"):
        x = torch.randn(200, 8).masked_fill(own[:, None], torch.nan).requires_grad_()
        weights = torch.rand(200).masked_fill(own, torch.inf).requires_grad_() if mode == "weighted" else None
        pooled = segment_pool(x, batch.cu_seqlens, mode, weights=weights, backend=backend)
        grad = torch.randn_like(pooled)
        grad[3] = torch.nan
        pooled.backward(grad)
        assert pooled.isnan().any(1).tolist() == [False, False, False, True, False, False], mode
        assert not x.grad[~own].isnan().any(), mode
        assert weights is None or not weights.grad[~own].isnan().any()


def test_without_boundaries_samples_mix():
    """Negative control: with the same tokens as one sample, outputs differ from the second sample on."""
    model, samples = Model("reference"), make_samples(0)
    batch, joined = pack_of(samples), pack_of([[part for sample in samples for part in sample]])
    assert torch.equal(joined.tokens, batch.tokens)
    apart, mixed = (model.run(each, "causal")[0] for each in (batch, joined))
    end = batch.cu_seqlens_host[1]
    torch.testing.assert_close(mixed[:end], apart[:end])
    assert (mixed[end:] - apart[end:]).norm() > 0.1 * apart[end:].norm()


def test_images_are_neither_truncated_nor_split():
    """TRL #5904, verl #3469: what does not fit is refused by name; what fits arrives whole."""
    samples = make_samples(0)
    total = sum(pack_of([sample]).num_tokens for sample in samples)
    for capacity in (total - 1, total // 2, 1):
        with pytest.raises(
            ValueError, match=f"capacity: expected at least the {total} tokens of the samples, got {capacity}"
        ):
            pack_of(samples, capacity)
    batch = pack_of(samples, total)
    items = [part for sample in samples for part in sample if isinstance(part, Media)]
    values = sum(len(media.values) for media in batch.media.values())
    assert values == sum(len(item.values) for item in items)
    for media in batch.media.values():
        for start, count in zip(media.starts_host, media.tokens_host, strict=True):
            assert len(batch.sample_ids[start : start + count].unique()) == 1
            assert len(batch.span_ids[start : start + count].unique()) == 1


def test_no_token_is_dropped():
    """TRL #4554: every token and every value of every sample arrives exactly once, whatever the capacity."""
    samples = make_samples(0)
    for capacity in (None, 173, 200, 1000):
        batch = pack_of(samples, capacity)
        for s, sample in enumerate(samples):
            begin, end = batch.cu_seqlens_host[s : s + 2]
            texts = torch.cat([part for part in sample if not isinstance(part, Media)])
            own = batch.tokens[begin:end]
            assert torch.equal(own[batch.span_ids[begin:end] < 0], texts)
        for modality, media in batch.media.items():
            given = [p.values for sample in samples for p in sample if isinstance(p, Media) and p.modality == modality]
            assert torch.equal(media.values, torch.cat(given))
        assert (batch.sample_ids < 0).sum() == batch.padding == batch.num_tokens - sum(batch.lengths[:5])


def test_memory_of_a_batch_is_linear():
    """torchtune #1097, dense-mask memory: 32 Ki tokens and their mask take a few dozen bytes per token, not
    gigabytes."""
    tokens = 1 << 15
    batch = PackedBatch.from_samples([torch.zeros(1 << 10, dtype=torch.int64)] * 32)
    held = [v for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)]
    assert sum(tensor.nbytes for tensor in held) <= 40 * tokens
    q = torch.zeros(tokens, 1, 8)
    rows = AttentionMask.packed(batch.cu_seqlens, causal=True).rows(q.shape[0], q.shape[0])
    assert sum(tensor.nbytes for tensor in rows if isinstance(tensor, Tensor)) <= 40 * tokens

"""PackedBatch: fields, invariants, isolation of samples, exporters."""

import dataclasses

import named
import pytest
import torch
from torch import Tensor

from mmkernels import Modality, PackedBatch, plan_packing, segment_pool


def a_batch(capacity: int | None = 16) -> PackedBatch:
    samples = [torch.arange(1, 4), torch.arange(10, 15), torch.arange(0), torch.arange(20, 22)]
    kinds = [torch.full((len(sample),), kind) for sample, kind in zip(samples, [0, 1, 0, 2], strict=True)]
    return PackedBatch.from_samples(
        samples,
        capacity=capacity,
        sample_ids=[7, 3, 5, 0],
        modality_ids=kinds,
        labels=[sample + 100 for sample in samples],
        loss_weight=[torch.full((len(sample),), 0.5) for sample in samples],
        pad_token=99,
    )


def test_fields():
    batch = a_batch().validate()
    assert batch.tokens.tolist() == [1, 2, 3, 10, 11, 12, 13, 14, 20, 21] + [99] * 6
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 8, 10, 16] == list(batch.cu_seqlens_host)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.sample_ids.tolist() == [7] * 3 + [3] * 5 + [0] * 2 + [-1] * 6
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]
    assert batch.modality_ids.tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [Modality.TEXT] * 6
    assert batch.modality_ids.dtype == torch.uint8
    assert batch.labels.tolist() == [101, 102, 103, 110, 111, 112, 113, 114, 120, 121] + [-100] * 6
    assert batch.loss_weight.tolist() == [0.5] * 10 + [0.0] * 6
    assert (batch.num_tokens, batch.num_samples, batch.num_segments, batch.padding) == (16, 4, 5, 6)
    assert batch.lengths == (3, 5, 0, 2, 6)
    assert batch.max_seqlen == 6
    assert repr(batch) == "PackedBatch(4 samples, 10 tokens, 6 padding, longest 6, on cpu)"


def test_without_padding_and_without_options():
    batch = PackedBatch.from_samples([torch.arange(3), torch.arange(2)]).validate()
    assert (batch.padding, batch.num_samples, batch.labels, batch.loss_weight) == (0, 2, None, None)
    assert batch.sample_ids.tolist() == [0, 0, 0, 1, 1]
    assert PackedBatch.from_samples([torch.arange(3)], capacity=3).validate().num_segments == 1
    empty = PackedBatch.from_samples([]).validate()
    assert (empty.num_tokens, empty.num_samples, empty.max_seqlen) == (0, 0, 0)
    only_padding = PackedBatch.from_samples([], capacity=4).validate()
    assert (only_padding.num_tokens, only_padding.num_samples, only_padding.padding) == (4, 0, 4)
    features = PackedBatch.from_samples([torch.ones(2, 5), torch.ones(1, 5)], capacity=4).validate()
    assert features.tokens.sum(1).tolist() == [5, 5, 5, 0]


def test_from_a_plan():
    """A data set, its plan, its batches: every token arrives once and knows its origin."""
    data = [torch.arange(n) + 1000 * i for i, n in enumerate([5, 3, 8, 1, 4, 4])]
    plan = plan_packing([len(sample) for sample in data], 9)
    seen = []
    for pack in plan:
        batch = PackedBatch.from_samples([data[i] for i in pack], capacity=9, sample_ids=pack.tolist()).validate()
        real = batch.sample_ids >= 0
        assert torch.equal(batch.tokens[real], 1000 * batch.sample_ids[real] + batch.position_ids[real])
        seen += batch.tokens[real].tolist()
    assert sorted(seen) == torch.cat(data).tolist()


def test_samples_are_isolated():
    """nanoVLM #201, #204: with cu_seqlens each sample, and the padding, behaves as if alone."""
    torch.manual_seed(1)
    table, weight = torch.randn(200, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)

    def run(batch: PackedBatch) -> tuple[Tensor, Tensor]:
        x = table[batch.tokens].requires_grad_()
        segment = torch.repeat_interleave(torch.tensor(batch.lengths))
        scores = (x @ weight @ x.T).masked_fill(segment[:, None] != segment, -torch.inf)
        pooled = segment_pool(scores.softmax(-1) @ x, batch.cu_seqlens, "mean")
        pooled.square().sum().backward()
        return pooled.detach(), x.grad

    together = a_batch()
    pooled, gradient = run(together)
    begin = 0
    for s, length in enumerate(together.lengths[:-1]):
        alone, alone_gradient = run(PackedBatch.from_samples([together.tokens[begin : begin + length]]))
        torch.testing.assert_close(pooled[s], alone[0])
        torch.testing.assert_close(gradient[begin : begin + length], alone_gradient)
        begin += length
    changed = together.tokens.clone()
    changed[3:8] += 50  # the second sample
    other, other_gradient = run(dataclasses.replace(together, tokens=changed))
    assert torch.equal(other[[0, 2, 3, 4]], pooled[[0, 2, 3, 4]])
    assert torch.equal(other_gradient[:3], gradient[:3])
    assert torch.equal(other_gradient[8:], gradient[8:])


def test_to_keeps_every_field():
    batch = a_batch()
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == "meta", field.name
        else:
            assert value == getattr(batch, field.name)


def test_split():
    batch = a_batch()
    for size in (1, 2, 3, 4, 9):
        with named.case("size", size):
            parts = [part.validate() for part in batch.split(size)]
            assert [part.num_samples for part in parts] == [min(size, 4 - i) for i in range(0, 4, size)]
            assert all(part.padding == 0 for part in parts)
            for name in ("tokens", "sample_ids", "position_ids", "modality_ids", "labels", "loss_weight"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)[:10]), name
            assert sum((part.lengths for part in parts), ()) == batch.lengths[:4]


def test_split_of_an_empty_batch_and_into_size_zero():
    (empty,) = PackedBatch.from_samples([], capacity=4).split(2)
    assert (empty.validate().num_tokens, empty.num_samples) == (0, 0)
    assert PackedBatch.from_samples([torch.arange(3)]).split(1)[0].labels is None
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        a_batch().split(0)
    with pytest.raises(TypeError, match="size: expected an int"):
        a_batch().split(2.0)


@pytest.mark.gpu
def test_pin_memory_and_cuda():
    pinned = a_batch().pin_memory()
    assert pinned.tokens.is_pinned()
    assert pinned.labels.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).validate().tokens.cpu(), pinned.tokens)


def test_exporters():
    batch = dataclasses.replace(a_batch(), loss_weight=None)
    flash = batch.to_flash_attn()
    assert flash["cu_seqlens_q"] is flash["cu_seqlens_k"] is batch.cu_seqlens
    assert flash["max_seqlen_q"] == flash["max_seqlen_k"] == 6
    hf = batch.to_hf()
    assert hf["input_ids"].shape == hf["position_ids"].shape == hf["labels"].shape == (1, 16)
    assert hf["labels"][0].tolist() == [-100, 102, 103, -100, 111, 112, 113, 114, -100, 121] + [-100] * 6
    assert hf["cu_seq_lens_q"] is batch.cu_seqlens
    assert hf["max_length_k"] == 6
    assert hf["use_cache"] is False
    assert "attention_mask" not in hf  # with a mask, transformers does not look for samples in the positions
    with pytest.raises(ValueError, match="loss_weight: expected None for to_hf"):
        a_batch().to_hf()


def changed(name: str, at: int, value: int):
    def change(batch: PackedBatch) -> PackedBatch:
        tensor = getattr(batch, name).clone()
        tensor[at] = value
        return dataclasses.replace(batch, **{name: tensor})

    return change


BROKEN = [
    (changed("cu_seqlens", 1, 4), "cu_seqlens is int32 and equal to cu_seqlens_host"),
    (lambda b: dataclasses.replace(b, cu_seqlens=b.cu_seqlens.long()), "cu_seqlens is int32"),
    (lambda b: dataclasses.replace(b, cu_seqlens_host=(1, 16)), "cu_seqlens begins with 0"),
    (lambda b: dataclasses.replace(b, cu_seqlens_host=(0, 15)), "cu_seqlens ends with T = 16"),
    (lambda b: dataclasses.replace(b, cu_seqlens_host=(0, 9, 3, 16)), "cu_seqlens does not decrease"),
    (lambda b: dataclasses.replace(b, labels=b.labels[1:]), "labels has T = 16 entries"),
    (lambda b: dataclasses.replace(b, labels=b.labels.to("meta")), "labels is on cpu"),
    (lambda b: dataclasses.replace(b, padding=5), "padding is the last segment"),
    (changed("position_ids", 4, 7), "position_ids counts from 0 in each segment; got 7 at token 4, expected 1"),
    (changed("sample_ids", 2, 9), "sample_ids is the same in a whole segment; got 9 at token 2, expected 7"),
    (lambda b: dataclasses.replace(b, sample_ids=b.sample_ids.where(b.sample_ids != 3, -1)), "sample_ids is >= 0"),
    (lambda b: dataclasses.replace(b, sample_ids=b.sample_ids.where(b.sample_ids != -1, 9)), "sample_ids is -1 in"),
    (lambda b: dataclasses.replace(b, sample_ids=b.sample_ids.where(b.sample_ids != 3, 7)), "names each sample once"),
    (changed("modality_ids", 0, 32), "modality_ids is below 32"),
    (lambda b: dataclasses.replace(b, modality_ids=b.modality_ids.long()), "modality_ids is uint8"),
    (changed("labels", 12, 4), "labels is -100 in the padding"),
    (changed("loss_weight", 12, 1), "loss_weight is 0 in the padding"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_validate_names_the_broken_invariant(breaks, message):
    with pytest.raises(ValueError, match=f"PackedBatch: .*{message}"):
        breaks(a_batch()).validate()


ONE = [torch.arange(3)]


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (torch.arange(3), {}, TypeError, r"samples: expected a sequence of tensors .* got \[3\] int64"),
        ([[1, 2]], {}, TypeError, r"samples\[0\]: expected a tensor \[L, ...\], or a sequence of .* got \[1, 2\]"),
        ([torch.tensor(1)], {}, ValueError, r"samples\[0\]: expected \[L, ...\]"),
        ([*ONE, torch.ones(2, 2)], {}, ValueError, r"samples\[1\]: expected \[L, ...\] with the trailing dimensions"),
        ([*ONE, torch.ones(2)], {}, ValueError, r"samples\[1\]: expected torch.int64 on cpu like samples\[0\]"),
        (ONE, {"capacity": 2}, ValueError, "capacity: expected at least the 3 tokens of the samples, got 2"),
        (ONE, {"sample_ids": [1, 2]}, ValueError, "sample_ids: expected 1 ids >= 0"),
        (ONE, {"sample_ids": [-1]}, ValueError, "sample_ids: expected 1 ids >= 0"),
        (ONE, {"labels": []}, ValueError, "labels: expected one tensor for each of 1 samples"),
        (ONE, {"labels": [torch.arange(2)]}, ValueError, r"labels\[0\]: expected \[3\] integer, got \[2\] int64"),
        (ONE, {"labels": [torch.ones(3)]}, TypeError, r"labels\[0\]: expected \[3\] integer, got \[3\] float32"),
        (ONE, {"loss_weight": ONE}, TypeError, r"loss_weight\[0\]: expected \[3\] floating point, got \[3\] int64"),
        (
            ONE,
            {"modality_ids": [torch.tensor([0, 32, 1])]},
            ValueError,
            r"modality_ids\[0\]: expected ids in \[0, 32\)",
        ),
    ],
)
def test_bad_input(samples, options, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.from_samples(samples, **options)

"""PackedBatch of several modalities: layout, positions, splitting, DataLoader, validation."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from batch.samples import AUDIO, IMAGE, VIDEO, a_batch, image, samples, text
from torch import Tensor

from mmkernels import GradCache, Media, PackedBatch, embed_splice, mrope_position_ids, segment_pool


def test_layout():
    batch = a_batch().validate()
    tokens = [1, 2, *[91] * 6, 3, 4, 5, 6, *[92] * 3, 7, 91, *[91] * 4, *[93] * 8, 8, 9, *[99] * 9]
    assert batch.tokens.tolist() == tokens
    assert batch.lengths == (9, 3, 9, 0, 10, 9)
    kinds = [0, 0, *[1] * 6, 0, 0, 0, 0, *[2] * 3, 0, *[1] * 5, *[3] * 8, 0, 0, *[0] * 9]
    assert batch.modality_ids.tolist() == kinds
    spans = [-1, -1, *[0] * 6, *[-1] * 4, *[1] * 3, -1, 2, *[3] * 4, *[4] * 8, *[-1] * 11]
    assert batch.span_ids.tolist() == spans
    assert batch.span_ids.dtype == torch.int32
    images = batch.media[IMAGE]
    assert images.grid_thw.tolist() == [[1, 4, 6], [1, 2, 2], [1, 4, 4]]
    assert images.cu_values.tolist() == [0, 24, 28, 44] == list(images.cu_values_host)
    assert images.values[:, 0].tolist() == [1.0] * 24 + [2.0] * 4 + [3.0] * 16
    assert images.dst_index.tolist() == [2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20]
    assert batch.media[AUDIO].dst_index.tolist() == [12, 13, 14]
    assert batch.media[AUDIO].values.shape == (7, 5)
    assert batch.media[AUDIO].grid_thw is None
    assert list(batch.media) == [IMAGE, AUDIO, VIDEO]
    assert "3 of modality 1, 1 of modality 2, 1 of modality 3" in repr(batch)


def test_features_go_to_their_tokens():
    batch = a_batch()
    table = torch.randn(100, 4)
    images = batch.media[IMAGE]
    features = images.values.reshape(-1, 4, 12).mean((1, 2))[:, None].expand(-1, 4)  # one per merged token
    x = embed_splice(batch.tokens, table, features, images.dst_index)
    is_image = batch.modality_ids == IMAGE
    assert x[is_image, 0].tolist() == [1.0] * 6 + [2.0] + [3.0] * 4
    assert torch.equal(x[~is_image], table[batch.tokens[~is_image]])


def test_mrope_positions():
    batch = a_batch(mrope=True).validate()
    with_grid = [(2, [1, 4, 6]), (16, [1, 2, 2]), (17, [1, 4, 4]), (21, [4, 2, 4])]
    starts, grids = (torch.tensor(column) for column in zip(*with_grid, strict=True))
    assert torch.equal(batch.position_ids, mrope_position_ids(batch.cu_seqlens, grids, starts, 40))
    assert batch.position_ids[:, 2:9].tolist() == [[2] * 6 + [5], [2, 2, 2, 3, 3, 3, 5], [2, 3, 4, 2, 3, 4, 5]]
    assert batch.position_ids[:, 12:16].tolist() == [[0, 1, 2, 3]] * 3  # audio counts like text


def clip(seconds: float | None, t: int, h: int, w: int) -> Media:
    return Media(VIDEO, torch.ones(t * h * w, 12), (t, h, w), merge_size=2, time_step=seconds)


def test_mrope_rules():
    """The positions of text behind a clip follow the named rule; `True` is today's Qwen2-VL rule."""
    parts = [[text(1, 2, 3, 4), clip(None, 9, 8, 8), text(5)]]
    behind = {}
    for rule in (True, "spatial", "largest"):
        batch = PackedBatch.from_samples(parts, mrope=rule).validate()
        grid, start = torch.tensor([[9, 8, 8]]), torch.tensor([4])
        advance = "spatial" if rule is True else rule
        assert torch.equal(
            batch.position_ids, mrope_position_ids(batch.cu_seqlens, grid, start, batch.num_tokens, advance=advance)
        )
        behind[rule] = batch.position_ids[:, -1].tolist()
    assert behind == {True: [8] * 3, "spatial": [8] * 3, "largest": [13] * 3}


def test_time_step_of_each_clip():
    """Qwen2.5-VL: seconds per step come from the clip, positions per second from the model; images have no time."""
    parts = [
        [text(1), clip(0.75, 5, 2, 4), text(2)],
        [image(1, 4, 4), clip(2.0, 2, 4, 2), text(3)],
    ]
    batch = PackedBatch.from_samples(parts, mrope=True, tokens_per_second=2, capacity=40).validate()
    seconds = torch.tensor([0.75, 1.0, 2.0])
    grids, starts = torch.tensor([[5, 2, 4], [1, 4, 4], [2, 4, 2]]), torch.tensor([1, 12, 16])
    args = (batch.cu_seqlens, grids, starts, 40)
    assert torch.equal(batch.position_ids, mrope_position_ids(*args, time_step=seconds, tokens_per_second=2))
    assert batch.position_ids[0, :12].tolist() == [0, 1, 1, 2, 2, 4, 4, 5, 5, 7, 7, 3]
    largest = PackedBatch.from_samples(parts, mrope="largest", tokens_per_second=2)
    assert largest.position_ids[0, :12].tolist() == [0, 1, 1, 2, 2, 4, 4, 5, 5, 7, 7, 8]
    # Stored with the clip, wherever it goes.
    assert batch.media[VIDEO].time_step.tolist() == [0.75, 2.0]
    assert batch.media[IMAGE].time_step is None
    assert [part.media[VIDEO].time_step.tolist() for part in batch.split(1)] == [[0.75], [2.0]]
    assert batch.to("meta").media[VIDEO].time_step.is_meta
    assert_same(pickle.loads(pickle.dumps(batch)).validate(), batch)
    # Without a rate, one second is one position, as in mrope_position_ids.
    plain = PackedBatch.from_samples(parts, mrope=True)
    assert plain.position_ids[0, :12].tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 3]


def test_the_first_sample_may_be_empty_or_media():
    """Dtype and device follow the token ids, wherever the first sample is."""
    ids = torch.arange(3, dtype=torch.int32)
    batch = PackedBatch.from_samples([[], [image(1, 2, 2)], ids], capacity=6).validate()
    assert batch.tokens.dtype == torch.int32
    assert batch.tokens.tolist() == [0, 0, 1, 2, 0, 0]
    assert PackedBatch.from_samples([[image(1, 2, 2)], []]).validate().tokens.dtype == torch.int64


def test_split():
    batch = a_batch(labels=[torch.arange(n) for n in (9, 3, 9, 0, 10)], sample_weight=[1, 2, 3, 4, 5], mrope=True)
    for size in (1, 2, 3, 5, 9):
        chunks = batch.split(size)
        assert [chunk.num_samples for chunk in chunks] == [min(size, 5 - first) for first in range(0, 5, size)]
        given = samples()
        for i, chunk in enumerate(chunks):
            chunk.validate()
            assert chunk.padding == 0
            alone = PackedBatch.from_samples(
                given[i * size : (i + 1) * size],
                placeholder={IMAGE: 91, AUDIO: 92, VIDEO: 93},
                mrope=True,
                sample_ids=range(i * size, min(5, (i + 1) * size)),
                labels=[torch.arange(n) for n in (9, 3, 9, 0, 10)[i * size : (i + 1) * size]],
                sample_weight=[1, 2, 3, 4, 5][i * size : (i + 1) * size],
            )
            assert_same(chunk, alone)
    (nothing,) = PackedBatch.from_samples([], capacity=3).split(4)
    assert (nothing.num_tokens, nothing.num_samples) == (0, 0)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        batch.split(0)


def assert_same(a, b) -> None:
    """Compare two batches, or what they hold of one modality, field by field."""
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert torch.equal(x, y) and x.dtype == y.dtype, f.name
        elif f.name == "media":
            assert list(x) == list(y)
            for modality in x:
                assert_same(x[modality], y[modality])
        else:
            assert x == y, f.name


def test_grad_cache_splits_packed_batches():
    """The gradient of all samples at once, and two at a time."""
    torch.manual_seed(3)
    batch = PackedBatch.from_samples([torch.randint(0, 20, (n,)) for n in (3, 1, 4, 2, 6)], capacity=20)
    others = torch.randn(5, 8)
    table = torch.nn.Embedding(20, 8)

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, chunk: PackedBatch) -> Tensor:
            return segment_pool(self.table(chunk.tokens), chunk.cu_seqlens)[: chunk.num_samples]

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ y.T, torch.arange(5))

    head = torch.nn.Linear(8, 8)
    loss_fn(Tower()(batch), head(others)).backward()
    expected, table.weight.grad = table.weight.grad, None
    GradCache([Tower(), head], loss_fn, chunk_size=2)(batch, others)
    torch.testing.assert_close(table.weight.grad, expected)


def test_pickle_and_copy():
    batch = a_batch(mrope=True, sample_weight=[1.0] * 5)
    assert_same(pickle.loads(pickle.dumps(batch)).validate(), batch)
    assert_same(copy.deepcopy(batch), batch)


class Packs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> PackedBatch:
        return a_batch(sample_ids=range(5 * i, 5 * i + 5))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(workers):
    loader = torch.utils.data.DataLoader(Packs(), batch_size=None, num_workers=workers)
    ids = [batch.validate().sample_ids.amax().item() for batch in loader]
    assert ids == [4, 9, 14]


@pytest.mark.gpu
def test_data_loader_pins_every_tensor():
    (batch, *_) = torch.utils.data.DataLoader(Packs(), batch_size=None, pin_memory=True)
    assert batch.tokens.is_pinned()
    assert batch.media[IMAGE].values.is_pinned()
    moved = batch.to("cuda", non_blocking=True).validate()
    assert moved.media[AUDIO].dst_index.is_cuda


def test_to_moves_media():
    moved = a_batch().to("meta")
    assert all(m.values.is_meta and m.dst_index.is_meta and m.cu_values.is_meta for m in moved.media.values())
    assert moved.media[IMAGE].grid_thw.is_meta


# Broken invariants and bad input


def media_with(modality, **changes):
    def change(batch: PackedBatch) -> PackedBatch:
        media = dict(batch.media)
        media[modality] = dataclasses.replace(media[modality], **changes)
        return dataclasses.replace(batch, media=media)

    return change


def set_at(name, where, value):
    def change(batch: PackedBatch) -> PackedBatch:
        tensor = getattr(batch, name).clone()
        tensor[where] = value
        return dataclasses.replace(batch, **{name: tensor})

    return change


BROKEN = [
    (set_at("span_ids", 3, 1), "span_ids numbers the media in the order of their tokens; got 1 at token 3"),
    (set_at("span_ids", 39, 5), "span_ids is -1 in the padding"),
    (lambda b: dataclasses.replace(b, span_ids=b.span_ids.long()), "span_ids is int32"),
    (lambda b: dataclasses.replace(b, span_ids=b.span_ids[1:]), "span_ids has T = 40 entries"),
    (set_at("modality_ids", 4, 0), "modality_ids is 1 in its media"),
    (set_at("position_ids", (1, 9), 2), "position_ids begins with 0 in a segment"),
    (set_at("position_ids", (1, 11), -2), "position_ids is >= 0"),
    (lambda b: dataclasses.replace(b, position_ids=b.position_ids[:2]), r"position_ids is \[T\] or \[3, T\]"),
    (lambda b: dataclasses.replace(b, sample_weight=torch.ones(6)), "sample_weight has S = 5 entries"),
    (lambda b: dataclasses.replace(b, sample_weight=-torch.ones(5)), "sample_weight is >= 0"),
    (media_with(IMAGE, dst_index=torch.arange(11)), r"media\[1\].dst_index is each item's tokens in order"),
    (media_with(IMAGE, dst_index=torch.arange(10)), r"media\[1\].dst_index has an entry for each of 11 tokens"),
    (
        media_with(IMAGE, values=torch.zeros(43, 12)),
        r"media\[1\].cu_values is N \+ 1 = 4 entries from 0 to the 43 rows",
    ),
    (media_with(IMAGE, values=torch.zeros(44, 12, device="meta")), r"media\[1\].values is on cpu"),
    (media_with(IMAGE, cu_values=torch.tensor([0, 24, 27, 44]).int()), r"media\[1\].cu_values is int32 and equal to"),
    (
        media_with(IMAGE, grid_thw=torch.tensor([[1, 4, 6], [1, 2, 2], [1, 4, 3]])),
        "grid_thw multiplies to the items' rows",
    ),
    (media_with(IMAGE, merge_size=1), "grid_thw merges to the items' tokens"),
    (media_with(VIDEO, time_step=torch.ones(2)), r"media\[3\].time_step has an entry for each of 1 items"),
    (media_with(VIDEO, time_step=torch.ones(1, device="meta")), r"media\[3\].time_step is on cpu"),
    (
        media_with(VIDEO, starts_host=(16,), dst_index=torch.arange(16, 24)),
        r"media\[3\] has each item whole in one sample",
    ),
    (media_with(VIDEO, starts_host=(36,), dst_index=torch.arange(36, 44)), r"media\[3\] lies in the batch"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_validate_names_the_broken_invariant(breaks, message):
    with pytest.raises(ValueError, match=f"PackedBatch: .*{message}"):
        breaks(a_batch(mrope=True)).validate()


V = torch.zeros(8, 3)
BAD = [
    (lambda: Media(0, V), ValueError, r"modality: expected an id in \[1, 32\), got"),
    (lambda: Media(32, V), ValueError, r"modality: expected an id in \[1, 32\), got 32"),
    (lambda: Media(1, [1.0]), TypeError, r"values: expected a tensor \[n, ...\]"),
    (lambda: Media(1, V, (1, 2, 3)), ValueError, r"grid_thw: expected \(t, h, w\) >= 1 with t \* h \* w = 8"),
    (lambda: Media(1, V, (2, 1, 4), merge_size=2), ValueError, "h and w multiples of merge_size 2"),
    (lambda: Media(1, V, (1, 2, 4), tokens=3), ValueError, "tokens: expected None or the 8 of its grid, got 3"),
    (lambda: Media(1, V, merge_size=2), ValueError, "merge_size: expected 1 without grid_thw"),
    (lambda: Media(1, V, merge_size=0), ValueError, "merge_size: expected an integer >= 1"),
    (lambda: Media(1, V, tokens=0), ValueError, "tokens: expected at least one"),
    (
        lambda: Media(3, V, (2, 2, 2), time_step=-1.0),
        ValueError,
        r"time_step: expected a finite number of seconds >= 0",
    ),
    (lambda: Media(3, V, (2, 2, 2), time_step=float("nan")), ValueError, "time_step: expected a finite number"),
    (lambda: Media(3, V, (2, 2, 2), time_step="1"), ValueError, "time_step: expected a finite number"),
    (lambda: Media(3, V, time_step=1.0), ValueError, "time_step: expected None without grid_thw"),
    (
        lambda: PackedBatch.from_samples([[clip(1.0, 2, 2, 2), clip(None, 2, 2, 2)]]),
        ValueError,
        "media 1: time_step: expected one like the first of modality 3, got None",
    ),
    (
        lambda: PackedBatch.from_samples([[clip(None, 2, 2, 2)]], mrope=True, tokens_per_second=2),
        ValueError,
        "media 0: time_step: expected seconds per step, which tokens_per_second multiplies, got None",
    ),
    (
        lambda: PackedBatch.from_samples([text(1)], tokens_per_second=2),
        ValueError,
        "tokens_per_second: expected 1 without mrope",
    ),
    (
        lambda: PackedBatch.from_samples([text(1)], mrope=True, tokens_per_second=-2),
        ValueError,
        "tokens_per_second: expected a finite number > 0",
    ),
    (
        lambda: PackedBatch.from_samples([text(1)], mrope="max"),
        ValueError,
        'mrope: expected False, True, "spatial" or "largest", got',
    ),
    (lambda: PackedBatch.from_samples([[text(1), 5]]), TypeError, r"samples\[0\]: expected a tensor .*, or a sequence"),
    (
        lambda: PackedBatch.from_samples([[torch.ones(2), image(1, 2, 2)]]),
        TypeError,
        r"samples: token ids beside media: expected \[n\] int64, got \[2\] float32",
    ),
    (
        lambda: PackedBatch.from_samples([[image(1, 2, 2)]], placeholder={VIDEO: 1}),
        ValueError,
        "placeholder: expected an id for modality 1, got {",
    ),
    (
        lambda: PackedBatch.from_samples([[image(1, 2, 2)], [image(1, 2, 2, merge=1)]]),
        ValueError,
        "media 1: grid_thw: expected a grid and merge_size as the others",
    ),
    (
        lambda: PackedBatch.from_samples([[image(1, 2, 2)], [Media(IMAGE, V)]]),
        ValueError,
        r"media 1: values: expected \[n, ...\] like the first of modality 1, \[4, 12\]",
    ),
    (
        lambda: PackedBatch.from_samples([[image(1, 2, 2)]], modality_ids=[torch.ones(1).long()]),
        ValueError,
        "modality_ids: expected None for samples with media, which determine it",
    ),
    (lambda: PackedBatch.from_samples([text(1)], sample_weight=[1, 2]), ValueError, "sample_weight: expected 1 floats"),
    (
        lambda: PackedBatch.from_samples([text(1)], sample_weight=[-1]),
        ValueError,
        "sample_weight: expected 1 floats >= 0",
    ),
    (
        lambda: PackedBatch.from_samples([text(1)], sample_weight=[float("nan")]),
        ValueError,
        "sample_weight: expected 1 floats >= 0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

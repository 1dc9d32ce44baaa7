"""Packs through DataLoaders: each sample once, the same order with any number of workers, exact resumption, also after
a kill."""

import functools
import itertools
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mmkernels
from mmkernels import plan_packing
from mmkernels.integrations.torch_data import PackCollator, PackedDataset, PackedLoader, PackedSampler, PackedStream
from mmkernels.testing.lengths import lengths_like

CAPACITY = 512
LENGTHS = np.minimum(lengths_like("obelics@8192", 160)[0] // 8, CAPACITY).tolist()


@pytest.fixture(autouse=True)
def _one_thread():
    """All tensors are small: with several threads, workers and the main process would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Samples(Dataset):
    """Sample i: LENGTHS[i] tokens with value i, labels i + 1."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        tokens = torch.full((LENGTHS[item],), item)
        return {"tokens": tokens, "labels": tokens + 1}


def load(number: int) -> dict[str, Tensor]:
    return Samples()[number]


def length_of(number: int) -> int:
    return LENGTHS[number]


def from_start(epoch: int, start: int) -> range:
    """Records that can seek; other epochs reverse them."""
    numbers = range(len(LENGTHS))
    return (numbers if epoch % 2 == 0 else numbers[::-1])[start:]


def map_loader(rank: int = 0, world_size: int = 1, accum: int = 1, **options) -> PackedLoader:
    sampler = PackedSampler(LENGTHS, CAPACITY, rank=rank, world_size=world_size, accum=accum, seed=1)
    return PackedLoader(PackedDataset(Samples(), CAPACITY), sampler, **options)


def stream_loader(rank: int = 0, world_size: int = 1, source=from_start, **options) -> PackedLoader:
    ways = {"length": length_of, "load": load, "rank": rank, "world_size": world_size, "lookahead": 32}
    return PackedLoader(PackedStream(source, CAPACITY, **ways), **options)


LOADERS = {"map": map_loader, "stream": stream_loader}


def items_of(batch) -> list[int]:
    """The samples of a batch, according to its tokens."""
    assert batch.num_tokens == CAPACITY
    host = batch.cu_seqlens_host[: batch.num_samples + 1]
    items = [int(batch.tokens[begin]) for begin in host[:-1]]
    assert [end - begin for begin, end in itertools.pairwise(host)] == [LENGTHS[item] for item in items]
    return items


def take(loader, count: int) -> list[list[int]]:
    """The items of the next batches, without fetching further."""
    return [items_of(batch) for batch in itertools.islice(loader, count)]


@functools.cache
def whole_epoch(kind: str) -> list[list[int]]:
    """Without workers or interruption."""
    return [items_of(batch) for batch in LOADERS[kind]()]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_every_sample_once_in_one_order_for_any_number_of_workers(kind, workers):
    packs = [items_of(batch.validate()) for batch in LOADERS[kind](num_workers=workers)]
    assert sorted(item for pack in packs for item in pack) == list(range(len(LENGTHS)))
    assert packs == whole_epoch(kind)
    assert len(packs) <= plan_packing(LENGTHS, CAPACITY).lower_bound + 2


@pytest.mark.parametrize("kind", LOADERS)
def test_spawned_workers_give_the_same(kind, monkeypatch):
    # Children inherit this path and import the file by the name that pytest gave it, from the checkout's root.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    some = LOADERS[kind](num_workers=1, multiprocessing_context="spawn")
    assert [items_of(batch) for batch in some] == whole_epoch(kind)


@pytest.mark.parametrize("last", ["pad", "drop"])
@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_share_the_packs_and_have_equal_steps(kind, last):
    if kind == "map":
        samplers = [PackedSampler(LENGTHS, CAPACITY, rank=rank, world_size=3, last=last) for rank in range(3)]
        ranks = [list(PackedLoader(PackedDataset(Samples(), CAPACITY), sampler)) for sampler in samplers]
        assert {len(sampler) for sampler in samplers} == {len(ranks[0])}
    else:
        ways = {"length": length_of, "load": load, "last": last, "world_size": 3}
        ranks = [list(PackedLoader(PackedStream(from_start, CAPACITY, rank=rank, **ways))) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [item for batches in ranks for batch in batches for item in items_of(batch)]
    assert len(set(seen)) == len(seen)
    empty = sum(batch.num_samples == 0 for batches in ranks for batch in batches)
    if last == "pad":
        assert sorted(seen) == list(range(len(LENGTHS)))
        assert empty < 3
    else:
        assert empty == 0
        assert len(seen) > 0.9 * len(LENGTHS)


@pytest.mark.parametrize("kind", LOADERS)
def test_epochs_differ_and_each_is_whole(kind):
    loader = LOADERS[kind]()
    epochs = [[items_of(batch) for batch in loader] for _ in range(3)]
    for packs in epochs:
        assert sorted(item for pack in packs for item in pack) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]
    assert (epochs[0] == epochs[2]) == (kind == "stream")  # whose source has two orders
    assert epochs == [
        [items_of(batch) for batch in again] for again in [LOADERS[kind](num_workers=2)] for _ in range(3)
    ]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
@pytest.mark.parametrize("kind", LOADERS)
def test_resuming_with_another_number_of_workers(kind, before, after):
    straight = LOADERS[kind]()
    whole = [[items_of(batch) for batch in straight] for _ in range(2)]
    first = LOADERS[kind](num_workers=before)
    got = take(first, 7)
    assert got == whole[0][:7]
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 2048
    then = LOADERS[kind](num_workers=after)
    then.load_state_dict(state)
    assert then.state_dict() == state
    assert [items_of(batch) for batch in then] == whole[0][7:]
    assert [items_of(batch) for batch in then] == whole[1]


@pytest.mark.parametrize("kind", LOADERS)
def test_an_interrupted_iteration_continues(kind):
    loader, whole = LOADERS[kind](), whole_epoch(kind)
    got = []
    while len(got) < len(whole):
        for batch in loader:
            got.append(items_of(batch))
            if len(got) % 5 == 0:
                break
    assert got == whole


@pytest.mark.parametrize("kind", LOADERS)
def test_resuming_with_another_world_size(kind):
    """Two ranks until step 4, then three: every sample once, and the rest in the order of an uninterrupted run."""
    two = [LOADERS[kind](rank, 2) for rank in range(2)]
    done = [take(loader, 4) for loader in two]
    states = [loader.state_dict() for loader in two]
    assert states[0] == states[1]
    three = [LOADERS[kind](rank, 3) for rank in range(3)]
    for loader in three:
        loader.load_state_dict(states[0])
    left = [[items_of(batch) for batch in loader] for loader in three]
    assert len({len(packs) for packs in left}) == 1
    seen = [item for packs in done + left for pack in packs for item in pack]
    assert sorted(seen) == list(range(len(LENGTHS)))
    if kind == "stream":
        alone = whole_epoch("stream")
        assert [pack for step in zip(*left, strict=True) for pack in step if pack] == alone[8:]


def test_resuming_inside_accumulated_packs():
    whole = [items_of(batch) for batch in map_loader(0, 2, accum=3)]
    loader = map_loader(0, 2, accum=3)
    assert take(loader, 4) == whole[:4]
    then = map_loader(0, 2, accum=3, num_workers=1)
    then.load_state_dict(loader.state_dict())
    assert [items_of(batch) for batch in then] == whole[4:]
    with pytest.raises(ValueError, match=r"state: expected the end of a step for \[world_size, accum\] \[3, 3\]"):
        map_loader(0, 3, accum=3).load_state_dict(loader.state_dict())


def run_until_killed(kind: str, workers: int, path: Path) -> None:
    """The child: logs each batch and the position after it."""
    torch.set_num_threads(1)
    loader = LOADERS[kind](num_workers=workers)
    with path.open("w", encoding="utf-8") as file:
        for batch in loader:
            file.write(json.dumps([items_of(batch), loader.state_dict()]) + "\n")
            file.flush()
            time.sleep(0.002)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_mid_epoch_resume_of_a_killed_process(kind, workers, tmp_path):
    """torchdata #1520: samples prefetched by workers were lost or repeated when a run was killed mid-epoch."""
    path = tmp_path / "seen.jsonl"
    child = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(kind, workers, path))
    child.start()
    deadline = time.monotonic() + 30
    while (not path.exists() or path.read_text(encoding="utf-8").count("\n") < 6) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -9
    seen = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    whole = whole_epoch(kind)
    assert 6 <= len(seen) < len(whole)
    assert [items for items, _ in seen] == whole[: len(seen)]
    loader = LOADERS[kind](num_workers=workers)
    loader.load_state_dict(seen[-1][1])
    assert [items_of(batch) for batch in loader] == whole[len(seen) :]


# torchdata


def stateful(kind: str, workers: int):
    dataloader = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    if kind == "map":
        sampler = PackedSampler(LENGTHS, CAPACITY, seed=1)
        packed = PackedDataset(Samples(), CAPACITY)
        return dataloader.StatefulDataLoader(packed, sampler=sampler, batch_size=None, num_workers=workers)
    stream = PackedStream(from_start, CAPACITY, length=length_of, load=load, lookahead=32)
    return dataloader.StatefulDataLoader(stream, batch_size=None, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_stateful_data_loader_resumes(kind, workers):
    whole = whole_epoch(kind)
    first = stateful(kind, workers)
    assert take(first, 7) == whole[:7]
    then = stateful(kind, workers)
    then.load_state_dict(first.state_dict())
    assert [items_of(batch) for batch in then] == whole[7:]


# Samples to batches


def test_collator_takes_the_fields_it_is_told():
    collate = PackCollator(8, labels="labels", modality_ids="kinds", loss_weight="weights", pad_token=7)
    sample = {"tokens": [1, 2], "labels": [3, 4], "kinds": [0, 1], "weights": [0.5, 1.0], "caption": "left alone"}
    batch = collate([sample, sample], (5, 9)).validate()
    assert batch.tokens.tolist() == [1, 2, 1, 2, 7, 7, 7, 7]
    assert batch.sample_ids.tolist() == [5, 5, 9, 9, -1, -1, -1, -1]
    assert batch.labels.tolist() == [3, 4, 3, 4, -100, -100, -100, -100]
    assert batch.modality_ids.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert batch.loss_weight.tolist() == [0.5, 1, 0.5, 1, 0, 0, 0, 0]
    nothing = collate([], ()).validate()
    assert (nothing.num_samples, nothing.padding) == (0, 8)
    assert nothing.labels.tolist() == [-100] * 8
    assert PackCollator(4, tokens="input_ids")([{"input_ids": torch.arange(3)}], (0,)).tokens.tolist() == [0, 1, 2, 0]
    assert PackCollator(4)([torch.arange(2)], (3,)).num_samples == 1
    assert PackCollator(2)([[]], (0,)).tokens.tolist() == [0, 0]
    with pytest.raises(KeyError, match="labels"):
        PackCollator(8, labels="labels")([{"tokens": [1]}], (0,))


def test_custom_collator_and_batched_getitem():
    class Many:
        def __getitems__(self, items: list[int]) -> list[str]:
            return [f"sample {item}" for item in items]

    packed = PackedDataset(Many(), collate=lambda samples, items: (samples, tuple(items)))
    assert packed[(3, 1)] == (["sample 3", "sample 1"], (3, 1))


def test_the_five_lines_of_the_readme():
    readme = (Path(mmkernels.__file__).parent / "planning/README.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "PackedLoader" in text)
    assert len([line for line in block.splitlines() if line]) == 5
    seen: list[int] = []
    dataset = [{"tokens": torch.full((length * 8,), item)} for item, length in enumerate(LENGTHS)]
    exec(block, {"dataset": dataset, "train": lambda batch: seen.extend(set(batch.sample_ids.tolist()) - {-1})})
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_a_plain_data_loader_without_resuming():
    sampler = PackedSampler(
        LENGTHS, CAPACITY, shuffle=False, images=[1] * len(LENGTHS), max_images=9, strategy="subset_sum"
    )
    loader = DataLoader(PackedDataset(Samples(), CAPACITY), sampler=sampler, batch_size=None)
    batches = [items_of(batch) for batch in loader]
    assert len(batches) == len(sampler)
    assert max(map(len, batches)) <= 9


def test_a_stream_that_cannot_seek_and_one_that_drops():
    whole = whole_epoch("stream")
    loader = stream_loader(source=list(range(len(LENGTHS))))
    assert take(loader, 5) == whole[:5]
    then = stream_loader(source=list(range(len(LENGTHS))))
    then.load_state_dict(loader.state_dict())
    assert [items_of(batch) for batch in then] == whole[5:]
    own = PackedStream([[1] * 3, [1] * 9, [1] * 5], 8, oversize="own_pack")
    assert [(batch.num_samples, batch.num_tokens) for batch in own] == [(1, 9), (2, 8)]
    drop = PackedStream([[1] * 3, [1] * 9, [1] * 5], 8, oversize="drop")
    assert [batch.sample_ids.tolist() for batch in drop] == [[0, 0, 0, 2, 2, 2, 2, 2]]


def test_truncated_or_split_images():
    """TRL #5904, verl #3469: samples longer than declared were truncated, images included. Here they are refused."""
    loader = PackedLoader(PackedDataset(Samples(), CAPACITY), PackedSampler([1] * len(LENGTHS), CAPACITY))
    with pytest.raises(
        ValueError, match=r"samples: expected at most capacity=512 tokens, got .* do the planned lengths"
    ):
        list(loader)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PackedSampler([9], 8), ValueError, r"lengths: expected each in \[0, capacity=8\], got 9"),
        (lambda: PackedSampler([1], 8, keep_order=True), TypeError, "keep_order: expected to be unset"),
        (lambda: PackedSampler([1], 8, rank=1), ValueError, "rank, world_size: expected both or none, got 1 and None"),
        (
            lambda: PackedSampler([1], 8, rank=2, world_size=2),
            ValueError,
            r"rank: expected in \[0, world_size=2\), got 2",
        ),
        (lambda: PackedSampler([1], 8, seed=2**31), ValueError, r"seed: expected in \[0, 2\^31\), got 2147483648"),
        (lambda: PackedDataset([]), ValueError, "capacity, collate: expected one of them, got None and None"),
        (lambda: PackedDataset([1], 8)[0], TypeError, "index: expected the item numbers of a pack"),
        (lambda: PackedLoader(PackedDataset([], 8)), TypeError, "sampler: expected a PackedSampler, got None"),
        (
            lambda: PackedLoader(PackedStream([], 8), PackedSampler([1], 8)),
            TypeError,
            "sampler: expected none with a PackedStream",
        ),
        (
            lambda: PackedLoader(PackedStream([], 8), batch_size=4),
            TypeError,
            "batch_size: expected to be unset",
        ),
        (lambda: next(iter(PackedStream([[[1]]], 8))), TypeError, "length: expected a function of the record, as its"),
        (lambda: PackedStream([], 8, last="x"), ValueError, "last: expected 'pad' or 'drop', got 'x'"),
        (
            lambda: PackedStream([], 8, max_images=2),
            ValueError,
            "images: expected a function with max_images, got None",
        ),
        (
            lambda: PackedLoader(PackedStream([], 8), persistent_workers=True, num_workers=1),
            TypeError,
            "persistent_workers: expected False with a PackedStream",
        ),
        (
            lambda: map_loader().load_state_dict({**map_loader().state_dict(), "fingerprint": 0}),
            ValueError,
            "state: expected one with the same lengths, images and options",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_state_changes_nothing():
    loader = map_loader()
    before = loader.state_dict()
    with pytest.raises(ValueError, match="state"):
        loader.load_state_dict({**before, "fingerprint": 0})
    assert loader.state_dict() == before


def test_ranks_of_a_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert (PackedSampler([1], 8).rank, PackedSampler([1], 8).world_size) == (1, 4)

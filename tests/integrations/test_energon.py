"""Packing in a task encoder of Megatron-Energon: through its own packing data set and loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

energon = pytest.importorskip("megatron.energon")

from megatron.energon.edataclass import edataclass  # noqa: E402  after the skip
from megatron.energon.errors import FatalSampleError  # noqa: E402
from megatron.energon.flavors.base_dataset import SavableDataset  # noqa: E402

from mmkernels import PackedBatch, plan_packing  # noqa: E402
from mmkernels.integrations.energon import PackedSample, PackingMixin  # noqa: E402
from mmkernels.integrations.torch_data import PackCollator  # noqa: E402
from mmkernels.testing.lengths import lengths_like  # noqa: E402

pytestmark = pytest.mark.clients

CAPACITY, BUFFER = 256, 40
LENGTHS = (lengths_like("obelics@8192", 100)[0] // 32).clip(1, CAPACITY).tolist()


@edataclass
class Words(energon.Sample):
    tokens: torch.Tensor
    labels: torch.Tensor


class Memory(SavableDataset):
    """Sample i: LENGTHS[i] tokens of value i."""

    _savable_fields = ("at",)

    def __init__(self, worker_config: Any, lengths: list[int]) -> None:
        super().__init__(worker_config=worker_config)
        self.lengths, self.at = lengths, 0

    def reset_state_own(self) -> None:
        self.at = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        return len(self.lengths)

    def worker_has_samples(self) -> bool:
        return True

    def sample(self, i: int) -> Words:
        tokens = torch.full((self.lengths[i],), i)
        return Words(__key__=f"sample {i}", __restore_key__=("Memory", i), tokens=tokens, labels=tokens + 1)

    def __iter__(self) -> Iterator[Words]:
        while self.at < len(self.lengths):
            self.at += 1
            yield self.sample(self.at - 1)
        self.at = 0

    def can_restore_sample(self) -> bool:
        return True

    def assert_can_restore(self) -> None:
        pass

    def restore_sample(self, restore_key: tuple[Any, ...]) -> Words:
        return self.sample(int(restore_key[1]))

    def config(self) -> dict[str, Any]:
        return {"type": "Memory"}


class Encoder(PackingMixin, energon.DefaultTaskEncoder):
    pass


def loaded(encoder: Encoder, lengths: list[int] = LENGTHS, batch_size: int | None = None, workers: int = 0) -> Any:
    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = encoder.build_batch(
        Memory(config, lengths), batch_size=batch_size, packing_buffer_size=BUFFER, worker_config=config
    )
    return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)


def items_of(batch: PackedBatch) -> list[int]:
    return [int(batch.tokens[begin]) for begin in batch.cu_seqlens_host[: batch.num_samples]]


@pytest.mark.parametrize("batch_size", [None, 1])
def test_packs_are_those_of_the_planned_buffers(batch_size: int | None) -> None:
    encoder = Encoder(capacity=CAPACITY, collate=PackCollator(CAPACITY, labels="labels"))
    packs = list(loaded(encoder, batch_size=batch_size))
    first = plan_packing(LENGTHS[:BUFFER], CAPACITY)
    assert [items_of(pack.batch) for pack in packs[: first.num_packs]] == [items.tolist() for items in first]
    seen = [item for pack in packs for item in items_of(pack.batch)]
    assert sorted(seen) == list(range(len(LENGTHS)))
    for pack in packs:
        assert isinstance(pack, PackedSample)
        batch = pack.batch.validate()
        assert batch.num_tokens == CAPACITY
        assert list(batch.lengths[: batch.num_samples]) == [LENGTHS[item] for item in items_of(batch)]
        real = CAPACITY - batch.padding
        assert torch.equal(batch.labels[:real], batch.tokens[:real] + 1)
        assert pack.__key__ == ",".join(f"sample {item}" for item in items_of(batch))
        assert torch.equal(pack.batch.to_megatron()["tokens"][0], batch.tokens)


def test_interrupted_and_restored() -> None:
    whole = [items_of(pack.batch) for pack in loaded(Encoder(capacity=CAPACITY))]
    loader = loaded(Encoder(capacity=CAPACITY))
    packs = iter(loader)
    got = [items_of(next(packs).batch) for _ in range(5)]
    state = loader.save_state_rank()
    then = loaded(Encoder(capacity=CAPACITY))
    then.restore_state_rank(state)
    assert got + [items_of(pack.batch) for pack in then] == whole


def test_a_single_pack_restored_and_workers() -> None:
    loader = loaded(Encoder(capacity=CAPACITY), workers=1)
    packs = list(loader)
    assert [items_of(pack.batch) for pack in packs] == [items_of(p.batch) for p in loaded(Encoder(capacity=CAPACITY))]
    again = loaded(Encoder(capacity=CAPACITY), workers=1).restore_sample(packs[3].__restore_key__)
    assert items_of(again.batch) == items_of(packs[3].batch) and again.__key__ == packs[3].__key__


def test_samples_too_long() -> None:
    lengths = [3, 999, 5]
    with pytest.raises(FatalSampleError, match=r"lengths: expected each in \[0, capacity=256\], got 999"):
        list(loaded(Encoder(capacity=CAPACITY), lengths))
    with pytest.warns(UserWarning, match=r"left out 1 of 3 samples, longer than capacity=256 .* \['sample 1'\]"):
        packs = list(loaded(Encoder(capacity=CAPACITY, oversize="drop"), lengths))
    assert [items_of(pack.batch) for pack in packs] == [[0, 2]]
    packs = list(loaded(Encoder(capacity=CAPACITY, oversize="own_pack"), lengths))
    assert sorted(items_of(pack.batch) for pack in packs) == [[0, 2], [1]]


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="strategy: expected one of auto"):
        Encoder(capacity=CAPACITY, strategy="bfd")
    encoder = Encoder(capacity=CAPACITY)
    with pytest.raises(FatalSampleError, match="expected a field 'tokens', or length= and collate="):
        encoder.select_samples_to_pack([{"ids": [1]}])
    with pytest.raises(FatalSampleError, match="expected samples that are mappings or dataclasses, got list"):
        encoder.select_samples_to_pack([[1]])
    with pytest.raises(FatalSampleError, match="length: expected a function of the sample, as its tokens are a list"):
        encoder.select_samples_to_pack([{"tokens": [torch.arange(3)]}])
    with pytest.raises(FatalSampleError, match=r"pack_selected_samples: samples: expected at most capacity=256 tokens"):
        encoder.pack_selected_samples([{"tokens": [1] * 257}])
    with pytest.raises(FatalSampleError, match=r"batch: expected packs one by one .*, got 2"):
        encoder.batch([encoder.pack_selected_samples([{"tokens": [1]}])] * 2)
    by_length = Encoder(capacity=4, length=lambda sample: len(sample["ids"]), collate=lambda samples, numbers: samples)
    assert by_length.select_samples_to_pack([{"ids": [1] * 3}, {"ids": [1] * 2}, {"ids": [2]}]) == [
        [{"ids": [1] * 3}],
        [{"ids": [1] * 2}, {"ids": [2]}],
    ]

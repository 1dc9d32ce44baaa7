"""Pack an existing data set through torch's DataLoader: planned, distributed over ranks, resumed exactly.

    sampler = PackedSampler([len(sample["tokens"]) for sample in dataset], capacity=4096)
    loader = PackedLoader(PackedDataset(dataset, capacity=4096), sampler, num_workers=2)
    for batch in loader:  # PackedBatch, this rank's share
        ...

The sampler yields the items of each pack; workers read and collate them. For a stream without an index use
`PackedStream`. `PackedLoader.state_dict()` is the position after the last yielded batch, however far workers have
prefetched; torchdata's StatefulDataLoader does the same through the `state_dict` of the sampler and of the stream:

    StatefulDataLoader(PackedDataset(dataset, capacity=4096), sampler=sampler, batch_size=None, num_workers=2)
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mmkernels import AttentionCost, PackingPlan, RankSchedule, balance_ranks, plan_packing
from mmkernels.integrations.torch_collate import Collate, PackCollator
from mmkernels.integrations.torch_stream import PackedStream, rank_and_world

__all__ = ["PackCollator", "PackedDataset", "PackedLoader", "PackedSampler", "PackedStream"]


class PackedSampler(Sampler[tuple[int, ...]]):
    """The packs of this rank, each a tuple of item numbers; empty where no pack is left for it.

    Every epoch is planned and distributed anew from (seed, epoch): every rank computes the same plan, and epochs do not
    share packs. An epoch ends at the same step on every rank, and the next iteration is the next epoch.

    Args:
        lengths: [n] integers, tokens per item; the same on every rank.
        capacity: most tokens in a pack.
        images: [n] integers, images per item, to limit or balance them.
        rank, world_size: default torch.distributed's if it is initialised, else a single rank.
        accum: packs per step and rank; balanced together.
        cost: of a pack, for the balance between ranks.
        shuffle: False keeps the data's order, in every epoch.
        seed: of the shuffling, below 2^31.
        last: "pad" or "drop", see `balance_ranks`.
        **options: of `plan_packing`: strategy, max_images, max_samples, lookahead, oversize.

    Raises:
        TypeError, ValueError: an argument that is wrong or out of range.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        capacity: int,
        *,
        images: ArrayLike | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        accum: int = 1,
        cost: AttentionCost | None = None,
        shuffle: bool = True,
        seed: int = 0,
        last: str = "pad",
        **options: Any,
    ) -> None:
        for name in ("seed", "keep_order"):
            if name in options:
                raise TypeError(f"{name}: expected to be unset (PackedSampler sets it), got {options[name]!r}")
        if isinstance(seed, bool):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        seed = operator.index(seed)
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed: expected in [0, 2^31), got {seed}")
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.accum, self.epoch = accum, 0
        self._lengths, self._images = np.array(lengths), None if images is None else np.array(images)
        self._capacity, self._cost, self._shuffle, self._seed, self._last = capacity, cost, shuffle, seed, last
        self._options = options
        self._made: tuple[int, PackingPlan] | None = None
        what = (int(capacity), shuffle, seed, sorted(options.items()))
        arrays = [self._lengths] if self._images is None else [self._lengths, self._images]
        arrays.append((cost or AttentionCost()).of_packs(self.plan()))
        self.fingerprint = zlib.crc32(b"".join([repr(what).encode(), *(array.tobytes() for array in arrays)]))
        """Hash of everything that determines the packs and their order; a state is valid only for the same one."""
        self.schedule()  # validates the arguments

    def plan(self, epoch: int | None = None) -> PackingPlan:
        """The packs of an epoch, default the current one."""
        epoch = self.epoch if epoch is None else epoch
        if self._made is None or self._made[0] != epoch:
            seed = self._epoch_seed(epoch)
            plan = plan_packing(self._lengths, self._capacity, images=self._images, seed=seed, **self._options)
            self._made = epoch, plan
        return self._made[1]

    def schedule(self, epoch: int | None = None, start: int = 0) -> RankSchedule:
        """Which rank takes which pack of an epoch, from pack `start` of its order on."""
        epoch = self.epoch if epoch is None else epoch
        options: Any = {"accum": self.accum, "cost": self._cost, "last": self._last, "start": start}
        return balance_ranks(self.plan(epoch), self.world_size, seed=self._epoch_seed(epoch), **options)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def _epoch_seed(self, epoch: int) -> int:
        return (self._seed << 32) + epoch + 1 if self._shuffle else 0

    def __len__(self) -> int:
        """Packs of this rank in the current epoch."""
        return self.schedule().num_steps * self.accum

    def __iter__(self) -> PackIterator:
        return PackIterator(self)


class PackIterator(Iterator[tuple[int, ...]]):
    """One epoch of a `PackedSampler`; its state is a position in the order that all ranks share."""

    def __init__(self, sampler: PackedSampler) -> None:
        self._sampler = sampler
        self._begin(sampler.epoch, 0, 0)

    def _begin(self, epoch: int, start: int, turn: int) -> None:
        self._epoch, self._taken = epoch, turn  # taken: packs of this rank since `start`
        self._plan = self._sampler.plan(epoch)
        self._schedule = self._sampler.schedule(epoch, start)
        self._packs = self._schedule.rank(self._sampler.rank).ravel()

    def __next__(self) -> tuple[int, ...]:
        if self._taken == len(self._packs):
            self._sampler.set_epoch(self._epoch + 1)
            raise StopIteration
        pack = int(self._packs[self._taken])
        self._taken += 1
        return tuple(self._plan[pack].tolist()) if pack >= 0 else ()

    def state_dict(self) -> dict[str, Any]:
        """The iteration's position; JSON-serialisable."""
        steps, turn = divmod(self._taken, self._sampler.accum)
        return {
            "epoch": self._epoch,
            "position": self._schedule.position(steps),
            "turn": turn,
            "fingerprint": self._sampler.fingerprint,
            "ranks": [self._sampler.world_size, self._sampler.accum],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last yielded pack; at another world size too, if that pack ended a step.

        Raises:
            ValueError: the state has other lengths or options, or is in mid-step at another world size.
        """
        if state["fingerprint"] != self._sampler.fingerprint:
            raise ValueError("state: expected one with the same lengths, images and options, got another fingerprint")
        ranks = [self._sampler.world_size, self._sampler.accum]
        if state["turn"] and state["ranks"] != ranks:
            raise ValueError(f"state: expected the end of a step for [world_size, accum] {ranks}, got {dict(state)}")
        self._sampler.set_epoch(int(state["epoch"]))
        self._begin(int(state["epoch"]), int(state["position"]), int(state["turn"]))


class PackedDataset(Dataset[Any]):
    """A map-style data set whose index is a pack: the item numbers that a `PackedSampler` yields together.

    Args:
        dataset: anything with `dataset[item]`; `__getitems__` is used if it exists.
        capacity: most tokens in a pack, for the default collator.
        collate: (samples, item numbers) -> batch; default `PackCollator(capacity)`. It must accept an empty pack.
    """

    def __init__(self, dataset: Any, capacity: int | None = None, *, collate: Collate | None = None) -> None:
        if (capacity is None) == (collate is None):
            raise ValueError(f"capacity, collate: expected one of them, got {capacity!r} and {collate!r}")
        self.dataset = dataset
        self.collate: Collate = PackCollator(int(capacity or 0)) if collate is None else collate

    def __getitem__(self, pack: Sequence[int]) -> Any:
        if not isinstance(pack, Sequence):
            raise TypeError(f"index: expected the item numbers of a pack, as PackedSampler yields them, got {pack!r}")
        together = getattr(self.dataset, "__getitems__", None)
        samples = together(list(pack)) if together is not None and pack else [self.dataset[item] for item in pack]
        return self.collate(samples, pack)


class PackedLoader:
    """torch's DataLoader over packs, resumed exactly: `state_dict` is the position after the last yielded batch.

    An iteration yields the rest of the epoch, and the next one the following epoch: an interrupted epoch resumes. A
    state may be loaded with another number of workers and, for a map-style data set, at another world size.

    Args:
        dataset: a `PackedDataset`, with its sampler, or a `PackedStream`.
        sampler: the `PackedSampler` of a `PackedDataset`.
        **options: of the DataLoader: num_workers, multiprocessing_context, pin_memory, prefetch_factor, ...

    Raises:
        TypeError: a missing or superfluous sampler; an option that PackedLoader sets itself.
    """

    def __init__(
        self, dataset: PackedDataset | PackedStream, sampler: PackedSampler | None = None, **options: Any
    ) -> None:
        stream = isinstance(dataset, PackedStream)
        if stream == (sampler is not None):
            expected = "none with a PackedStream" if stream else "a PackedSampler"
            raise TypeError(f"sampler: expected {expected}, got {sampler!r}")
        taken = {"batch_size", "batch_sampler", "shuffle", "collate_fn", "drop_last"} & set(options)
        if taken:
            raise TypeError(f"{min(taken)}: expected to be unset (PackedLoader sets it), got {options[min(taken)]!r}")
        if stream and options.get("persistent_workers"):
            raise TypeError(
                "persistent_workers: expected False with a PackedStream, because workers must restart at its position"
            )
        if not options.get("in_order", True):
            raise TypeError("in_order: expected True, because the position is that of the last batch in order")
        self._dataset, self._sampler = dataset, sampler
        self._state: dict[str, Any] | None = None
        source: Any = _WithStates(dataset) if isinstance(dataset, PackedStream) else dataset
        indices = None if sampler is None else _Indices(self)
        self._loader: DataLoader[Any] = DataLoader(source, batch_size=None, sampler=indices, **options)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        if self._sampler is None:
            raise TypeError("a stream has no length")
        return len(self._sampler)

    def _iterator(self) -> PackIterator:
        """A new iterator that continues at this loader's position."""
        assert self._sampler is not None
        iterator = iter(self._sampler)
        if self._state is not None:
            iterator.load_state_dict(self._state)
        return iterator

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._dataset, PackedStream):
            yield from self._stream(self._dataset)
            return
        place = self._iterator()  # advances with the yielded batches; the DataLoader's own iterator runs ahead
        for batch in self._loader:
            next(place)
            self._state = place.state_dict()
            yield batch
        next(place, None)  # sets the next epoch
        self._state = None

    def _stream(self, stream: PackedStream) -> Iterator[Any]:
        if self._state is not None:
            stream.load_state_dict(self._state | {"first": self._state["step"]})
        for batch, state in self._loader:
            self._state = state
            yield batch
        stream.set_epoch((stream.epoch if self._state is None else int(self._state["epoch"])) + 1)
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last yielded batch; JSON-serialisable."""
        if self._state is not None:
            return dict(self._state)
        return self._dataset.state_dict() if isinstance(self._dataset, PackedStream) else self._iterator().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from this position in the next iteration.

        Raises:
            ValueError: the state has other lengths or options.
        """
        before, self._state = self._state, dict(state)
        try:
            if isinstance(self._dataset, PackedStream):
                self._dataset.load_state_dict(state)
            else:
                self._iterator()
        except Exception:
            self._state = before
            raise


class _Indices(Sampler[Any]):
    """The sampler inside a PackedLoader's DataLoader: starts at the loader's position."""

    def __init__(self, loader: PackedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return self._loader._iterator()

    def __len__(self) -> int:
        return len(self._loader)


class _WithStates(IterableDataset[Any]):
    """A stream whose workers send the state along with each batch."""

    def __init__(self, stream: PackedStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        for batch in self._stream:
            yield batch, self._stream.state_dict()

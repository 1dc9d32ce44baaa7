"""Pack a stream of records on any number of ranks and workers, resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch.distributed
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mmkernels import StreamPlanner
from mmkernels.integrations.torch_collate import Collate, PackCollator, as_tokens

__all__ = ["PackedStream", "rank_and_world"]


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given pair, torch.distributed's, or (0, 1). Raise ValueError for an incomplete or invalid pair."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank, world_size: expected both or none, got {rank!r} and {world_size!r}")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected in [0, world_size={world_size}), got {rank}")
    return rank, world_size


class PackedStream(IterableDataset[Any]):
    """Pack records online, in order of arrival: batch s of rank r is pack s * world_size + r of the stream.

    Every worker of every rank reads all records, plans the same packs, and loads only its own samples. So keep records
    light (a key, a length) and do the slow work in `load`. The packs, and their order on a rank, are the same with any
    number of workers.

    Args:
        source: the records: an iterable that yields the same ones each time, or a function (epoch, start) -> iterable
            of an epoch's records from number `start` on, which can seek when a run resumes. Must be picklable if
            workers are spawned.
        capacity: most tokens in a pack.
        length: record -> its tokens; default the length of its sample.
        images: record -> its number of images, to limit them.
        load: record -> sample; default the record itself.
        collate: (samples, record numbers) -> batch; default `PackCollator(capacity)`. It must accept an empty pack.
        rank, world_size: default torch.distributed's if it is initialised, else a single rank.
        last: for a last step with too few packs: "pad" gives some ranks a batch without samples, "drop" discards its
            packs.
        **options: of `StreamPlanner`: lookahead, max_images, max_samples, oversize.

    Raises:
        TypeError, ValueError: an argument that is wrong or out of range.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[int, int], Iterable[Any]],
        capacity: int,
        *,
        length: Callable[[Any], int] | None = None,
        images: Callable[[Any], int] | None = None,
        load: Callable[[Any], Any] | None = None,
        collate: Collate | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        last: str = "pad",
        **options: Any,
    ) -> None:
        if last not in ("pad", "drop"):
            raise ValueError(f"last: expected 'pad' or 'drop', got {last!r}")
        if options.get("max_images") is not None and images is None:
            raise ValueError("images: expected a function with max_images, got None")
        if collate is None:
            collate = PackCollator(capacity, oversize=options.get("oversize") == "own_pack")
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.epoch = 0
        self._source, self._capacity, self._options, self._last = source, capacity, options, last
        self._images, self._load, self._collate = images, load or _itself, collate
        self._length = length or _SampleLength(self._load)
        self._planner = StreamPlanner(capacity, **options)
        self._step = self._first = 0  # the next step; the step of worker 0's first batch
        self._ended = False

    def set_epoch(self, epoch: int) -> None:
        """Start at the first record of an epoch. `PackedLoader` calls this; with another loader, call it yourself."""
        self.epoch, self._ended = epoch, False
        self._planner = StreamPlanner(self._capacity, **self._options)
        self._step = self._first = 0

    def _records(self) -> Iterator[tuple[int, Any]]:
        """(number, record) of the waiting records, then of the new ones."""
        waiting = self._planner.waiting
        start = waiting[0] if waiting else self._planner.items
        records = self._source(self.epoch, start) if callable(self._source) else islice(iter(self._source), start, None)
        kept, items = set(waiting), self._planner.items
        for number, record in enumerate(records, start):
            if number >= items or number in kept:
                yield number, record

    def _packs(self) -> Iterator[list[tuple[int, Any]]]:
        """Pack after pack, each as (number, record) pairs."""
        planner, known = self._planner, self._planner.items
        waiting: dict[int, Any] = {}

        def popped() -> Iterator[list[tuple[int, Any]]]:
            while (pack := planner.pop()) is not None:
                yield [(number, waiting.pop(number)) for number in pack.tolist()]

        for number, record in self._records():
            if number >= known:  # the others are already waiting in a loaded state
                yield from popped()
                dropped = planner.dropped
                planner.push(int(self._length(record)), int(self._images(record)) if self._images else 0)
                if planner.dropped > dropped:
                    continue
            waiting[number] = record
        planner.flush()
        yield from popped()

    def __iter__(self) -> Iterator[Any]:
        if self._ended:
            self.set_epoch(self.epoch)
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        packs = self._packs()
        while True:
            step = list(islice(packs, self.world_size))
            if not step or (len(step) < self.world_size and self._last == "drop"):
                break
            number = self._step
            self._step += 1
            if (number - self._first) % workers == mine:
                pack = step[self.rank] if self.rank < len(step) else []
                yield self._collate([self._load(record) for _, record in pack], [item for item, _ in pack])
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """The position after the last yielded batch, the same on every rank; JSON-serialisable."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "first": self._first,
            "world_size": self.world_size,
            "planner": self._planner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. It marks the end of a step, so the world size may differ.

        Raises:
            ValueError: the state is from a stream with other options.
        """
        self._planner.load_state_dict(state["planner"])
        self.epoch = int(state["epoch"])
        self._step, self._first, self._ended = int(state["step"]), int(state["first"]), False


def _itself(record: Any) -> Any:
    return record


class _SampleLength:
    """Default `length`: load the record's sample and count its tokens."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __call__(self, record: Any) -> int:
        sample = self._load(record)
        tokens = as_tokens(sample["tokens"] if isinstance(sample, Mapping) else sample)
        if not isinstance(tokens, Tensor):
            raise TypeError(f"length: expected a function of the record, as its tokens are a {type(tokens).__name__}")
        return len(tokens)

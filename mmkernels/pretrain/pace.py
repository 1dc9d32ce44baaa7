"""How fast each rank is, and who keeps the others waiting."""

from __future__ import annotations

import resource
import time
from collections import Counter, deque

import torch
from torch import Tensor

__all__ = ["Pace", "peak_memory"]

_WINDOW = 50  # steps that a straggler is judged by
_SLOW = 1.2  # times the mean of the ranks
_MOSTLY = 0.8  # of these steps


class Pace:
    """The pace of the ranks of a run, step by step.

    Encoding comes before a step's first exchange, so its seconds are each rank's own: those of its GPU, or of processor
    time, which other processes of the machine do not change. The whole step takes all ranks as long as the slowest.

    Args:
        device: of this rank.
    """

    columns = ("data", "peers", "encoding", "memory", "received")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slow: deque[int] = deque(maxlen=_WINDOW)  # the slow rank of each step, -1 for none
        self._ratios: deque[float] = deque(maxlen=_WINDOW)
        self._told: set[int] = set()
        self._marks: list[object] = []

    def mark(self) -> None:
        """The first call of a step begins the encoding, the second ends it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.process_time())

    def numbers(self, data: float, peers: float, received: float) -> list[float]:
        """This rank's columns of a step that is done on its device.

        Args:
            data, peers: seconds that it waited for its data, and then for that of other ranks.
            received: bytes from other ranks.
        """
        begin, end = self._marks[:2] if len(self._marks) >= 2 else (0.0, 0.0)
        self._marks = []
        seconds = begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin  # type: ignore[operator, arg-type]
        return [data, peers, seconds, float(peak_memory(self.device)), received]

    def figures(self, table: Tensor) -> dict[str, float]:
        """What a step's log says of the ranks: float64 [W, columns] of all; nothing of one alone."""
        if len(table) == 1:
            return {}
        data, peers, encoding, memory, received = table.unbind(1)
        mean, slowest = float(encoding.mean()), int(encoding.argmax())
        ratio = float(encoding.max()) / mean if mean else 1.0
        self._slow.append(slowest if ratio > _SLOW else -1)
        self._ratios.append(ratio)
        return {
            "ranks/imbalance": ratio,
            "ranks/slowest": slowest,
            "ranks/encoding": mean,
            "ranks/data_wait": float(data.max()),
            "ranks/peers_wait": float(peers.mean()),
            "ranks/memory": float(memory.max()),
            "ranks/received": float(received.max()),
        }

    def straggler(self) -> str:
        """What to say of a rank that has been slow in most of the last steps; once of each. Empty: of none."""
        if len(self._slow) < _WINDOW:
            return ""
        (rank, times), *_ = Counter(self._slow).most_common(1)
        if rank < 0 or times < _MOSTLY * _WINDOW or rank in self._told:
            return ""
        self._told.add(rank)
        ratio = sum(self._ratios) / len(self._ratios)
        return (
            f"rank {rank} has been the slowest in {times} of the last {_WINDOW} steps, with {ratio:.2f} times the mean "
            "time to encode its samples, and all wait for it: look at its machine"
        )


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

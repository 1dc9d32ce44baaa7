"""A process that answers what it is sent. It has its own file because a spawned process can import modules from tests/,
but not a test file under the name that pytest gives it."""

from __future__ import annotations

from multiprocessing.queues import Queue
from typing import Any

from mmkernels import AttentionMask, PackedBatch

__all__ = ["answer"]


def answer(received: Queue[Any], answers: Queue[Any], number: int) -> None:
    """For each of `number` masks, batches and plans, values that show that it arrived whole."""
    for _ in range(number):
        value = received.get()
        if isinstance(value, AttentionMask):
            answers.put(value.to_dense(9, 9).numpy())
        else:
            answers.put(value.validate().num_tokens if isinstance(value, PackedBatch) else value.items)

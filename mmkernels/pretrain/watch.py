"""Where every rank is, so that one which waits in vain can say for whom.

A thread posts this rank's place to a store beside the process group, and looks at those of the others when this rank
has not moved for long.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mmkernels.pretrain.ranks import PeerError, Place, Ranks

__all__ = ["Watch", "watching"]

# What a collective says when others do not answer, or are gone.
_IN_VAIN = re.compile(r"timed? ?out|timeout|connection (was )?(closed|reset|refused)|gloo|nccl|peer", re.IGNORECASE)
_SHOWN = 8  # ranks that a message names


class Watch:
    """The places of all ranks, which `Ranks.at` sets.

    Args:
        ranks: who train together.
        timeout: seconds that a rank may wait at one place.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks, self.timeout, self.interval = ranks, timeout, min(1.0, timeout / 8)
        host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=max(timeout, 30.0))

        def served() -> int:
            self._server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            return self._server.port

        port, options = ranks.of_leader(served), {"is_master": False, "wait_for_workers": False}
        # One of the thread's own, and one for everybody else.
        self._posting, self._reading = (dist.TCPStore(host, port, **options, timeout=patience) for _ in range(2))
        self._meetings = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def meet(self) -> None:
        """Wait for all ranks, however long they take, as long as they are heard of. Raise PeerError if one is not."""
        self._meetings += 1
        here, left, pause = f"meeting/{self._meetings}/here", f"meeting/{self._meetings}/left", 0.002
        self._reading.add(here, 1)
        while self._reading.add(here, 0) < self.ranks.size:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            if self.ranks.leads and pause == 0.5:  # one looks after all
                silent = [rank for rank, (_, seen) in self.places().items() if time.time() - seen > self.timeout]
                if silent:
                    raise PeerError(f"{self.here()}: rank {silent[0]} has not been heard of for {self.timeout:.0f} s")
        self._reading.add(left, 1)
        deadline = time.monotonic() + self.timeout
        while self.ranks.leads and self._reading.add(left, 0) < self.ranks.size and time.monotonic() < deadline:
            time.sleep(0.002)  # the store ends with this process: the others must have looked

    def places(self) -> dict[int, tuple[Place, float]]:
        """Of each rank that has posted one: (its place, when it did so last)."""
        keys = {rank: f"place/{rank}" for rank in range(self.ranks.size)}
        posted = {rank: json.loads(self._reading.get(key)) for rank, key in keys.items() if self._reading.check([key])}
        return {rank: (Place(*place), seen) for rank, (*place, seen) in posted.items()}

    def here(self) -> str:
        """Where this rank is, in words."""
        place = self.ranks.place
        return f"rank {self.ranks.rank}, step {place.step}: {place.what} for {time.time() - place.since:.0f} s"

    def others(self) -> str:
        """Where those ranks are that this one may be waiting for, in words: those that are not as far."""
        try:
            places = self.places()
        except RuntimeError:
            return "rank 0, which knows where the others are, is gone"
        mine, now = self.ranks.place, time.time()
        every = {rank: place for rank, place in places.items() if rank != self.ranks.rank}
        behind = {rank: each for rank, each in every.items() if each[0].step < mine.step}
        behind = behind or {rank: each for rank, each in every.items() if each[0][:2] != mine[:2]} or every
        said = []
        for rank, (place, seen) in sorted(behind.items())[:_SHOWN]:
            silent = f", not heard of for {now - seen:.0f} s" if now - seen > 5 * self.interval else ""
            said.append(f"rank {rank}, step {place.step}: {place.what} for {now - place.since:.0f} s{silent}")
        more = [f"and {len(behind) - _SHOWN} more"] if len(behind) > _SHOWN else []
        return "; ".join([*said, *more]) or "no other rank has said where it is"

    def _run(self) -> None:
        told: Place | None = None
        while not self._done.wait(self.interval):
            place = self.ranks.place
            try:
                self._posting.set(f"place/{self.ranks.rank}", json.dumps([*place, time.time()]))
            except RuntimeError:  # rank 0, which has the store, is gone
                return
            if told != place and not place.patient and time.time() - place.since > 0.9 * self.timeout:
                told = place
                print(f"mmkernels: {self.here()}. {self.others()}", file=sys.stderr, flush=True)


@contextmanager
def watching(ranks: Ranks, timeout: float) -> Iterator[None]:
    """Inside, a collective that fails because other ranks do not answer raises PeerError, which says where they are."""
    if ranks.group is None:
        yield
        return
    ranks.watch = watch = Watch(ranks, timeout)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or (type(error) is RuntimeError and _IN_VAIN.search(str(error)))):
            raise
        reason = str(error).partition("\n")[0]
        raise PeerError(f"{watch.here()}, in vain ({reason}). {watch.others()}") from error
    finally:
        watch.close()

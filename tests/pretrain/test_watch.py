"""Ranks that wait for each other: meetings without a limit, and messages that name who is missing."""

from __future__ import annotations

import os
import time

import pytest
import ranks
import torch.distributed as dist

from mmkernels.pretrain.ranks import PeerError, Ranks
from mmkernels.pretrain.watch import watching


def _meetings(rank: int, world: int) -> list[float]:
    peers, waited = Ranks(dist.group.WORLD), []
    with watching(peers, 4.0):
        for turn in range(world):
            began = time.monotonic()
            time.sleep(5.0 if turn == rank else 0.0)  # longer than a collective may take
            peers.meet()
            waited.append(time.monotonic() - began)
    return waited


def test_a_meeting_waits_for_the_last() -> None:
    for waited in ranks.run(2, _meetings):
        assert all(seconds >= 5.0 for seconds in waited)


def _words(rank: int, world: int) -> tuple[str, str]:
    peers = Ranks(dist.group.WORLD)
    with watching(peers, 30):
        peers.at(["computing gradients", "reading data", "computing gradients"][rank], step=[7, 7, 8][rank])
        time.sleep(2.5)
        said = peers.watch.here(), peers.watch.others()
        peers.meet()
    return said


def test_those_that_are_not_as_far_are_named() -> None:
    (here, others), _, (_, of_last) = ranks.run(3, _words)
    assert here.startswith("rank 0, step 7: computing gradients for ")
    assert others.startswith("rank 1, step 7: reading data for ") and "rank 2" in others
    assert of_last.startswith("rank 0, step 7") and "rank 1, step 7: reading data" in of_last


def _in_vain(peers: Ranks, error: RuntimeError) -> None:
    with watching(peers, 30):
        peers.at("computing gradients", step=3)
        time.sleep(1.5)
        peers.meet()
        raise error


def _failing(rank: int, world: int) -> str:
    peers = Ranks(dist.group.WORLD)
    gloo = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37076\nmore"
    with pytest.raises(PeerError) as failed:
        _in_vain(peers, RuntimeError(gloo))
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        _in_vain(peers, RuntimeError("a bug"))
    return str(failed.value)


def test_what_a_collective_says_is_explained() -> None:
    message = ranks.run(2, _failing)[0]
    assert message.startswith("rank 0, step 3: computing gradients for ")
    assert "in vain ([gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37076)" in message
    assert "rank 1, step 3" in message and "more" not in message


def test_one_process_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "nowhere.invalid")
    alone = Ranks()
    with watching(alone, 0.1):
        alone.meet()
        assert alone.watch is None

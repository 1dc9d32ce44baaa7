"""exchange="auto": which way keys travel on which machine, the same on every rank, and what either way holds."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import named
import pytest
import ranks
import torch
import torch.distributed as dist
from ops.contrastive.counting import counting
from ops.contrastive.shared import EXCHANGES, batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import Link, Machine, infonce, siglip
from mmkernels.ops.contrastive.choice import MEMORY_SHARE, bytes_held, choose, seconds
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.runtime.machine import PRESETS


def call_of(world: int, rows: int, width: int = 512, **changes: Any) -> Call:
    options = {"negatives": [0] * world, "dtype": torch.bfloat16, **changes}
    return Call([rows] * world, [rows] * world, width=width, **options)


def test_small_batches_are_gathered_and_large_ones_go_round() -> None:
    """The ring starts a computation W times; it gains where a block's computation hides its transfer."""
    for name in ("A100-80GB", "H100", "H200"):
        for world, rows, expected in (
            (1, 65536, "all_gather"),
            (2, 64, "all_gather"),
            (8, 256, "all_gather"),
            (8, 4096, "all_gather"),
            (64, 1024, "all_gather"),
            (64, 4096, "all_gather"),
            (64, 65536, "ring"),
            (4096, 128, "all_gather"),
        ):
            with named.case(name, world, rows):
                assert choose(call_of(world, rows), PRESETS[name])[0] == expected


def test_the_faster_is_chosen() -> None:
    for name, machine in PRESETS.items():
        for world in (2, 8, 64, 512):
            for rows in (64, 1024, 16384):
                for sigmoid in (False, True):
                    call = call_of(world, rows, sigmoid=sigmoid)
                    roomy = replace(machine, memory=1e15)
                    took = {how: sum(seconds(call, each, how, roomy) for each in call.rounds()) for how in EXCHANGES}
                    with named.case(name, world, rows, sigmoid, took):
                        assert took[choose(call, roomy)[0]] == min(took.values())


def test_links_decide() -> None:
    """A slow link behind enough computation favours the ring; a high latency the gather, with fewer messages."""
    machine, call = replace(PRESETS["H100"], ranks_per_node=1), call_of(16, 16384)
    hidden = replace(machine, between=Link(1e-6, 5e10))
    assert choose(call, hidden)[0] == "ring"
    assert choose(call, replace(machine, between=Link(1e-6, 1e9)))[0] == "all_gather"
    assert choose(call, replace(hidden, launch=1e-3))[0] == "all_gather"


def test_keys_that_do_not_fit_go_round() -> None:
    call = call_of(64, 1024)
    (round_,) = call.rounds()
    fits = bytes_held(call, round_, "all_gather") / MEMORY_SHARE
    machine = PRESETS["A100-80GB"]
    assert choose(call, replace(machine, memory=fits))[0] == "all_gather"
    assert choose(call, replace(machine, memory=0.99 * fits))[0] == "ring"
    assert bytes_held(call, round_, "ring") < bytes_held(call, round_, "all_gather") / 4


def test_negatives_are_chosen_for_separately() -> None:
    call = call_of(8, 64, negatives=[2**20] * 8)
    assert choose(call, replace(PRESETS["H100"], memory=1e9)) == ("all_gather", "ring")


# What ranks do


SLOW_LINKS = replace(PRESETS["CPU"], inside=Link(1.0, 1e9), between=Link(1.0, 1e9))
SMALL = replace(PRESETS["CPU"], memory=1e3)


def _ways(rank: int, world: int, exchange: str, machines: list[Machine | None]) -> list[int]:
    """How many messages arrive, of losses with uneven rows."""
    x, y = (t[: 3 + 2 * rank].clone().requires_grad_() for t in batch(16, 16, torch.float32))
    scale, arrived = torch.tensor(10.0), []
    for loss in (
        lambda **over: infonce(x, y, scale, **over),
        lambda **over: infonce(x, y, scale, negatives=y, **over),
        lambda **over: siglip(x, y, scale, 0.0, **over),
    ):
        with counting(rank, world) as counted:
            loss(group=dist.group.WORLD, exchange=exchange, machine=machines[rank]).backward()
        arrived.append(counted.bytes)
    return arrived


def test_every_rank_chooses_alike() -> None:
    """By the slowest of each figure, although ranks differ in rows and in machines."""
    gathered, ring = (ranks.run(4, _ways, how, [None] * 4) for how in EXCHANGES)
    assert gathered != ring
    assert ranks.run(4, _ways, "auto", [None] * 4) == gathered
    assert ranks.run(4, _ways, "auto", [SLOW_LINKS] * 4) == gathered
    assert ranks.run(4, _ways, "auto", [None, None, SMALL, SLOW_LINKS]) == ring


def _wrong_machines(rank: int, world: int) -> list[str]:
    x, group = batch(4)[0], dist.group.WORLD
    single = replace(PRESETS["CPU"], flops={"float32": 1e9}, name="single")
    said = []
    for machine in (single if rank else None, "H100" if rank else None):
        try:
            infonce(x, x, 10.0, group=group, machine=machine)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_wrong_machines() -> None:
    first, second = ranks.run(2, _wrong_machines)
    assert first == ["ValueError: group: expected every rank to call with valid arguments, rank 1 raised an error"] * 2
    assert second == [
        "ValueError: machine: expected one with a rate for float64, got float32 (single)",
        "TypeError: machine: expected None, or an mmkernels.Machine, got 'H100' (str)",
    ]
    with pytest.raises(ValueError, match="machine: expected None without a group, got Machine"):
        infonce(*batch(4), 10.0, machine=PRESETS["CPU"])


class _Live(TorchDispatchMode):
    """Bytes of storages that live, beyond those from before."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.seen = 0, 0, {}

    def _gone(self, key: int) -> None:
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self.seen:
                    self.seen[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out


def _held(rank: int, world: int, exchange: str) -> int:
    x, y = (t[: 20 + 4 * rank].clone().requires_grad_() for t in batch(40, 2048, torch.float32))
    with _Live() as live:
        infonce(x, y, torch.tensor(10.0), group=dist.group.WORLD, exchange=exchange).backward()
    return live.most


def test_bytes_held() -> None:
    """The largest sum of living tensors, whose rows are wide here."""
    counts = [20, 24, 28, 32]
    call = Call(counts, counts, [0] * 4, 2048, torch.float32)
    (round_,) = call.rounds()
    for exchange in EXCHANGES:
        held = max(ranks.run(4, _held, exchange))
        own = 2 * 32 * 2048 * 4  # gradients of the rank's own rows
        with named.case(exchange, held - own, bytes_held(call, round_, exchange)):
            assert 0.8 * held <= bytes_held(call, round_, exchange) + own <= 1.25 * held

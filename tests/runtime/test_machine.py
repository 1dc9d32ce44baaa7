"""The model of a machine: collectives by hand, presets, mistakes, and what is measured over a group."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import named
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist

from mmkernels import Link, Machine
from mmkernels.runtime.collectives import Cost, Network, all_gather, all_reduce, all_to_all, reduce_scatter, ring_pass
from mmkernels.runtime.machine import FIGURES, PRESETS, machine_of
from mmkernels.runtime.measuring import fitted

NODES = Network(inside=Link(1.0, 100.0), between=Link(10.0, 20.0), ranks_per_node=4)


def test_within_a_node() -> None:
    assert all_gather(NODES, 4, 300) == reduce_scatter(NODES, 4, 300) == Cost(900, 3, 3 + 9)
    assert all_reduce(NODES, 4, 400) == Cost(600, 6, 6 + 6)
    assert all_to_all(NODES, 4, 300) == Cost(900, 3, 3 + 9)
    assert ring_pass(NODES, 4, 300, messages=2) == Cost(300, 2, 2 + 3)


def test_between_nodes() -> None:
    """A gather uses the links of all ranks of a node, 80 here; a message has one."""
    assert all_gather(NODES, 8, 400) == Cost(2800, 7, (10 + 6) + 2800 / 80)
    assert all_to_all(NODES, 8, 400) == Cost(2800, 7, (3 + 40) + 1600 / 20)
    assert ring_pass(NODES, 8, 400) == Cost(400, 1, 10 + 20)
    assert all_gather(replace(NODES, ranks_per_node=8), 8, 400).seconds == 7 + 2800 / 100


def test_sums_of_many_ranks_take_trees() -> None:
    """Two trees: their depth grows with the logarithm of the nodes."""
    found = all_reduce(NODES, 4096, 0)
    assert found.seconds == 2 * (3 * 1 + 10 * 10)
    assert found.messages == 2 * (3 + 10)


def test_uneven_parts_wait_for_the_largest() -> None:
    assert all_to_all(NODES, 4, 100, 300) == Cost(300, 3, 3 + 9)
    assert ring_pass(NODES, 4, 100, largest=300) == Cost(100, 1, 1 + 3)


def test_one_rank_receives_nothing() -> None:
    for collective in (all_gather, reduce_scatter, all_reduce, all_to_all, ring_pass):
        assert collective(NODES, 1, 100) == Cost()


def test_presets_are_parts_of_data_sheets() -> None:
    h100 = PRESETS["H100"]
    assert h100.rate(torch.bfloat16) == h100.rate(torch.float16) == 0.6 * 989e12
    assert h100.between.bandwidth == 0.8 * 400e9 / 8
    assert "not measured" in h100.source
    assert machine_of(torch.device("cpu")) is PRESETS["CPU"]
    for machine in PRESETS.values():
        assert len(machine.figures(torch.float32)) == FIGURES


def test_gpus_are_known_by_name(monkeypatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA L4": "A100-80GB"}
    for index, (name, expected) in enumerate(names.items()):
        about = SimpleNamespace(name=name, total_memory=10**10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        with named.case(name):
            assert machine_of(torch.device("cuda", 90 + index)) == replace(PRESETS[expected], memory=1e10)
            peak = None if "L4" in name else pytest.approx(989e12)
            assert Machine.peak("cuda", torch.bfloat16) == peak
    others = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    for name, peak in {"NVIDIA A100-SXM4-80GB": 312e12, **dict.fromkeys(others)}.items():
        about = SimpleNamespace(name=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        assert Machine.peak("cuda:0", torch.float16) == (peak and pytest.approx(peak))
    assert Machine.peak("cpu", torch.float32) is None
    assert Machine.of("cpu") is PRESETS["CPU"]


def test_slowest_takes_the_worst_of_each() -> None:
    fast, slow = PRESETS["H200"], PRESETS["A100-80GB"]
    late = replace(fast, launch=1e-3, asynchronous=False)
    found = Machine.slowest(torch.bfloat16, [each.figures(torch.bfloat16) for each in (fast, slow, late)])
    assert found.figures(torch.bfloat16) == [*slow.figures(torch.bfloat16)[:-2], 1e-3, 0.0]


def test_numbers_of_numpy(tmp_path: Path) -> None:
    machine = replace(PRESETS["CPU"], ranks_per_node=np.int64(8), memory=np.float32(1e9))
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine


def test_mistakes() -> None:
    cpu = PRESETS["CPU"]
    named.mistakes(
        (lambda: replace(cpu, flops=1e12), TypeError, "flops: expected rates by dtype name.*got 1000000000000.0"),
        (
            lambda: replace(cpu, flops={"half": "fast"}),
            TypeError,
            r"flops\['half'\]: expected a number > 0, got 'fast'",
        ),
        (lambda: replace(cpu, flops={"bf16": 1e12}), ValueError, "flops: expected names of dtypes.*got 'bf16'"),
        (lambda: replace(cpu, inside=1e9), TypeError, "inside: expected a Link, got 1000000000.0"),
        (
            lambda: replace(cpu, between=Link(-1e-6, 1e9)),
            ValueError,
            r"between.latency: expected a number > 0, got -1e",
        ),
        (lambda: replace(cpu, memory=math.inf), ValueError, "memory: expected a number > 0, got inf"),
        (lambda: replace(cpu, ranks_per_node=1.5), ValueError, "ranks_per_node: expected an integer, got 1.5"),
        (lambda: replace(cpu, launch=True), TypeError, "launch: expected a number > 0, got True"),
        (lambda: Machine.measured(node_group=1), ValueError, "group: expected a process group of all nodes"),
    )


def test_a_link_isfitted() -> None:
    """Exactly, where a link explains the times."""
    waits, sends, link = [3.0, 6.0, 3.0], [1e3, 5e2, 1e6], Link(1e-4, 1e8)
    times = [w * link.latency + s / link.bandwidth for w, s in zip(waits, sends, strict=True)]
    found = fitted(
        [w / t for w, t in zip(waits, times, strict=True)], [s / t for s, t in zip(sends, times, strict=True)]
    )
    assert math.isclose(found.latency, 1e-4, rel_tol=1e-6) and math.isclose(found.bandwidth, 1e8, rel_tol=1e-6)


def _measured(rank: int, world: int) -> list[Machine]:
    pairs, singles = [dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([i]) for i in range(world)]
    short = {"seconds": 0.01, "dtypes": (torch.float32, torch.bfloat16)}
    alone = Machine.measured(**short)
    flat = Machine.measured(group=dist.group.WORLD, **short)
    nodes = Machine.measured(group=dist.group.WORLD, node_group=pairs[rank // 2], **short)
    single = Machine.measured(group=singles[rank], **short)
    apart = Machine.measured(group=dist.group.WORLD, node_group=singles[rank], **short)
    return [alone, flat, nodes, single, apart]


def test_measured() -> None:
    """Every rank gets the same figures of a group; timings are judged by `mmkernels bench ranks`."""
    found = ranks.run(4, _measured)
    alone, flat, nodes, single, apart = found[0]
    assert (single.inside, single.ranks_per_node, apart.ranks_per_node) == (PRESETS["CPU"].inside, 1, 1)
    assert alone.inside == PRESETS["CPU"].inside
    assert flat.inside == flat.between
    assert (flat.ranks_per_node, nodes.ranks_per_node) == (4, 2)
    assert nodes.between.latency >= nodes.inside.latency
    assert flat.rate(torch.bfloat16) >= flat.rate(torch.float32)
    for machine in ("flat", "nodes"):
        of_ranks = [each[1 if machine == "flat" else 2] for each in found]
        with named.case(machine):
            assert all(each == of_ranks[0] for each in of_ranks)

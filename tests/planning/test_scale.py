"""What a step takes on many ranks: the reduction's bytes as torch's wrappers send them, and the plan's figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import named
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmkernels import Machine, TrainingStep, plan_scale
from mmkernels.ops.contrastive.choice import bytes_held
from mmkernels.planning.reduction import reduction_cost
from mmkernels.planning.scale import call_of

UNITS = ([(8, 6), (8,)], [(7, 8), (7,)], [(5, 7), (5,)])  # weights and biases of layers; uneven over 2 and 4 ranks
WIDE = ([(1000, 4096), (1000,)], [(4096, 1000), (4096,)])  # more than a bucket


def _model(units: Any) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(weight[1], weight[0]) for weight, _ in units))


def _step(model: nn.Module, units: Any) -> None:
    model(torch.ones(2, units[0][0][1])).sum().backward()


def _replicated(rank: int, world: int, units: Any) -> int:
    model, received = DistributedDataParallel(_model(units)), [0]

    def hook(_, bucket):
        received[0] += 2 * (world - 1) * bucket.buffer().nbytes
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    hook.__annotations__ = {"bucket": dist.GradBucket}  # DDP reads them, not their names
    model.register_comm_hook(None, hook)
    _step(model, units)
    return received[0]


def test_replicas() -> None:
    """Of any buckets a ring delivers 2(W-1)/W."""
    for world in (1, 2, 4):
        for units in (UNITS, WIDE):
            expected = reduction_cost("ddp", units, world, Machine.named("H100")).received
            with named.case(world, units):
                assert ranks.run(world, _replicated, units) == [expected * world] * world


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Inside: bytes that a rank receives in gathers, scattered sums and sums."""
    received = [0, 0, 0]
    gather, scatter = (
        next(name for name in names if hasattr(dist, name))
        for names in (
            ("all_gather_single", "all_gather_into_tensor"),
            ("reduce_scatter_single", "reduce_scatter_tensor"),
        )
    )
    plain = {name: getattr(dist, name) for name in (gather, scatter, "all_reduce")}

    def of(arguments: tuple[Any, ...], named: dict[str, Any], *names: str) -> Tensor:
        return next((named[name] for name in names if name in named), None) if not arguments else arguments[0]

    def gathered(*arguments: Any, **more: Any) -> Any:
        out = of(arguments, more, "output_tensor", "output")
        world = dist.get_world_size(more.get("group"))
        received[0] += out.nbytes * (world - 1) // world
        return plain[gather](*arguments, **more)

    def scattered(*arguments: Any, **more: Any) -> Any:
        out = of(arguments, more, "output")
        received[1] += out.nbytes * (dist.get_world_size(more.get("group")) - 1)
        return plain[scatter](*arguments, **more)

    def summed(*arguments: Any, **more: Any) -> Any:
        tensor = of(arguments, more, "tensor")
        world = dist.get_world_size(more.get("group"))
        received[2] += -(-2 * (world - 1) * tensor.nbytes // world)
        return plain["all_reduce"](*arguments, **more)

    try:
        for name, function in ((gather, gathered), (scatter, scattered), ("all_reduce", summed)):
            setattr(dist, name, function)
        yield received
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def _sharded(rank: int, world: int, within: int, mixed: bool, again: bool) -> int:
    model = _model(UNITS)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (world,))
    if within < world:
        mesh = init_device_mesh("cpu", (world // within, within), mesh_dim_names=("nodes", "ranks"))
    for module in (*model, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    with _counting() as received:
        _step(model, UNITS)
    return sum(received)


def test_shards() -> None:
    """Of every unit, uneven ones padded; in bfloat16 with sums in float32, too."""
    machine = replace(Machine.named("H100"), ranks_per_node=2)
    for world, within in ((2, 2), (4, 4), (4, 2)):
        for mixed in (False, True):
            for again in (False, True):
                kind = "fsdp" if within == world else "hsdp"
                size = {"weight": 2 if mixed else 4, "gathers": 2 if again else 1}
                expected = reduction_cost(kind, UNITS, world, machine, **size)
                with named.case(kind, world, mixed, again):
                    assert ranks.run(world, _sharded, within, mixed, again) == [expected.received] * world


# The plan

STEP = TrainingStep(rows=1024, width=512, parameters=10**9 + 1, flops=1e11)


def test_a_plan() -> None:
    machine = Machine.named("A100-80GB")
    first, *_, last = plan_scale(STEP, machine=machine)
    assert [plan.ranks for plan in plan_scale(STEP, machine=machine)] == [8, 64, 512, 4096]
    assert first.rows == 8192
    assert first.encoders == last.encoders == 3e11 * 1024 / machine.rate(torch.bfloat16)
    for plan in (first, last):
        hidden, exposed = plan.seconds
        assert hidden <= exposed
        assert plan.loss == pytest.approx(plan.exchanges[plan.exchange].seconds)
        call = call_of(STEP, plan.ranks)
        (round_,) = call.rounds()
        assert plan.memory == 16 * STEP.parameters + bytes_held(call, round_, plan.exchange)
        share = (plan.ranks - 1) / plan.ranks
        keys = plan.rows * STEP.width * share
        for name, features in (("all_gather", 4 * keys), ("ring", 8 * keys)):
            rest = plan.exchanges[name].received - features
            assert 0 <= rest <= 150 * plan.rows + 1000 * plan.ranks


def test_options_of_a_step() -> None:
    def plan(**changes: Any) -> Any:
        return plan_scale(replace(STEP, **changes), [64], machine=Machine.named("H100"))[0]

    base = plan()
    assert plan(cached=True).encoders == pytest.approx(4 / 3 * base.encoders)
    assert plan(reduction="fsdp").memory < base.memory / 30
    assert plan(reduction="fsdp").update == pytest.approx(base.update / 64, rel=1e-6)
    assert plan(reduction="hsdp").reduction.seconds < plan(reduction="fsdp").reduction.seconds
    assert plan(gradients="bfloat16").reduction.received == math.ceil(base.reduction.received / 2)
    for changes in ({"negatives": 1024}, {"teacher": 256}):
        for name in ("all_gather", "ring"):
            assert plan(**changes).exchanges[name].received > base.exchanges[name].received
    hard, queue = (plan(negatives=1024, hard_negatives=hard).exchanges["ring"] for hard in (True, False))
    assert hard.received > queue.received
    assert plan(loss="siglip").exchanges["ring"].received < base.exchanges["ring"].received


def test_one_rank_exchanges_nothing() -> None:
    (plan,) = plan_scale(STEP, [1], machine=Machine.named("H100"))
    assert plan.reduction.received == 0
    assert all(each.received == each.messages == 0 for each in plan.exchanges.values())


def test_mistakes() -> None:
    machine = Machine.named("H100")
    named.mistakes(
        (lambda: replace(STEP, rows=0), ValueError, "rows: expected an integer >= 1, got 0"),
        (lambda: replace(STEP, flops=math.nan), ValueError, "flops: expected a number >= 0, got nan"),
        (lambda: replace(STEP, loss="hinge"), ValueError, "loss: expected one of infonce, siglip, got 'hinge'"),
        (lambda: replace(STEP, reduction="zero"), ValueError, "reduction: expected one of ddp, fsdp, hsdp, got 'zero'"),
        (lambda: replace(STEP, dtype="float64"), ValueError, "dtype: expected one of float32, .*got 'float64'"),
        (lambda: replace(STEP, loss="siglip", teacher=8), ValueError, "teacher: expected 0 with loss='siglip', got 8"),
        (lambda: plan_scale(8, machine=machine), TypeError, "step: expected a TrainingStep, got 8"),
        (lambda: plan_scale(STEP, machine="H100"), TypeError, "machine: expected a Machine, got 'H100'"),
        (lambda: plan_scale(STEP, [8, 0], machine=machine), ValueError, r"ranks\[1\]: expected an integer >= 1, got 0"),
        (
            lambda: plan_scale(replace(STEP, reduction="hsdp"), [12], machine=machine),
            ValueError,
            "ranks: expected a multiple of the 8 ranks of a node with reduction='hsdp', got 12",
        ),
    )

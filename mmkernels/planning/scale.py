"""What a contrastive training step takes on 8 to 4,096 ranks: bytes, messages, memory and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmkernels.ops.checks import real, wrong_type, wrong_value
from mmkernels.ops.contrastive.choice import bytes_held, choose, products_seconds, seconds
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.planning.plan import integer
from mmkernels.planning.reduction import REDUCTIONS, Units, reduction_cost, shards
from mmkernels.runtime.collectives import Cost
from mmkernels.runtime.machine import Machine

__all__ = ["ExchangePlan", "StepPlan", "TrainingStep", "call_of", "plan_scale"]

STATE = 16  # bytes per parameter: float32 weight, gradient and Adam's two moments
ADAM = 28  # bytes per parameter that Adam's update reads and writes
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class TrainingStep:
    """A step of contrastive training, of which every rank has the same share.

    Args:
        rows: pairs per rank.
        width: E of the features.
        parameters: of all encoders.
        flops: of all encoders' forward, per pair (`EncoderCost.transformer` counts them).
        loss: "infonce" or "siglip".
        dtype: of features and products: "bfloat16", "float16" or "float32".
        negatives: extra keys per rank; hard_negatives: whether they get a gradient.
        teacher: width of a momentum teacher's features, 0 for none; its encoders' flop belong to `flops`.
        return_stats: as in `infonce`.
        cached: with gradient caching, which runs every forward twice.
        reduction: of gradients: "ddp", "fsdp" or "hsdp" (sharded within a node).
        units: modules that `fully_shard` is applied to, taken as equally large.
        gathers: how often a step gathers each; 1 with `GradCache(chunk_size="auto")` or reshard_after_forward=False.
        weights, gradients: dtypes in which parameters are gathered and gradients reduced.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    rows: int
    width: int
    parameters: int
    flops: float
    loss: str = "infonce"
    dtype: str = "bfloat16"
    negatives: int = 0
    hard_negatives: bool = False
    teacher: int = 0
    return_stats: bool = False
    cached: bool = False
    reduction: str = "ddp"
    units: int = 24
    gathers: int = 2
    weights: str = "bfloat16"
    gradients: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("width", 1), ("parameters", 1), ("negatives", 0), ("teacher", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), at_least=least))
        for name in ("units", "gathers"):
            object.__setattr__(self, name, integer(name, getattr(self, name), at_least=1))
        if not 0 <= real("flops", self.flops, "a number >= 0") < math.inf:
            wrong_value("flops", "a number >= 0", self.flops)
        known: Mapping[str, Sequence[str]] = {"loss": ("infonce", "siglip"), "reduction": REDUCTIONS}
        known = {**known, **dict.fromkeys(("dtype", "weights", "gradients"), tuple(_DTYPES))}
        for name, values in known.items():
            if getattr(self, name) not in values:
                wrong_value(name, f"one of {', '.join(values)}", getattr(self, name))
        for name in ("negatives", "teacher"):
            if self.loss == "siglip" and getattr(self, name):
                wrong_value(name, "0 with loss='siglip'", getattr(self, name))


@dataclass(frozen=True)
class ExchangePlan:
    """One way to exchange keys.

    Attributes:
        received: bytes per rank and step.
        messages: per rank and step.
        seconds: of the loss's forward and backward with it, computation included.
        held: bytes per rank beyond its own rows.
    """

    received: int
    messages: int
    seconds: float
    held: int


@dataclass(frozen=True)
class StepPlan:
    """A step on W ranks.

    Attributes:
        ranks: W.
        rows: N, of all ranks.
        exchange, exchange_of_negatives: what `exchange="auto"` chooses.
        exchanges: by name, all_gather and ring: keys and negatives both in that way.
        encoders, loss: seconds of the encoders' forward and backward, and of the loss with the chosen exchange.
        products: seconds of the loss's products in `loss`.
        reduction: bytes and messages of the gradients, and seconds if nothing hides them.
        update: seconds of the optimizer.
        memory: bytes per rank of weights, gradients, Adam's moments and the exchange; without activations.
    """

    ranks: int
    rows: int
    exchange: str
    exchange_of_negatives: str
    exchanges: Mapping[str, ExchangePlan]
    encoders: float
    loss: float
    products: float
    reduction: Cost
    update: float
    memory: int

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: if the reduction hides behind the encoders as far as it can, and if nothing hides it."""
        rest = self.encoders + self.loss + self.update
        return rest + max(0.0, self.reduction.seconds - self.encoders), rest + self.reduction.seconds

    @property
    def efficiency(self) -> tuple[float, float]:
        """The products' share of either."""
        hidden, exposed = self.seconds
        products = self.encoders + self.products
        return products / hidden, products / exposed


def plan_scale(step: TrainingStep, ranks: Sequence[int] = (8, 64, 512, 4096), *, machine: Machine) -> list[StepPlan]:
    """Predict a step at several world sizes, with the same rows per rank.

    Bytes and messages follow from the arguments; tests compare these functions with what collectives deliver on up to
    four ranks. Seconds are the model's: flop / rate, bytes / bandwidth, messages * latency. Not modelled: activations'
    memory, data loading, stragglers, congestion, and a library's choice of algorithms and protocols.

    Args:
        step: what every rank does.
        ranks: world sizes.
        machine: the ranks' (`Machine.named`, `Machine.measured`, `Machine.load`).

    Returns:
        a plan per world size.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    if not isinstance(step, TrainingStep):
        wrong_type("step", "a TrainingStep", step)
    if not isinstance(machine, Machine):
        wrong_type("machine", "a Machine", machine)
    return [_planned(step, integer(f"ranks[{i}]", world, at_least=1), machine) for i, world in enumerate(ranks)]


def call_of(step: TrainingStep, world: int) -> Call:
    """The loss's call on W ranks."""
    rows, sigmoid = [step.rows] * world, step.loss == "siglip"
    return Call(
        rows,
        rows,
        [step.negatives] * world,
        step.width,
        _DTYPES[step.dtype],
        sigmoid=sigmoid,
        return_stats=step.return_stats,
        teacher=step.teacher,
        gradients=(True, True, step.hard_negatives),
        scalars=(4, 4) if sigmoid else (4,),
    )


def _units(step: TrainingStep) -> Units:
    """Of equal size."""
    size = -(-step.parameters // step.units)
    return [[(min(size, step.parameters - i * size),)] for i in range(step.units) if i * size < step.parameters]


def _planned(step: TrainingStep, world: int, machine: Machine) -> StepPlan:
    call, rate = call_of(step, world), machine.rate(_DTYPES[step.dtype])
    exchanges = {name: _exchanged(call, name, machine) for name in ("all_gather", "ring")}
    chosen, of_negatives = choose(call, machine)
    ways = [(each, chosen) for each in call.rounds()] + [(each, of_negatives) for each in call.rounds_of_negatives()]
    rest = call.rest(machine.network).seconds
    dtypes = {"weight": _DTYPES[step.weights].itemsize, "gradient": _DTYPES[step.gradients].itemsize}
    reduction = reduction_cost(step.reduction, _units(step), world, machine, gathers=step.gathers, **dtypes)
    mine = -(-step.parameters // shards(step.reduction, world, machine))
    return StepPlan(
        ranks=world,
        rows=step.rows * world,
        exchange=chosen,
        exchange_of_negatives=of_negatives,
        exchanges=exchanges,
        encoders=(4 if step.cached else 3) * step.flops * step.rows / rate,
        loss=rest + sum(seconds(call, each, how, machine) for each, how in ways),
        products=sum(products_seconds(call, each, machine) for each, _ in ways),
        reduction=reduction,
        update=ADAM * mine / machine.memory_bandwidth,
        memory=STATE * mine + sum(bytes_held(call, each, how) for each, how in ways),
    )


def _exchanged(call: Call, exchange: str, machine: Machine) -> ExchangePlan:
    cost, rounds = call.cost(machine.network, 0, exchange), [*call.rounds(), *call.rounds_of_negatives()]
    took = call.rest(machine.network).seconds + sum(seconds(call, each, exchange, machine) for each in rounds)
    return ExchangePlan(cost.received, cost.messages, took, sum(bytes_held(call, each, exchange) for each in rounds))

"""`mmkernels scale`: a contrastive step on 8 to 4,096 ranks, as two tables: the exchange, and the step."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tabulate import tabulate

from mmkernels import EncoderCost, Machine, StepPlan, TrainingStep, plan_scale

__all__ = ["main", "render"]

OF_EXCHANGE = ("ranks", "exchange", "MB received", "messages", "GB held", "loss ms")
OF_STEP = ("ranks", "batch", "encoders ms", "loss ms", "reduction MB", "ms", "update ms", "step ms", "products", "GB")

_Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Options:
    """What a contrastive training step takes on many ranks: bytes, messages, memory and seconds of its exchanges.

    Bytes follow from the options. Seconds are predicted from the machine's figures."""

    ranks: tuple[int, ...] = (8, 64, 512, 4096)
    """World sizes."""
    machine: str = "H100"
    """A100-80GB, H100 or H200 by data sheet, or a file that Machine.save wrote."""
    rows: int = 1024
    """Pairs per rank."""
    batch: int | None = None
    """Pairs of all ranks, instead of --rows."""
    encoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """WIDTHxLAYERSxTOKENS of a transformer, once for each; by default those of CLIP ViT-L/14."""
    width: int = 768
    """Of the features."""
    loss: Literal["infonce", "siglip"] = "infonce"
    """The loss."""
    dtype: _Dtype = "bfloat16"
    """Of features, products and gathered weights."""
    gradients: _Dtype = "float32"
    """In which gradients are reduced."""
    negatives: int = 0
    """Extra keys per rank."""
    hard_negatives: bool = False
    """The extra keys get a gradient."""
    teacher: int = 0
    """Width of a momentum teacher's features; its forward counts as one more of the encoders."""
    return_stats: bool = False
    """With the loss's statistics."""
    cached: bool = False
    """With gradient caching."""
    reduction: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Replicas, shards, or shards within a node."""
    gathers: int = 2
    """How often a step gathers sharded parameters."""
    json: bool = False
    """Print the figures as JSON."""


def _machine(name: str) -> Machine:
    path = Path(name)
    return Machine.load(path) if path.suffix or path.exists() else Machine.named(name)


def _encoders(given: Sequence[str]) -> tuple[int, int, float]:
    """Layers, parameters and forward flop per pair."""
    layers, parameters, flops = 0, 0, 0.0
    for text in given or ("1024x24x257", "768x12x77"):
        numbers = text.split("x")
        if len(numbers) != 3 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
            raise ValueError(f"--encoder: expected WIDTHxLAYERSxTOKENS, such as 1024x24x257, got {text!r}")
        width, depth, tokens = map(int, numbers)
        layers, parameters = layers + depth, parameters + 12 * width**2 * depth
        flops += float(EncoderCost.transformer(width, depth).of_items(np.array([tokens]))[0])
    return layers, parameters, flops


def _step(options: Options, world: int) -> TrainingStep:
    layers, parameters, flops = _encoders(options.encoder)
    return TrainingStep(
        rows=options.rows if options.batch is None else -(-options.batch // world),
        width=options.width,
        parameters=parameters,
        # A backward counts as two forwards, and a cached forward runs twice; a teacher's runs once.
        flops=flops * (1 + 1 / (4 if options.cached else 3) if options.teacher else 1),
        loss=options.loss,
        dtype=options.dtype,
        negatives=options.negatives,
        hard_negatives=options.hard_negatives,
        teacher=options.teacher,
        return_stats=options.return_stats,
        cached=options.cached,
        reduction=options.reduction,
        units=layers,
        gathers=options.gathers,
        weights=options.dtype,
        gradients=options.gradients,
    )


def render(plans: Sequence[StepPlan], machine: Machine) -> str:
    """The plans as text."""
    exchange, step = [], []
    row: tuple[str, ...]
    for plan in plans:
        for name, each in plan.exchanges.items():
            chosen = " *" if name == plan.exchange else ""
            row = (f"{each.received / 1e6:,.1f}", f"{each.messages:,}", f"{each.held / 1e9:,.2f}")
            exchange.append((f"{plan.ranks:,}", f"{name}{chosen}", *row, f"{each.seconds * 1e3:,.1f}"))
        (hidden, exposed), (best, worst) = plan.seconds, plan.efficiency
        row = (f"{plan.encoders * 1e3:,.1f}", f"{plan.loss * 1e3:,.1f}", f"{plan.reduction.received / 1e6:,.0f}")
        row += (f"{plan.reduction.seconds * 1e3:,.1f}", f"{plan.update * 1e3:,.1f}")
        row += (f"{hidden * 1e3:,.1f} .. {exposed * 1e3:,.1f}", f"{worst:.0%} .. {best:.0%}")
        step.append((f"{plan.ranks:,}", f"{plan.rows:,}", *row, f"{plan.memory / 1e9:,.1f}"))
    return "\n".join(
        [
            f"{machine.name}: {machine.source}",
            "",
            "The loss and its exchange, per rank and step (* is what exchange='auto' chooses):",
            tabulate(exchange, OF_EXCHANGE, disable_numparse=True, colalign=("right", "left", *["right"] * 4)),
            "",
            "The step, per rank: from gradients' reduction hidden behind the encoders to not hidden:",
            tabulate(step, OF_STEP, disable_numparse=True, colalign=["right"] * len(OF_STEP)),
            "GB: weights, gradients, Adam's moments and the exchange, without activations",
        ]
    )


def _figures(plan: StepPlan) -> dict[str, Any]:
    return {**asdict(plan), "seconds": plan.seconds, "efficiency": plan.efficiency}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels scale`; returns the exit status."""
    options = tyro.cli(Options, prog="mmkernels scale", args=None if argv is None else list(argv))
    try:
        machine = _machine(options.machine)
        plans = [
            plan for world in options.ranks for plan in plan_scale(_step(options, world), [world], machine=machine)
        ]
    except (ValueError, OSError) as error:
        print(f"mmkernels scale: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"machine": asdict(machine), "plans": [_figures(plan) for plan in plans]}, indent=1))
    else:
        print(render(plans, machine))
    return 0

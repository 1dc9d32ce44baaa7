"""Transfer: a function from the recipe of a run to the recipe of another task, in which the run's weights go on.

Streams and fusion keep their names, and with them their weights; objectives and metrics are the task's; stages say what
learns. Sources: adapters, Houlsby et al. 2019 (arXiv:1902.00751); gradual unfreezing, Howard and Ruder 2018
(arXiv:1801.06146).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmkernels.pretrain.encoders import Adapted
from mmkernels.pretrain.fusion import AdaptedFusion
from mmkernels.pretrain.mixing import Mixing
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.policies import Policy
from mmkernels.pretrain.recipe import Recipe, Stage, Stream
from mmkernels.pretrain.tasks import TASKS, Task
from mmkernels.pretrain.unfreezing import EVERYTHING, stages_of

__all__ = ["Transfer", "drawn_anew", "transferred"]


@dataclass(frozen=True)
class Transfer:
    """What becomes of a run's recipe."""

    task: Literal["answer", "caption", "classify", "match", "retrieve"]
    """classify: a class from one stream. answer: a class from streams that meet in the fusion, such as an image and a
    question. retrieve: contrast of two streams. caption: the next token of a causal stream. match: whether two streams
    belong together."""
    label: str = ""
    """Field of the data with the class, for classify and answer (whose default is "answer")."""
    read: tuple[str, ...] = ()
    """The streams of the run that the task reads, where it could be others: one to classify, two to retrieve or match,
    one whose fused tokens answer."""
    field: tuple[str, ...] = ()
    """Fields of the data that streams read instead of their own: STREAM=FIELD, such as text=title."""
    probe: bool = False
    """Only a linear head learns, from samples as they are, without augmentation; the run's own parameters stay, and run
    without gradients."""
    adapters: int | None = None
    """Small layers in every block learn, with the norms and the head: adapters whose hidden layer has the width divided
    by this number; 8 is usual."""
    unfreeze: str | None = None
    """Parts begin to learn one after the other: head:100,fusion:300,all. Parts are head, fusion, all, the names of
    streams and patterns of parameter names; + joins several."""
    scratch: bool = False
    """Draw all weights anew: the same model and tokenizer without what the run has learned, to compare with."""
    parts_before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changed settings of the run's recipe, by dotted name."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        ways = {"probe": self.probe, "adapters": self.adapters is not None, "unfreeze": self.unfreeze is not None}
        if sum(ways.values()) > 1:
            got = ", ".join(f"--{name}" for name, given in ways.items() if given)
            raise ValueError(f"probe, adapters, unfreeze: expected one of them at most, got {got}")
        if self.adapters is not None and self.adapters < 1:
            raise ValueError(f"adapters: expected at least 1, got {self.adapters}")
        for each in self.field:
            if not all(each.partition("=")):
                raise ValueError(f"field: expected STREAM=FIELD, such as text=title, got {each!r}")


def transferred(base: Recipe, transfer: Transfer) -> Recipe:
    """The recipe of a task on the recipe of a run.

    Raises:
        ValueError: the task needs what the base does not have; a wrong schedule.
    """
    task = _with_fields(TASKS[transfer.task](base, transfer.label, transfer.read), transfer.field)
    name, part = task.objective
    if transfer.probe and isinstance(part, Answer):
        part = dataclasses.replace(part, head="linear")
    compared = getattr(part, "compares", ())
    swaps = getattr(part, "negatives", "") == "swapped"
    streams = {key: _plain(key, stream, task, name, compared, swaps) for key, stream in task.streams.items()}
    if transfer.probe:
        streams = {key: dataclasses.replace(s, views=tuple(filter(_swaps, s.views))) for key, s in streams.items()}
    fusion = task.fusion
    stages: tuple[Stage, ...] = (Stage(),)
    if transfer.probe:
        stages = (Stage(trainable=task.head),)
    elif transfer.adapters is not None:
        streams, fusion, stages = _adapted(streams, fusion, task.head, transfer.adapters)
    elif transfer.unfreeze is not None:
        named = {"head": task.head, **({"fusion": ("fusion.*",)} if fusion is not None else {})}
        named |= {key: (f"streams.{key}.*",) for key, stream in streams.items() if not stream.tied}
        stages = stages_of(transfer.unfreeze, named)
    return dataclasses.replace(
        base,
        summary=f"{base.summary}; then {transfer.task}",
        streams=streams,
        objectives={name: part},
        fusion=fusion,
        metrics=task.metrics,
        stages=stages,
        draw=False,
        policy=Policy(),
        mixing=Mixing(),
        settings={},
    )


def drawn_anew(base: Recipe, transfer: Transfer) -> tuple[str, ...]:
    """Patterns of the names of parameters that do not go on with the run's weights: heads for other classes, or all."""
    return EVERYTHING if transfer.scratch else TASKS[transfer.task](base, transfer.label, transfer.read).fresh


def _with_fields(task: Task, fields: tuple[str, ...]) -> Task:
    """Let streams read other fields."""
    streams = dict(task.streams)
    for each in fields:
        stream, _, of_data = each.partition("=")
        if stream not in streams:
            raise ValueError(f"field: expected a stream of the task ({', '.join(streams)}), got {stream!r} in {each!r}")
        streams[stream] = dataclasses.replace(streams[stream], field=of_data)
    return task._replace(streams=streams)


def _plain(key: str, stream: Stream, task: Task, objective: str, compared: tuple[str, ...], swaps: bool) -> Stream:
    """A stream without what belonged to other objectives: masks, momentum twins, a projection that is not used."""
    views = tuple(
        view
        for view in stream.views
        if (not view.evaluated or (swaps and _swaps(view))) and (not view.when or objective in view.when)
    )
    owners = {task.streams[name].tied or name for name in compared}
    used = (stream.tied or key) in owners
    project = stream.project if used or stream.project != "mlp" else "linear"
    return dataclasses.replace(stream, views=views, teacher=None, project=project)


def _swaps(view: Any) -> bool:
    """Whether a view makes the wrong pairs of a task, rather than changing samples."""
    return bool(getattr(view, "swaps", False))


def _adapted(
    streams: Mapping[str, Stream], fusion: Any, head: tuple[str, ...], reduction: int
) -> tuple[dict[str, Stream], Any, tuple[Stage, ...]]:
    """Adapters in every encoder and fusion with blocks; a fusion without them is small, and learns as it is."""
    adapted = {
        key: dataclasses.replace(stream, encoder=_with_adapters(stream.encoder, Adapted, "encoder", reduction))
        for key, stream in streams.items()
    }
    learns = [*head, "*.adapter.*"]
    if fusion is not None:
        fusion = _with_adapters(fusion, AdaptedFusion, "fusion", reduction)
        learns += [] if isinstance(fusion, AdaptedFusion) else ["fusion.*"]
    parts = [*(stream.encoder for stream in adapted.values()), fusion]
    if not any(isinstance(part, (Adapted, AdaptedFusion)) for part in parts):
        raise ValueError("adapters: expected a run with transformer blocks, got one without")
    return adapted, fusion, (Stage(trainable=(*learns, *_norms(adapted, fusion))),)


def _norms(streams: Mapping[str, Stream], fusion: Any) -> list[str]:
    """Patterns of the names of the norms' parameters. A stream, such as one of surface normals, may be called as if it
    were a norm; then the norms are those of what has adapters."""
    if not any("norm" in key for key in streams):
        return ["*norm*.*"]
    adapted = (key for key, stream in streams.items() if isinstance(stream.encoder, Adapted) and not stream.tied)
    within = [f"streams.{key}" for key in adapted] + (["fusion"] if isinstance(fusion, AdaptedFusion) else [])
    return [f"{each}.*norm*.*" for each in within]


def _with_adapters(part: Any, kind: type, inner: str, reduction: int) -> Any:
    """A part with adapters, if it has blocks; one that has them already keeps those."""
    if isinstance(part, kind):
        has: int = part.reduction  # type: ignore[attr-defined]
        if has != reduction:
            raise ValueError(f"adapters: expected {has}, as the run has already, got {reduction}")
        return part
    return kind(**{inner: part, "reduction": reduction}) if _has_layers(part) else part


def _has_layers(part: Any) -> bool:
    """Whether a part, or one inside it, has `layers`."""
    inner = (getattr(part, f.name) for f in dataclasses.fields(part))
    return bool(getattr(part, "layers", 0)) or any(_has_layers(p) for p in inner if dataclasses.is_dataclass(p))

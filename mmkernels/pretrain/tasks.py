"""What a task keeps of the recipe of a run, and what it adds: streams, fusion, an objective with its metric, a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mmkernels.pretrain.fusion import AdaptedFusion
from mmkernels.pretrain.metrics import Predictions, Reranked, Retrieval
from mmkernels.pretrain.objectives import Answer, Contrast, Matching, NextToken
from mmkernels.pretrain.recipe import Facts, Recipe, Stream

__all__ = ["TASKS", "Task"]


class Task(NamedTuple):
    """The parts of a recipe for one task."""

    streams: Mapping[str, Stream]
    fusion: Any
    objective: tuple[str, Any]  # its name, and itself
    metrics: tuple[Any, ...]
    head: tuple[str, ...]  # patterns of the parameters that belong to the task
    fresh: tuple[str, ...] = ()  # patterns of those that no other run can give


def answer(base: Recipe, label: str, read: Sequence[str]) -> Task:
    """A class from fused tokens. The stream that reads `text` reads `question`, unless another does."""
    streams, fusion = _fused("answer", base)
    known = dict.fromkeys([*streams, *_written(fusion)])
    (stream,) = _chosen("answer", read, known, 1) if read else (_written(fusion) or _asked(streams))[:1]
    streams, fusion = _alone(streams, fusion, stream)
    if "question" not in {_field(n, s) for n, s in streams.items()}:
        texts = {n: s for n, s in streams.items() if _field(n, s) == "text"}
        streams = {**streams, **{n: dataclasses.replace(s, field="question") for n, s in texts.items()}}
    like = next((o for o in base.objectives.values() if isinstance(o, Answer) and o.read in known), Answer())
    part = dataclasses.replace(like, read=stream, label=label or "answer", weight=1.0)
    return _classes("answer", streams, fusion, part, _measured(base, "answer", part, streams))


def classify(base: Recipe, label: str, read: Sequence[str]) -> Task:
    """A class from one stream's pooled tokens, without a fusion."""
    if not label:
        raise ValueError("label: expected the field of the data with the class to tell, got none")
    own = [name for name, stream in base.streams.items() if not stream.tied]
    (stream,) = _chosen("classify", read, own, 1)
    pool: Any = base.streams[stream].pool
    part = Answer(stream, label=label, pool=pool, head="linear")
    return _classes("classes", {stream: base.streams[stream]}, None, part, (Predictions("classes"),))


def retrieve(base: Recipe, label: str, read: Sequence[str]) -> Task:
    """Contrast of two streams, as in the base if it compares them."""
    _no_label("retrieve", label)
    pairs = dict.fromkeys(pair for part in base.objectives.values() if (pair := _pair(part)))
    a, b = next(iter(pairs)) if len(pairs) == 1 and not read else _chosen("retrieve", read, base.streams, 2)
    name, part = _of_base(base, lambda part: set(_pair(part)) == {a, b}) or ("contrast", Contrast(a, b))
    if isinstance(part, Contrast):  # these two need a momentum twin
        part = dataclasses.replace(part, queue=0, distil=0.0)
    owners = {base.streams[each].tied or each for each in (a, b)}
    streams = {n: s for n, s in base.streams.items() if n in {a, b} | owners}
    fitting = (m for m in base.metrics if isinstance(m, Retrieval) and {m.a, m.b} == {a, b} and m.through in ("", name))
    metric = next(fitting, Retrieval(a, b))
    projected = [n for n in sorted(owners) if base.streams[n].project != "none"]
    head = [f"streams.{n}.{what}.*" for n in projected for what in ("norm", "project")]
    head += [f"objectives.{name}.*"] if _learns(part, base) else []
    return Task(streams, None, (name, part), (metric,), tuple(head))


def caption(base: Recipe, label: str, read: Sequence[str]) -> Task:
    """The next token of a causal stream, which reads the others if there is a fusion."""
    _no_label("caption", label)
    causal = [n for n, s in base.streams.items() if getattr(s.encoder, "causal", False)]
    (stream,) = _chosen("caption", read, causal, 1, "causal ")
    if base.fusion is None:
        streams, fusion = {stream: base.streams[stream]}, None
    else:
        streams, fusion = _alone(*_fused("caption", base), stream)
    found = _of_base(base, lambda part: isinstance(part, NextToken) and part.stream == stream)
    return _by_token(base, streams, fusion, *(found or ("words", NextToken(stream))))


def match(base: Recipe, label: str, read: Sequence[str]) -> Task:
    """Whether two streams belong together, after a fusion."""
    _no_label("match", label)
    streams, fusion = _fused("match", base)

    def fits(part: Any) -> bool:
        pair = {part.a, part.b} if isinstance(part, Matching) else set()
        return bool(pair) and pair <= set(streams) and set(read) in (set(), pair)

    found = _of_base(base, fits)
    if found is None:
        a, b = _chosen("match", read, list(streams), 2)
        written = _written(fusion)
        found = "matching", Matching(a, b, read="" if b in written else written[0] if written else "")
    return _by_token(base, streams, fusion, *found)


TASKS: Mapping[str, Callable[[Recipe, str, Sequence[str]], Task]] = {
    "answer": answer,
    "caption": caption,
    "classify": classify,
    "match": match,
    "retrieve": retrieve,
}
"""By name: (the base recipe, the label, the streams that are read) -> the task's parts."""


def _of_base(base: Recipe, fits: Callable[[Any], bool]) -> tuple[str, Any] | None:
    """(name, part) of the first objective of the base that fits, as the only one."""
    found = ((name, part) for name, part in base.objectives.items() if fits(part))
    return next(((name, dataclasses.replace(part, weight=1.0)) for name, part in found), None)


def _by_token(base: Recipe, streams: Mapping[str, Stream], fusion: Any, name: str, part: Any) -> Task:
    """A task whose head goes on, if the base has it."""
    return Task(streams, fusion, (name, part), _measured(base, name, part, streams), (f"objectives.{name}.*",))


def _measured(base: Recipe, name: str, part: Any, streams: Collection[str]) -> tuple[Any, ...]:
    """The predictions of an objective, and what the base measures of the same one, except what orders by embeddings
    first: nothing compares these any more."""
    same = type(base.objectives.get(name)) is type(part)
    own = [
        metric
        for metric in (base.metrics if same else ())
        if getattr(getattr(metric, "of", metric), "objective", "") == name
        and not isinstance(metric, Reranked)
        and {getattr(metric, each) for each in ("stream", "a", "b") if hasattr(metric, each)} <= set(streams)
    ]
    return tuple(dict.fromkeys([Predictions(name), *own]))


def _classes(name: str, streams: Mapping[str, Stream], fusion: Any, part: Answer, metrics: tuple[Any, ...]) -> Task:
    """The classes are those of the task's data: no other run has a head for them."""
    head = (f"objectives.{name}.*",)
    return Task(streams, fusion, (name, part), metrics, head, fresh=head)


def _chosen(task: str, read: Sequence[str], known: Collection[str], count: int, kind: str = "") -> tuple[str, ...]:
    """The streams that a task reads: those asked for, or all there are. Raise ValueError if that is unclear."""
    chosen = tuple(read or known)
    if len(chosen) != count or len(set(chosen)) != count or not set(chosen) <= set(known):
        number, plural = {1: ("one", ""), 2: ("two", "s")}[count]
        if len(known) < count:
            have = f"one with {', '.join(known)}" if known else "one without"
            raise ValueError(f"task: {task}: expected a run with {number} {kind}stream{plural}, got {have}")
        got = ", ".join(read) or "no choice"
        raise ValueError(f"read: task {task}: expected {number} of the {kind}streams {', '.join(known)}, got {got}")
    return chosen


def _no_label(task: str, label: str) -> None:
    if label:
        raise ValueError(f"label: expected none for task {task}, which has no classes, got {label!r}")


def _fused(task: str, base: Recipe) -> tuple[dict[str, Stream], Any]:
    """The streams that the base's fusion reads, and the fusion. A stream that only repeats another, for an objective of
    its own, is left out: it has the encoder of that stream and reads the same field."""
    if base.fusion is None:
        have = ", ".join(base.streams)
        raise ValueError(f"task: {task}: expected a run with a fusion, got one without; its streams are {have}")
    if isinstance(base.fusion, AdaptedFusion):
        kept, inner = _fused(task, dataclasses.replace(base, fusion=base.fusion.fusion))
        return kept, dataclasses.replace(base.fusion, fusion=inner)
    settings = {f.name: getattr(base.fusion, f.name) for f in dataclasses.fields(base.fusion)}
    several = {k: v for k, v in settings.items() if isinstance(v, tuple) and v and set(v) <= set(base.streams)}
    single = {v for v in settings.values() if isinstance(v, str) and v in base.streams}
    named = dict.fromkeys([*single, *(name for value in several.values() for name in value)])
    extra = {n for n in named if n not in single and base.streams[n].tied in named and _repeats(base.streams, n)}
    fewer = {key: tuple(n for n in value if n not in extra) for key, value in several.items()}
    owners = {base.streams[n].tied or n for n in named}
    kept = {n: s for n, s in base.streams.items() if n in owners | (set(named) - extra)}
    return kept, dataclasses.replace(base.fusion, **fewer)


def _alone(streams: dict[str, Stream], fusion: Any, stream: str) -> tuple[dict[str, Stream], Any]:
    """Without the others of the streams that a fusion changes each by itself."""
    into = getattr(fusion, "into", ())
    if isinstance(into, str) or stream not in into:
        return streams, fusion
    if isinstance(fusion, AdaptedFusion):
        kept, inner = _alone(streams, fusion.fusion, stream)
        return kept, dataclasses.replace(fusion, fusion=inner)
    others = set(into) - {stream, streams[stream].tied}
    kept = {name: each for name, each in streams.items() if name not in others}
    return kept, dataclasses.replace(fusion, into=(stream,))


def _repeats(streams: Mapping[str, Stream], name: str) -> bool:
    tied = streams[name].tied
    return _field(name, streams[name]) == _field(tied, streams[tied])


def _field(name: str, stream: Stream) -> str:
    return stream.field or name


def _written(fusion: Any) -> tuple[str, ...]:
    """The streams that a fusion changes or makes, if it says so."""
    into = getattr(fusion, "into", ())
    return (into,) if isinstance(into, str) else tuple(into)


def _asked(streams: Mapping[str, Stream]) -> tuple[str, ...]:
    """Where a fusion changes all streams, the one with the question, or else the first."""
    texts = [n for n, s in streams.items() if _field(n, s) in ("question", "text")]
    return tuple(texts or streams)


def _learns(part: Any, base: Recipe) -> bool:
    """Whether an objective that compares embeddings has parameters, such as a scale."""
    with torch.device("meta"):
        return any(True for _ in part.build(Facts(base.model, 0, {}, base.streams)).parameters())


def _pair(part: Any) -> tuple[str, ...]:
    """The two streams whose embeddings an objective compares; none of another."""
    return (part.a, part.b) if all(hasattr(part, name) for name in ("compares", "a", "b")) else ()

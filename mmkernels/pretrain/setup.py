"""What a run needs before its first step: the data that its recipe asks for, and the tokenizer."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import EMBEDDED, Data, FilterList, Mixed, Source, Subset, Text, open_data
from mmkernels.pretrain.data.opening import part_names
from mmkernels.pretrain.data.seeds import is_held_out
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.run_folder import RunFolder, stored_config
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = [
    "documents",
    "expect_fields",
    "expect_packages",
    "expect_some_left",
    "may_lack",
    "open_source",
    "read_by",
    "tokenizer_for",
]

log = logging.getLogger("mmkernels.pretrain.data")

_TEXTS = 10_000  # samples that a tokenizer is trained on
_VALIDATION = 0.1  # share of the concepts


def open_source(config: Config) -> Data:
    """The data of a run, without what its filter list names. Raise ValueError if it lacks what the recipe reads."""
    recipe = config.wiring()
    expect_some_left(recipe, config.without)
    expect_packages(recipe.metrics)
    name = config.data or recipe.data
    fields, labels = read_by(recipe)
    data = open_data(
        name,
        weights=config.data_weights,
        partial=may_lack(recipe) or bool(config.without),  # what must be there is checked below
        fields=[*fields, *labels],
        labels=tuple(dict.fromkeys([*labels, *config.labels])),
        table=config.table,
        resolution=config.resolution,
        eval_fraction=config.eval_fraction,
        held_out_by=config.held_out_by,
        max_eval=config.eval_limit,
        max_broken=config.max_broken if config.filter is None else 1.0,
    )
    expect_fields(config.recipe, recipe, name, data.train, config.without)
    if config.filter is not None:
        data = FilterList.read(config.filter).apply(data)
        for source in (data.train, *data.held_out.values()):
            source.broken.limit(config.max_broken)
    if config.validate:
        data = validation(name, data, config.eval_limit)
    data = data._replace(train=labelled(name, data.train, recipe))
    return data._replace(train=some_of(name, data.train, config.train_fraction))


def expect_some_left(recipe: Recipe, without: Sequence[str]) -> None:
    """Raise ValueError unless a recipe has the streams, and an objective can learn without them."""
    if unknown := [stream for stream in without if stream not in recipe.streams]:
        raise ValueError(f"without: expected some of the streams {', '.join(recipe.streams)}, got {unknown[0]!r}")
    needs = {
        name: dict.fromkeys(stream for each in ("stream", "a", "b", "read") if (stream := getattr(part, each, "")))
        for name, part in recipe.objectives.items()
        if part.weight != 0
    }
    if without and all(streams.keys() & set(without) for streams in needs.values()):
        read = "; ".join(f"{name} reads {', '.join(streams)}" for name, streams in needs.items())
        raise ValueError(
            f"without: expected streams that some objective does not need, got {', '.join(without)} ({read})"
        )


def some_of(name: str, source: Source, fraction: float) -> Source:
    """A fraction of the training samples, by a hash of their names: no seed changes it, and a larger fraction has every
    sample of a smaller one. The classes of labels stay those of all.

    Args:
        name: of the data set, for messages.
        source: to choose from.
        fraction: above 0, at most 1.

    Raises:
        ValueError: none is left.
    """
    if fraction == 1:
        return source
    rows = [i for i in range(len(source)) if is_held_out(f"train_fraction/{source.name(i)}", fraction)]
    if not rows:
        raise ValueError(f"train_fraction: expected enough for a sample of the {len(source)} in {name}, got {fraction}")
    return source.only(np.array(rows, np.int64))


def labelled(name: str, source: Source, recipe: Recipe) -> Source:
    """The training samples with a class, where nothing else is learned: the others would teach nothing.

    Args:
        name: of the data set, for messages.
        source: to choose from.
        recipe: whose objectives read labels.

    Raises:
        ValueError: none has one.
    """
    labels = {getattr(part, "label", "") for part in recipe.objectives.values() if part.weight != 0}
    if "" in labels or all(each in EMBEDDED for each in part_names(name)):
        return source
    rows = [i for i in range(len(source)) if any(source.peek(i).get(label, -100) >= 0 for label in labels)]
    if len(rows) == len(source):
        return source
    shown = " or ".join(sorted(labels))
    if not rows:
        raise ValueError(f"data: expected training samples of {name} with the label {shown}, got none")
    message = "%s: %d of %d training samples have no %s: they are not drawn, since nothing else is learned"
    log.warning(message, name, len(source) - len(rows), len(source), shown)
    return source.only(np.array(rows, np.int64))


def expect_packages(metrics: Sequence[Any]) -> None:
    """Raise ValueError if a package is missing that a metric measures with."""
    for metric in metrics:
        for package in getattr(metric, "needs", ()):
            if importlib.util.find_spec(package) is None:
                who = f"metrics.{type(metric).__name__.lower()}"
                raise ValueError(f"{who}: needs the package {package}: pip install 'mmkernels[evaluate]'")


def validation(name: str, data: Data, most: int) -> Data:
    """A tenth of the training concepts, by their hashes, in place of the held-out sets. What is chosen by it can still
    be judged by these.

    Args:
        name: of the data set, for messages.
        data: to split.
        most: samples to evaluate on, evenly spaced.

    Raises:
        ValueError: too few concepts.
    """
    concepts, places = np.unique(data.train.concepts, return_inverse=True)
    held = np.array([is_held_out(f"validation/{concept}", _VALIDATION) for concept in concepts.tolist()], bool)[places]
    learned, rest = np.flatnonzero(~held), np.flatnonzero(held)
    if not (len(learned) and len(rest)):
        raise ValueError(f"validate: expected a data set of several concepts, got {name}, which has {len(concepts)}")
    chosen = rest[spaced(len(rest), most)]
    return Data(data.train.only(learned), {"validation": Subset(data.train, chosen)})


def read_by(recipe: Recipe) -> tuple[list[str], list[str]]:
    """(the fields that the streams of a recipe read, the labels that its objectives and metrics read)."""
    parts = (*recipe.objectives.values(), *recipe.metrics)
    labels = dict.fromkeys(part.label for part in parts if getattr(part, "label", ""))
    return list(dict.fromkeys(stream.field or name for name, stream in recipe.streams.items())), list(labels)


def may_lack(recipe: Recipe) -> bool:
    """Whether something that a recipe reads may be missing, see `Groups`."""
    return any(getattr(metric, "optional", False) for metric in recipe.metrics)


def expect_fields(name: str, recipe: Recipe, data: str, source: Source, without: Collection[str] = ()) -> None:
    """Raise ValueError if a data set lacks what a part of a recipe reads, or a part names what the recipe lacks.

    It may lack what streams read that every sample is without. A set of a mixture may lack some fields, which is
    logged, but not all that the streams read.
    """
    wanted = {stream.field or key: key for key, stream in recipe.streams.items() if key not in without}
    parts = {f"objectives.{key}": part for key, part in recipe.objectives.items()}
    parts |= {f"metrics.{type(part).__name__}": part for part in recipe.metrics}
    labels = {part.label: key for key, part in reversed(parts.items()) if getattr(part, "label", "")}
    for metric in (each for each in recipe.metrics if getattr(each, "optional", False)):
        key = labels.get(metric.label, "")
        if metric.label not in source.classes and parts[key] is metric:
            log.warning("%s has no label %r: %s is not measured", data, metric.label, key)
            del labels[metric.label]
    for field, key in wanted.items():
        if field not in source.fields:
            hint = f" (to learn without that stream: --without {key})" if len(wanted) > 1 else ""
            raise ValueError(
                f"data: expected a data set with the field {field!r}, which streams.{key} of recipe {name} reads, got "
                f"{data}, which has {', '.join(source.fields)}{hint}"
            )
    for field, who in labels.items():
        if field not in source.classes:
            has = ", ".join(source.classes) or "none"
            raise ValueError(
                f"data: expected a data set with the label {field!r}, which {who} of recipe {name} reads, got {data}, "
                f"whose labels are: {has}"
            )
    made = getattr(recipe.fusion, "into", ())  # a fusion may add a stream, or say into which it writes
    readable = dict.fromkeys([*recipe.streams, *([made] if isinstance(made, str) else made)])
    for who, part in parts.items():
        _expect_names(who, part, {"read": readable}, empty=("read",))
        _expect_names(who, part, {"stream": recipe.streams, "a": recipe.streams, "b": recipe.streams})
        if who.startswith("metrics."):
            _expect_names(who, part, {"objective": recipe.objectives, "through": recipe.objectives}, empty=("through",))
    if isinstance(source, Mixed):
        _expect_parts(name, source, wanted, labels)


def _expect_names(who: str, part: Any, known: Mapping[str, Mapping[str, Any]], empty: Sequence[str] = ()) -> None:
    """Settings of these names say which stream or objective is meant."""
    for setting, names in known.items():
        value = getattr(part, setting, None)
        if isinstance(value, str) and value not in names and not (value == "" and setting in empty):
            near = difflib.get_close_matches(value, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{who}.{setting}: expected one of {', '.join(names)}, got {value!r}{hint}")


def _expect_parts(name: str, source: Mixed, wanted: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """Of each data set of a mixture: field -> the stream, label -> the part that reads it."""
    for part, its in source.parts.items():
        lacking = [f"{field} (streams.{key})" for field, key in wanted.items() if field not in its.fields]
        if len(lacking) == len(wanted):
            raise ValueError(
                f"data: expected data sets with some of the fields {', '.join(wanted)}, which recipe {name} reads, got "
                f"{part}, which has {', '.join(its.fields)}"
            )
        lacking += [f"{field} ({who})" for field, who in labels.items() if field not in its.inner.classes]
        if lacking:
            log.warning("%s has no %s: its samples take no part in what needs that", part, ", ".join(lacking))


def tokenizer_for(config: Config, data: Data, folder: RunFolder) -> TextTokenizer:
    """The run's tokenizer: the one that its folder has, or that of the run it begins with, if that read texts, or one
    trained on the training texts."""
    if folder.tokenizer.exists():
        return TextTokenizer.load(folder.tokenizer)
    if config.init is not None and _text_fields(stored_config(config.init)):
        tokenizer = TextTokenizer.load(config.init / "tokenizer.json")
        if config.vocabulary != stored_config(config.init).vocabulary:
            message = "vocabulary: %s has a tokenizer of %d tokens, which is taken over; %d are of no effect"
            log.warning(message, config.init, len(tokenizer), config.vocabulary)
        return tokenizer
    return TextTokenizer.train(texts(data.train, _text_fields(config)), config.vocabulary)


def _text_fields(config: Config) -> list[str]:
    return [s.field or name for name, s in config.wiring().streams.items() if s.encoder.reads_text]


def texts(source: Source, fields: list[str]) -> Iterator[str]:
    """Every text of some fields, of evenly spaced samples."""
    for index in _spread(source) if fields else ():
        values = source.peek(int(index))
        for value in (values.get(field) for field in dict.fromkeys(fields)):
            if isinstance(value, Text):
                yield from (*value.captions, *value.keywords)
            elif isinstance(value, str):
                yield value
            elif value is not None and hasattr(value, "parts"):  # a Document
                yield from (part for part in value.parts if isinstance(part, str))


def documents(source: Source, field: str) -> Iterator[str]:
    """Each different text of a field once, with its keywords, of evenly spaced samples."""
    found: dict[str, None] = {}
    for index in _spread(source):
        value = source.peek(int(index)).get(field)
        if value is not None:
            found[" ".join((*value.captions, *value.keywords)) if isinstance(value, Text) else str(value)] = None
    yield from found


def _spread(source: Source) -> np.ndarray:
    """Evenly spaced samples; of a mixture, each part by its share."""
    if source.shares is not None:
        return source.shares.spread(_TEXTS)
    return spaced(len(source), _TEXTS)

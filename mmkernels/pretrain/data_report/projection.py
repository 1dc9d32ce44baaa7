"""Samples as points in a plane: the two principal components of a run's embeddings, or of simple features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from mmkernels.pretrain.data import BrokenImageError, Sample, Text
from mmkernels.pretrain.data_report.pictures import thumbnail
from mmkernels.pretrain.data_report.reading import Opened
from mmkernels.pretrain.data_report.scan import Scan, captions_of, is_picture
from mmkernels.pretrain.load import Pretrained

__all__ = ["Points", "points"]

MOST = 2_000  # points
_SIDE, _CHUNK = 16, 64


class Points(NamedTuple):
    """A picture of the data."""

    what: str  # the features
    xy: np.ndarray  # float64 [n, 2]
    share: float  # of the variance that the two components have
    split: list[str]
    samples: list[Sample]


def points(data: Opened, found: Scan, model: Pretrained | None) -> Points | None:
    """Some samples of every split, evenly spaced, as points; None if fewer than three can be compared."""
    samples, splits = _some(data, found)
    features, what, kept = _embedded(samples, model) if model is not None else _plain(samples)
    if len(kept) < 3:
        return None
    xy, share = _components(features)
    return Points(what, xy, share, [splits[i] for i in kept], [samples[i] for i in kept])


def _some(data: Opened, found: Scan) -> tuple[list[Sample], list[str]]:
    count = len(found.rows.split)
    rows = np.linspace(0, count - 1, min(count, MOST)).astype(np.int64)
    samples, splits = [], []
    for row in rows.tolist():
        split = found.splits[int(found.rows.split[row])]
        try:
            samples.append(data.splits[split][int(found.rows.index[row])])
        except BrokenImageError:  # the file has changed since it was read
            continue
        splits.append(split)
    return samples, splits


def _embedded(samples: list[Sample], model: Pretrained) -> tuple[Any, str, list[int]]:
    """Embeddings by that stream of the model whose field most of the samples have."""
    fields = {name: stream.field or name for name, stream in model.collator.streams.items()}
    having = {name: _having(samples, partial(_field, field)) for name, field in fields.items()}
    name = max(having, key=lambda each: len(having[each]))
    if not having[name]:
        some = ", ".join(dict.fromkeys(fields.values()))
        raise ValueError(f"run: expected a model that reads a field of the data, got one that reads {some}")
    values = list(having[name].values())
    chunks = [model.embed(name, values[at : at + _CHUNK]).float().cpu().numpy() for at in range(0, len(values), _CHUNK)]
    return np.concatenate(chunks), f"the run's embeddings of {fields[name]}", list(having[name])


def _plain(samples: list[Sample]) -> tuple[Any, str, list[int]]:
    """Pixels, else words, else the means of arrays: what at least half of the samples have."""
    found = _having(samples, lambda values: next(filter(is_picture, values.values()), None))
    if 2 * len(found) >= len(samples) > 0:
        rows = [thumbnail(picture, _SIDE).ravel() / 255 for picture in found.values()]
        return np.stack(rows), f"pixels ({_SIDE} x {_SIDE})", list(found)
    found = _having(samples, _words)
    if 2 * len(found) >= len(samples) > 0:
        try:
            return TfidfVectorizer(max_features=5_000).fit_transform(found.values()), "words (TF-IDF)", list(found)
        except ValueError:  # no text has a word of two letters
            return None, "words (TF-IDF)", []
    found = _having(samples, _mean)
    width = max((len(mean) for mean in found.values()), default=0)
    found = {i: mean for i, mean in found.items() if len(mean) == width}
    return np.stack(list(found.values())) if found else None, "means over time", list(found)


def _having(samples: list[Sample], value: Callable[[Mapping[str, Any]], Any]) -> dict[int, Any]:
    """number -> value, of the samples that have one."""
    values = ((i, value(sample.values)) for i, sample in enumerate(samples))
    return {i: each for i, each in values if each is not None}


def _field(name: str, values: Mapping[str, Any]) -> Any:
    return values.get(name)


def _words(values: Mapping[str, Any]) -> str | None:
    texts = (caption for value in values.values() if isinstance(value, str | Text) for caption in captions_of(value))
    return " ".join(texts).strip() or None


def _mean(values: Mapping[str, Any]) -> np.ndarray | None:
    array = next((value for value in values.values() if isinstance(value, np.ndarray) and value.size), None)
    return None if array is None else np.atleast_2d(array).reshape(len(np.atleast_2d(array)), -1).mean(0)


def _components(features: Any) -> tuple[np.ndarray, float]:
    """([n, 2], share of the variance), with the sign of each component fixed."""
    few = min(2, features.shape[1], features.shape[0])
    sparse = not isinstance(features, np.ndarray)
    model = TruncatedSVD(few, random_state=0) if sparse and features.shape[1] > 2 else PCA(few, svd_solver="full")
    xy = model.fit_transform(features if not sparse or features.shape[1] > 2 else features.toarray())
    xy = np.pad(xy, ((0, 0), (0, 2 - few)))
    signs = np.sign(xy[np.abs(xy).argmax(0), np.arange(2)])
    share = float(np.nan_to_num(model.explained_variance_ratio_).sum())
    return xy * np.where(signs == 0, 1, signs), share

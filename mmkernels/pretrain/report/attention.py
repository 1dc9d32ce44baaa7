"""Attention maps: which words of a text look at which part of a picture, in the last layer of the fusion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkernels import Modality
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.pages import data_url
from mmkernels.pretrain.report.pieces import words_of
from mmkernels.pretrain.report.section import Run, Section, first_found, some
from mmkernels.pretrain.report.shown import of_patches, regions_in
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["attention_maps"]

_SAMPLES, _WORDS, _SIDE = 6, 10, 96


@dataclass(frozen=True)
class Look:
    """One word, and where it looks."""

    word: str
    picture: str | None  # with its heat, for patches
    shares: list[float]  # in %: of each region, or the largest of a patch


@dataclass(frozen=True)
class Attended:
    picture: str | None  # as it is, for patches
    crops: list[str]  # for regions
    looks: list[Look]
    most: float  # the largest share, in %


def attention_maps(run: Run) -> list[Section]:
    """Of every stream of words that reads a stream of patches or of regions, of the first set that has some."""
    shown = None if run.trained.fusion is None else first_found(run, partial(_maps, run))
    return [] if shown is None else shown[1]


def _maps(run: Run, held_out: HeldOut) -> list[Section]:
    batch = some(held_out, _SAMPLES)
    if batch is None:
        return []
    model, streams, sections, seen = run.trained, run.recipe.streams, [], set()
    tokens = model.seen(batch, tuple(model.encoder(name)(batch[name]) for name in model.encoded)).chunks(_SAMPLES)
    for (reader, read), weights in model.fusion.attention(tokens[0].tokens).items():
        encoder = _images_of(streams[read].encoder)
        own = (model.owner[reader], streams[reader].field or reader, read)
        if not streams[reader].encoder.reads_text or encoder is None or own in seen:  # a tied stream reads alike
            continue
        seen.add(own)
        if found := list(_attended(batch, held_out.collator.tokenizer, reader, read, encoder, weights.cpu())):
            kind = "regions" if hasattr(encoder, "side") else "patches"
            title, about = f"Attention: {reader} to {read}", _REGIONS if kind == "regions" else _PATCHES
            sections.append(Section("attention", title, f"Split {held_out.name}. {about}", found))
    return sections


_PATCHES = (
    "Where each word looks, in the last layer of the fusion, mean over the heads: the clearer a patch, the more of "
    "the word's attention it has. Below, the share of the patch that has most."
)
_REGIONS = (
    "How much of its attention each word gives to each region, in %: last layer of the fusion, mean over the heads. "
    "What is missing to 100 goes to other tokens."
)


def _images_of(encoder: Any) -> Any:
    """The part that says how a stream's pictures are cut; None for another kind of stream."""
    inner = getattr(encoder, "images", encoder)  # of documents
    is_image = hasattr(inner, "grid") and getattr(inner, "values", 0) == 3 * getattr(inner, "patch", 0) ** 2
    return inner if is_image or hasattr(inner, "side") else None


def _attended(
    batch: Batch, tokenizer: TextTokenizer, reader: str, read: str, encoder: Any, weights: Tensor
) -> Iterator[Attended]:
    """Sample by sample, those that have both streams."""
    text, seen = batch[reader], batch[read]
    for i in range(batch.samples):
        (first, end), (begin, last) = text.cu_seqlens_host[i : i + 2], seen.cu_seqlens_host[i : i + 2]
        words = words_of(tokenizer, text.tokens[first:end].tolist())
        if not words or begin == last:
            continue
        part = weights[first:end, begin:last]
        of_words = torch.stack([part[places].mean(0) for _, places in words]).double()  # [words, tokens read]
        chosen = _telling(of_words)
        shown = [(words[n][0], of_words[n]) for n in chosen]
        top = max(w.max().item() for _, w in shown)
        if hasattr(encoder, "side"):
            crops = [data_url(crop) for crop in regions_in(seen, i).crops]
            looks = [Look(word, None, (100 * w).tolist()) for word, w in shown]
            yield Attended(None, crops, looks, 100 * top)
        else:
            pictures = of_patches(seen.media[Modality.IMAGE].values[begin:last], encoder.grid, encoder.patch)
            looks = [_heated(pictures, encoder.grid, word, w, top) for word, w in shown]
            yield Attended(data_url(_large(pictures[0])) if len(pictures) == 1 else None, [], looks, 100 * top)


def _telling(weights: Tensor) -> list[int]:
    """The words whose maps differ most from the mean word's, in their order: others tell nothing of the word."""
    order = (weights - weights.mean(0)).square().sum(1).argsort(descending=True, stable=True)
    return sorted(order[:_WORDS].tolist())


def _heated(pictures: np.ndarray, grid: int, word: str, weights: Tensor, top: float) -> Look:
    """The picture that a word looks at most: clear where it looks, white where it does not."""
    maps = weights.reshape(len(pictures), grid, grid).numpy()
    n = int(maps.sum((1, 2)).argmax())
    scaled = np.uint8(np.round(255 * maps[n] / top)) if top > 0 else np.zeros((grid, grid), np.uint8)
    heat = np.asarray(Image.fromarray(scaled).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float64)
    clear = 0.1 + 0.9 * heat[..., None] / 255
    mixed = np.uint8(255 * (1 - clear) + _large(pictures[n]) * clear)
    return Look(word, data_url(mixed), [100 * float(maps[n].max())])


def _large(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))

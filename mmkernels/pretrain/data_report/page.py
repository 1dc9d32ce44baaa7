"""`report.html`: the tables and pictures of a report on one page, which loads nothing from elsewhere."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from mmkernels.pretrain.data import BrokenImageError, Text
from mmkernels.pretrain.data.filter_list import TRAIN
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.data_report import pictures, texts
from mmkernels.pretrain.data_report.drawings import histogram, scatter
from mmkernels.pretrain.data_report.facts import QUANTILES
from mmkernels.pretrain.data_report.kinds import KINDS, Finding
from mmkernels.pretrain.data_report.report import Report
from mmkernels.pretrain.data_report.scan import captions_of, is_picture
from mmkernels.pretrain.pages import data_url

__all__ = ["page"]

_EXAMPLES, _LISTED, _CLASSES, _LANGUAGES = 9, 100, 15, 12
_SIDE = 96  # pixels of a thumbnail, at most


def page(report: Report) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["short"] = lambda number: f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
    template = environment.from_string(resources.files(__package__).joinpath("page.html.jinja").read_text("utf-8"))
    return printable(template.render(**_context(report)))


def _context(report: Report) -> dict[str, Any]:
    options, tables, counts = report.options, report.tables, report.counts
    splits = report.found.splits
    dropped = report.filter_list().dropped if options.drop else ()
    return {
        "options": options,
        "training": report.training,
        "splits": splits,
        "coverage": tables["coverage"],
        "fields": report.data.fields,
        "partial": report.data.partial,
        "tiles": _tiles(report),
        "kinds": [
            {"name": name, "kind": kind, "train": row[TRAIN], "held_out": sum(row.values()) - row[TRAIN]}
            for (name, kind), row in zip(KINDS.items(), counts.values(), strict=True)
        ],
        "leaks": Counter(each.of[0] for each in report.findings if each.kind == "leaked" and each.of is not None),
        "dropped": sum(each.split == TRAIN and each.index is not None for each in dropped),
        "examples": _examples(report),
        "listed": _listed(report),
        "sizes": tables["sizes"],
        "quantiles": list(QUANTILES),
        "charts": _charts(report),
        "languages": {field: _shares(rows, _LANGUAGES) for field, rows in tables["languages"].items()},
        "classes": {label: {**each, "rows": _top(each["counts"])} for label, each in tables["classes"].items()},
        "concepts": tables["concepts"],
        "packing": report.packing,
        "points": report.points,
        "scatters": _scatters(report),
        "warnings": _warnings(report),
        "rules": _rules(report),
        "settings": report.json()["settings"],
    }


def _warnings(report: Report) -> list[str]:
    """What was logged, without what the table of what cannot be read says."""
    return [message for message in dict.fromkeys(report.data.warnings) if not message.startswith("skipped ")][:20]


def _rules(report: Report) -> dict[str, Any]:
    """The numbers by which was judged."""
    return {
        "distance": pictures.DISTANCE,
        "luma": pictures.LUMA,
        "chroma": pictures.CHROMA,
        "jaccard": texts.JACCARD,
        "shingle": texts.SHINGLE,
        "least": texts.LEAST,
        "max_tokens": report.options.max_tokens,
    }


def _tiles(report: Report) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    counts = {kind: sum(by_split.values()) for kind, by_split in report.counts.items()}
    there, read = len(report.data.train), len(report.found.of(TRAIN))
    captions = ("empty", "boilerplate", "long", "script")
    flagged = {(f.split, f.index, f.name) for f in report.findings if f.kind in captions}
    tiles = [
        (f"{there:,}", "training samples", "" if read == there else f"{read:,} read"),
        (f"{sum(map(len, report.data.splits.values())) - there:,}", "held-out samples", _many(report, "split")),
        (f"{counts['broken']:,}", "broken", "skipped by training, too"),
        (f"{counts['duplicates']:,}", "duplicates", f"and {counts['near-duplicates']:,} near-duplicates"),
        (f"{counts['leaked']:,}", "leaked", "training samples that are held out, too"),
        (f"{len(flagged):,}", "with flagged captions", f"{counts['empty']:,} of them empty"),
    ]
    if report.packing is not None:
        gained = report.packing
        note = f"{100 * gained.padding:.0f}% of padded batches is padding"
        tiles.append((f"{100 * gained.saved:.0f}%", "fewer tokens to compute, if packed", note))
    return [{"value": value, "what": what, "note": note} for value, what, note in tiles]


def _many(report: Report, noun: str) -> str:
    count = len(report.data.splits) - 1
    return f"in {count} {noun}{'' if count == 1 else 's'}"


def _examples(report: Report) -> list[dict[str, Any]]:
    """Some findings of every kind, evenly spaced, with what they repeat, and how many there are in all."""
    shown = []
    for name, kind in KINDS.items():
        every = [finding for finding in report.findings if finding.kind == name]
        found = [finding for finding in every if finding.readable]
        if not found:
            continue
        cards = [_card(report, found[place]) for place in spaced(len(found), _EXAMPLES)]
        rest = {"count": len(every), "unreadable": len(every) - len(found)}
        shown.append({"name": name, "kind": kind, "cards": cards, **rest})
    return shown


def _card(report: Report, finding: Finding) -> dict[str, Any]:
    own = _item(report, finding.split, int(finding.index or 0))
    return {"why": finding.why, "items": [own, *([] if finding.of is None else [_item(report, *finding.of)])]}


def _item(report: Report, split: str, index: int) -> dict[str, Any]:
    source = report.data.splits[split]
    try:
        values = source[index].values
    except BrokenImageError:  # it could be read before: the file has changed since
        values = {}
    picture = next((value for value in values.values() if is_picture(value)), None)
    first = next((value for value in values.values() if isinstance(value, str | Text)), None)
    caption = captions_of(first)[0] if first is not None else ""
    if picture is not None:
        picture = picture[:: -(-picture.shape[0] // _SIDE), :: -(-picture.shape[1] // _SIDE)]
    return {
        "split": split,
        "name": source.logged_as(index),
        "caption": caption if len(caption) <= 160 else caption[:160] + " …",
        "picture": None if picture is None else data_url(picture),
    }


def _listed(report: Report) -> dict[str, Any]:
    """What could not be read, and the rows that are no sample."""
    found = [finding for finding in report.findings if not finding.readable]
    return {"rows": found[:_LISTED], "more": max(0, len(found) - _LISTED)}


def _charts(report: Report) -> dict[str, str]:
    """what -> its histogram, where values differ."""
    charts = {}
    measures = report.found.measures
    for what in report.tables["sizes"]:
        by_split = {
            s: np.frombuffer(measures[s, what], np.float64) for s in report.found.splits if (s, what) in measures
        }
        if len({float(edge) for each in by_split.values() for edge in (each.min(), each.max())}) > 1:
            charts[what] = histogram(by_split, what)
    for split, source in report.data.splits.items():
        if split == TRAIN and len(source):
            counts = np.unique(source.concepts, return_counts=True)[1]
            if counts.min() < counts.max():
                charts["samples per concept"] = histogram({split: counts.astype(np.float64)}, "samples per concept")
    return charts


def _scatters(report: Report) -> dict[str, str]:
    """what colours them -> the points."""
    if report.points is None:
        return {}
    found, splits = report.points, report.found.splits
    drawn = {"split": scatter(found.xy, found.split, splits)}
    for label in report.tables["classes"]:
        names = report.data.train.classes.get(label, ())
        numbers = [each.values.get(label) for each in found.samples]
        if label not in report.data.train.classes or all(number is None for number in numbers):
            continue
        groups = [names[n] if n is not None and 0 <= n < len(names) else "none" for n in numbers]
        common = [name for name, _ in Counter(groups).most_common()]
        drawn[label] = scatter(found.xy, groups, common)
        break
    return drawn if len(splits) > 1 or len(drawn) == 1 else {k: v for k, v in drawn.items() if k != "split"}


def _top(counts: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """The largest classes by name, and the rest together."""
    ordered = sorted(counts.items(), key=lambda item: -sum(item[1].values()))
    rest = ordered[_CLASSES:]
    if not rest:
        return ordered
    others: Counter[str] = Counter()
    for _, row in rest:
        others.update(row)
    return [*ordered[:_CLASSES], (f"{len(rest):,} others", {split: others[split] for split in rest[0][1]})]


def _shares(by_split: dict[str, dict[str, int]], most: int) -> dict[str, Any]:
    """The most frequent rows of {split: {row: count}}, as shares."""
    total: Counter[str] = Counter()
    for counts in by_split.values():
        total.update(counts)
    kept = [name for name, _ in total.most_common(most)]
    sums = {split: sum(counts.values()) for split, counts in by_split.items()}
    rows = {name: {split: by_split[split].get(name, 0) / max(sums[split], 1) for split in by_split} for name in kept}
    if len(total) > most:
        rows[f"{len(total) - most} others"] = {
            split: 1 - sum(row[split] for row in rows.values()) for split in by_split
        }
    return {"splits": list(by_split), "rows": rows, "texts": sums}

"""From a data set to its report: what is read, found and drawn, and the files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkernels.pretrain.data.cells import PAIR
from mmkernels.pretrain.data.filter_list import TRAIN, Dropped, FilterList, names_digest
from mmkernels.pretrain.data.opening import EMBEDDED, part_names
from mmkernels.pretrain.data_report import facts
from mmkernels.pretrain.data_report.duplicates import duplicates, one_stays, repeated_captions
from mmkernels.pretrain.data_report.kinds import KINDS, Finding
from mmkernels.pretrain.data_report.projection import Points, points
from mmkernels.pretrain.data_report.reading import Opened, opened
from mmkernels.pretrain.data_report.scan import Scan, captions_of, scan
from mmkernels.pretrain.data_report.settings import DataReport
from mmkernels.pretrain.data_report.texts import expected_script, fits
from mmkernels.pretrain.data_report.weighing import Gain, gain, weigher
from mmkernels.pretrain.load import load_model
from mmkernels.pretrain.setup import texts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["IDENTITY", "Report", "examine"]

IDENTITY = "mmkernels data report"
"""What `kind` of a report.json says."""


@dataclass(frozen=True)
class Report:
    """All that is known about a data set.

    Attributes:
        data, found: as read.
        findings: by kind, in the order of `KINDS`, then of the samples.
        packing: what packing gains for the training set; None without tokens.
        points: the data as a picture; None for fewer than three samples that can be compared.
        tables: coverage, sizes, languages, classes, concepts.
    """

    options: DataReport
    data: Opened
    found: Scan
    findings: list[Finding]
    packing: Gain | None
    points: Points | None
    tables: dict[str, Any]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """kind -> split -> findings."""
        counted = Counter((finding.kind, finding.split) for finding in self.findings)
        return {kind: {split: counted[kind, split] for split in self.found.splits} for kind in KINDS}

    @property
    def training(self) -> str:
        """How to train without what the list names. It is for one way of reading the data: see `FilterList`."""
        recipe = self.options.recipe
        reads = [field for field in self.data.fields if field not in self.data.train.classes]
        if recipe or set(reads) == set(PAIR) or set(part_names(self.options.source)) <= EMBEDDED.keys():
            return self.options.training(recipe)
        return f"{self.options.training('RECIPE')} (a recipe that reads {', '.join(reads)}; for others say so here)"

    def json(self) -> dict[str, Any]:
        """Everything but pictures."""
        gained = None if self.packing is None else {**self.packing._asdict(), "saved": round(self.packing.saved, 6)}
        return {
            "kind": IDENTITY,
            "source": self.options.source,
            "settings": {name: _plain(value) for name, value in dataclasses.asdict(self.options).items()},
            "all_read": not self.data.partial,
            **self.tables,
            "packing": gained,
            "projection": None if self.points is None else {"of": self.points.what, "variance": self.points.share},
            "counts": self.counts,
            "findings": [_entry(finding) for finding in self.findings],
            "warnings": self.data.warnings,
        }

    def filter_list(self) -> FilterList:
        """The list that `--drop` asks for: of each sample, the kinds for which it is left out."""
        return self._listed

    @cached_property
    def _listed(self) -> FilterList:
        wanted = [finding for finding in self.findings if finding.kind in self.options.drop]
        reasons: dict[tuple[str, int | None, str], list[Finding]] = {}
        for finding in one_stays(wanted):
            if finding.split == TRAIN or not finding.readable:
                reasons.setdefault((finding.split, finding.index, finding.name), []).append(finding)
        entries = []
        for (split, index, name), found in reasons.items():
            kinds, why = tuple(dict.fromkeys(each.kind for each in found)), "; ".join(each.why for each in found)
            held = {} if index is None or split != TRAIN else self.data.train.contents(index)
            entries.append(Dropped(split, index, name, kinds, why, held))
            twins = self.data.twins.get(index, []) if split == TRAIN and index is not None else []
            entries += [Dropped(split, twin, self.data.train.logged_as(twin), kinds, why, held) for twin in twins]
        entries.sort(key=lambda e: (self.found.splits.index(e.split), e.index is not None, e.index or 0, e.name))
        about = {
            "data": self.options.source,
            "fields": list(self.data.fields),
            "eval_fraction": self.options.eval_fraction,
            "held_out_by": list(self.options.held_out_by),
            "samples": len(self.data.train),
            "names": names_digest(self.data.train),
            "all_read": not self.data.partial,
            "drop": list(self.options.drop),
        }
        return FilterList(about, tuple(entries))


def examine(options: DataReport) -> Report:
    """Read a data set once and report on it.

    Raises:
        ValueError: the data cannot be opened, or the run cannot be loaded.
    """
    data = opened(options)
    model = None if options.run is None else load_model(options.run)
    tokenizer = model.collator.tokenizer if model is not None else _tokenizer(options, data)
    found = scan(data, tokenizer, weigher(data.recipe, tokenizer, options.max_tokens), options.max_tokens)

    def caption(split: str, index: int) -> str:
        return captions_of(data.splits[split].peek(index)["text"])[0]

    findings = [*found.findings, *_other_scripts(data, found), *repeated_captions(data, found, caption)]
    findings = [*findings, *duplicates(data, found)]
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings.sort(key=lambda f: (order[f.kind], found.splits.index(f.split), f.index is not None, f.index or 0, f.name))
    lengths = found.rows.length[found.of(TRAIN)]
    return Report(
        options,
        data,
        found,
        list(dict.fromkeys(findings)),
        gain(lengths, options.batch, options.tokens),
        points(data, found, model),
        {
            "coverage": facts.coverage(data, found),
            "sizes": facts.sizes(found),
            "languages": facts.languages(data),
            "classes": facts.classes(data, found),
            "concepts": facts.concepts(data),
        },
    )


def _tokenizer(options: DataReport, data: Opened) -> TextTokenizer:
    """As a run on these data trains it."""
    streams = {} if data.recipe is None else data.recipe.streams
    read = [stream.field or name for name, stream in streams.items() if stream.encoder.reads_text]
    fields = [field for field in data.train.fields if field not in data.train.classes]
    return TextTokenizer.train(texts(data.train, fields if data.recipe is None else read), options.vocabulary)


def _other_scripts(data: Opened, found: Scan) -> list[Finding]:
    findings = []
    for field, by_script in found.scripts.items():
        expected = expected_script(Counter({script: len(rows) for script, rows in by_script.items()}))
        for script, rows in by_script.items() if expected else ():
            for row in () if fits(script, expected) else rows:
                split, index = found.splits[int(found.rows.split[row])], int(found.rows.index[row])
                where = "" if field == "text" else f"{field}: "
                text = captions_of(data.splits[split].peek(index)[field])[0]
                why = f"{where}{script} where {expected} is expected: {text[:200]}"
                findings.append(Finding("script", split, index, data.splits[split].logged_as(index), why))
    return findings


def _entry(finding: Finding) -> dict[str, Any]:
    of = None if finding.of is None else {"split": finding.of[0], "index": finding.of[1]}
    return {**dataclasses.asdict(finding), "of": of}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

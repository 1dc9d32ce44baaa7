"""Your own folder: one table, and the files that it names.

    {"image": "photos/1.jpg", "caption": "a heron by the river"}
    {"image": "photos/2.jpg", "caption": ["two kites", "kites over a beach"]}

or a .csv, .tsv or .parquet with the columns `image` and `caption`, where a caption may be a (JSON) list too. Paths are
relative to the table. Several rows for one image give it several captions.

With other columns (`cells.py` lists them) each row is a sample, and may lack some of them:

    {"image": "photos/1.jpg", "question": "what stands by the river?", "answer": "a heron"}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmkernels.pretrain.data.cells import PAIR, Cell
from mmkernels.pretrain.data.columns import ColumnSource, by_row, checked
from mmkernels.pretrain.data.tables import Row, TableFormat, find_table, read_table, reading_of
from mmkernels.pretrain.data.unicode import file_in, printable


class FolderDataset(ColumnSource):
    """The rows of a table in a folder.

    Args:
        path: the table, or a folder that has exactly one.
        table: its separator and columns.
        fields: those to read; None: image and text, and the other known columns that exist.
        labels: further columns, whose values are classes.
        resolution: side in pixels at which images are kept.
        max_broken: fraction of samples, and of table rows, that may be unreadable.
        cache_bytes: memory for decoded images, clips and recordings.
        partial: leave out fields that no sample has, instead of refusing the data for them.

    Raises:
        ValueError: no table, or more than one; a table with missing columns, too many fields in a row or an unclosed
            quote; no rows.
        TooManyBrokenError: more rows than allowed have no readable image or caption.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        table: TableFormat | None = None,
        fields: Sequence[str] | None = None,
        labels: Sequence[str] = (),
        resolution: int = 48,
        max_broken: float = 0.05,
        cache_bytes: int = 1 << 30,
        partial: bool = False,
    ) -> None:
        source, form = find_table(Path(path)), table or TableFormat()
        reading = reading_of(source, form, fields, labels, partial)
        lost: dict[str, str] = {}
        rows = _without_faults(read_table(source, form, reading), lost)
        names, cells = _by_image(rows) if reading.pairs else by_row(((r.place, r.cells) for r in rows), reading)
        columns, broken = checked(source, names, cells, reading, lost, max_broken=max_broken, partial=partial)
        self._root = source.parent
        options = {"resolution": resolution, "cache_bytes": cache_bytes}
        super().__init__(names, columns, reading, faults={}, broken=broken, **options)

    def _file(self, cell: Cell) -> Path:
        return file_in(self._root, cell)


def _without_faults(rows: Iterable[Row], lost: dict[str, str]) -> Iterable[Row]:
    for row in rows:
        if row.fault:
            lost[row.place] = row.fault
        else:
            yield row


def _by_image(rows: Iterable[Row]) -> tuple[list[str], dict[str, list[Cell]]]:
    """(names, cells by field): a sample per image, with all of its captions."""
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row.cells["image"], []).extend(row.cells["text"])
    texts = [tuple(dict.fromkeys(each)) for each in captions.values()]
    return [printable(image) for image in captions], dict(zip(PAIR, (list(captions), texts), strict=True))

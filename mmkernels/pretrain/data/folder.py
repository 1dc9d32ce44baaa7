"""Your own folder: images, and one table with their captions.

    {"image": "photos/1.jpg", "caption": "a heron by the river"}
    {"image": "photos/2.jpg", "caption": ["two kites", "kites over a beach"]}

or a .csv, .tsv or .parquet with the columns `image` and `caption`, where a caption may be a (JSON) list too. Paths are
relative to the table. Several rows for one image give it several captions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, DecodedDataset
from mmkernels.pretrain.data.decode import decode_image
from mmkernels.pretrain.data.tables import TableFormat, find_table, read_table
from mmkernels.pretrain.data.unicode import file_in, printable


class FolderDataset(DecodedDataset):
    """Images with captions from a folder.

    Args:
        path: the table, or a folder that has exactly one.
        table: its separator and columns.
        resolution: side in pixels at which images are kept.
        max_broken: fraction of images, and of table rows, that may be unreadable.
        cache_bytes: memory for decoded images.

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
        resolution: int = 48,
        max_broken: float = 0.05,
        cache_bytes: int = 1 << 30,
    ) -> None:
        source = find_table(Path(path))
        captions: dict[str, list[str]] = {}
        lost: dict[str, str] = {}
        for row in read_table(source, table or TableFormat()):
            if row.fault:
                lost[row.place] = row.fault
            else:
                captions.setdefault(row.image, []).extend(row.captions)
        if not captions:
            what = f"none{BrokenLog.listing(lost)}" if lost else "an empty file"
            raise ValueError(f"{source}: expected at least one image with a caption, got {what}")
        broken = BrokenLog(len(captions) + len(lost), max_broken)
        for place, fault in lost.items():
            broken.add(place, fault)
        self._root, self._files = source.parent, list(captions)
        super().__init__(
            [printable(image) for image in captions],
            [tuple(dict.fromkeys(texts)) for texts in captions.values()],
            faults={},
            broken=broken,
            resolution=resolution,
            cache_bytes=cache_bytes,
        )

    def _decode(self, index: int) -> np.ndarray:
        return decode_image(file_in(self._root, self._files[index]), self.resolution)

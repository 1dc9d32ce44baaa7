"""Packing: the ops against a copy of the same bytes and plain PyTorch, late interaction against the padded einsum."""

from __future__ import annotations

from mmkernels.bench.case import Case, Settings
from mmkernels.bench.cases.packing_late import MAXSIM
from mmkernels.bench.cases.packing_media import PATCHES, SPLICE
from mmkernels.bench.cases.packing_rows import PACK, SOURCES, UNPACK
from mmkernels.bench.cases.packing_segments import PAD, POOLS, WEIGHTED


def cases(settings: Settings) -> list[Case]:
    return [PACK, SOURCES, UNPACK, PAD, *POOLS, WEIGHTED, SPLICE, PATCHES, MAXSIM]

"""Planners of other packages: lengths [n] and a capacity to packs, each a list of item numbers or of lengths."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Inputs = dict[str, Any]


class LengthsOfPacks(list[Any]):
    """Packs of a planner that returns lengths instead of items."""


def trl_bfd(inputs: Inputs) -> tuple[LengthsOfPacks]:
    """TRL's best fit decreasing over the whole data set; its `pack_dataset` packs 1,000 samples at a time.

    It also moves the tokens: one byte each here.
    """
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    lengths = inputs["lengths"]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
    packed = _pack_bfd(pa.table({"input_ids": tokens}), inputs["capacity"])
    return (LengthsOfPacks(packed["seq_lengths"].to_pylist()),)


def lightbinpack_obfd(inputs: Inputs) -> tuple[list[list[int]]]:
    """LightBinPack's optimised best fit decreasing."""
    from lightbinpack import obfd

    return (obfd(inputs["lengths"].tolist(), inputs["capacity"]),)


@cache
def _first_fit() -> Any:
    import numba

    @numba.njit
    def first_fit(lengths: Any, capacity: int) -> Any:
        room = np.empty(len(lengths), np.int64)
        pack_of = np.empty(len(lengths), np.int64)
        packs = 0
        for i in range(len(lengths)):
            pack = 0
            while pack < packs and room[pack] < lengths[i]:
                pack += 1
            if pack == packs:
                room[pack] = capacity
                packs += 1
            room[pack] -= lengths[i]
            pack_of[i] = pack
        return pack_of

    return first_fit


def numba_first_fit(inputs: Inputs, group: int = 100_000) -> tuple[list[Any]]:
    """First fit decreasing in numba over groups of 100,000 items: the loop of multipack samplers."""
    lengths, packs = inputs["lengths"], []
    for begin in range(0, len(lengths), group):
        some = lengths[begin : begin + group]
        order = np.argsort(-some)
        pack_of = _first_fit()(some[order], inputs["capacity"])
        by_pack = np.argsort(pack_of, kind="stable")
        packs += np.split(begin + order[by_pack], np.flatnonzero(np.diff(pack_of[by_pack])) + 1)
    return (packs,)


class _Tokens:
    """Samples of the given lengths in torchtune's format."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> dict[str, list[int]]:
        tokens = [item] * int(self.lengths[item])
        return {"tokens": tokens, "labels": tokens}


def torchtune_next_fit(inputs: Inputs) -> tuple[LengthsOfPacks]:
    """torchtune packs in order and moves the tokens."""
    from torchtune.datasets import PackedDataset

    packed = PackedDataset(_Tokens(inputs["lengths"]), max_seq_len=inputs["capacity"])
    # A pack's last length is its padding, if any.
    used = [int((pack["labels"] != -100).sum()) for pack in packed.packs]
    packs = LengthsOfPacks()
    for pack, tokens in zip(packed.packs, used, strict=True):
        sizes = pack["seq_lens"].tolist()
        packs.append(sizes if sum(sizes) == tokens else sizes[:-1])
    return (packs,)

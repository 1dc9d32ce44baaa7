"""What a mask does once it is described: checks of its metadata, and its rows, laid out at the first use and cached.

With metadata on a GPU the host does not know the token counts, so a mask is laid out at its first use (`rows`), from
the shapes of q and k. On a CPU, construction and layout check the values; on a GPU, where that would sync, only
`validate()` and MMKERNELS_VALIDATE=1 do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention import builders
from mmkernels.ops.attention.tiles import pack_states, tile_states
from mmkernels.ops.attention.types import MaskRows
from mmkernels.ops.checks import expect_true, is_traced, readable, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES

__all__ = ["MaskLayout"]


class MaskLayout:
    """Base class of AttentionMask, which has the builders."""

    def __init__(
        self,
        builder: builders.Builder,
        classes: builders.Classes | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Internal; use the builders."""
        self._builder = builder
        self._classes = classes if classes is not None else builder.classes()
        self._positions = positions
        self._rows: MaskRows | None = None
        self._at_q: Tensor | None = None
        self._int_classes: builders.Classes | None = None
        self._validate_if_readable(None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"builder": self._builder, "classes": self._classes, "positions": self._positions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lay out and check again at the first use: a file may hold anything, and kernels trust the rows."""
        MaskLayout.__init__(self, state["builder"], state["classes"], state.get("positions"))

    @property
    def device(self) -> torch.device:
        """The metadata's device."""
        return self._builder.tensors()[0].device

    @property
    def classes(self) -> builders.Classes | None:
        """Class of each query [Tq] and key [Tk] for a pair bias; None when there are none."""
        return self._classes

    def rows(self, tokens_q: int, tokens_k: int) -> MaskRows:
        """The kernels' view for these numbers of queries and keys; laid out once and cached.

        Raises:
            ValueError: the mask was first used with other sizes, or (CPU metadata) reaches past the end.
        """
        rows = self._rows
        if rows is None:
            self._validate_if_readable(tokens_q, tokens_k)
            rows = self._lay_out_for_keeps(tokens_q, tokens_k)
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                _expect_inside(rows, tokens_q, tokens_k)
            if _outlives_the_call(rows.lo):
                self._rows = rows
        built = rows.lo.shape[0], rows.first_q.shape[0]
        if built != (tokens_q, tokens_k):
            raise ValueError(
                f"mask: expected q and k of {built[0]} and {built[1]} tokens, the sizes of its first use,"
                f" got {tokens_q} and {tokens_k}"
            )
        return rows

    def rows_with_classes(self, tokens_q: int, tokens_k: int, table: tuple[int, int]) -> MaskRows:
        """`rows`, and the classes as indices into a pair bias of `table` = (Cq, Ck) entries a head.

        Raises:
            ValueError: the mask has no classes, their sizes differ from q and k, or (CPU metadata) exceed the table.
        """
        rows = self.rows(tokens_q, tokens_k)
        if self._classes is None:
            raise ValueError("mask: expected classes for a pair_bias (multimodal, cross_only, or with_classes)")
        for name, ids, tokens in (("class_q", self._classes[0], tokens_q), ("class_k", self._classes[1], tokens_k)):
            if ids.shape[0] != tokens:
                wrong_value(f"mask: {name}", f"[{tokens}], one per token", ids)
        int_classes = self._int_classes
        if int_classes is None:
            int_classes = self._classes[0].int().contiguous(), self._classes[1].int().contiguous()
            if _outlives_the_call(int_classes[0]):
                self._int_classes = int_classes
        if self._values_are_readable():
            for name, ids, size in zip(("class_q", "class_k"), int_classes, table, strict=True):
                builders.expect_all(
                    f"mask: {name}", f"classes in [0, {size}) for pair_bias", (ids >= 0) & (ids < size), ids
                )
        return rows.changed(class_q=int_classes[0], class_k=int_classes[1])

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor:
        """The key at the position of each query, for `alibi_slopes`: int32 [Tq]; made once and cached.

        Raises:
            ValueError: the mask does not know positions, or those given differ in number from the queries.
        """
        at_q = self._at_q
        if at_q is None:
            at_q = self._positions_for_keeps(tokens_q, tokens_k)
            if at_q is None:
                raise ValueError(
                    "mask: expected positions for alibi_slopes (packed, batched, from_padding, prefix, multimodal, or"
                    f" with_positions), got {type(self._builder).__name__}"
                )
            if _outlives_the_call(at_q):
                self._at_q = at_q
        if at_q.shape[0] != tokens_q:
            wrong_value("mask: at_q", f"[{tokens_q}], one per query", at_q)
        return at_q

    def validate(self, tokens_q: int | None = None, tokens_k: int | None = None) -> None:
        """Check the metadata's values. Syncs on CUDA.

        Args:
            tokens_q, tokens_k: token counts that the mask must not exceed; None: not checked.

        Raises:
            ValueError: names the argument and the first offending index.
        """
        self._builder.validate(tokens_q, tokens_k)
        if self._classes is not None:
            for name, ids in zip(("class_q", "class_k"), self._classes, strict=True):
                builders.expect_all(name, f"classes in [0, {MAX_MODALITIES})", builders.is_class(ids), ids)

    def _values_are_readable(self) -> bool:
        return all(readable(x) for x in (*self._builder.tensors(), *(self._classes or ())))

    def _validate_if_readable(self, tokens_q: int | None, tokens_k: int | None) -> None:
        if self._values_are_readable():
            self.validate(tokens_q, tokens_k)

    def _sizes(self, tokens_q: int | None, tokens_k: int | None) -> tuple[int, int]:
        if self._rows is not None:
            known = self._rows.lo.shape[0], self._rows.first_q.shape[0]
        elif tokens_q is None or tokens_k is None:
            known = self._builder.ends()
        else:
            return tokens_q, tokens_k
        return known[0] if tokens_q is None else tokens_q, known[1] if tokens_k is None else tokens_k

    def _lay_out_for_keeps(self, tokens_q: int, tokens_k: int) -> MaskRows:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._lay_out(tokens_q, tokens_k)
        with torch.inference_mode(False):  # autograd cannot save inference tensors for backward
            rows = self._lay_out(tokens_q, tokens_k)
            kept = [x.clone() if x is not None and x.is_inference() else x for x in rows]
            return MaskRows(*kept)  # type: ignore[arg-type]

    def _positions_for_keeps(self, tokens_q: int, tokens_k: int) -> Tensor | None:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._builder.positions(tokens_q, tokens_k) if self._positions is None else self._positions
        with torch.inference_mode(False):
            made = self._builder.positions(tokens_q, tokens_k) if self._positions is None else self._positions
            return made.clone() if made is not None and made.is_inference() else made

    def _lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        rows = self._builder.lay_out(tokens_q, tokens_k).contiguous()
        if rows.span_q is None:
            return rows
        return rows.changed(tiles=pack_states(tile_states(rows, tokens_k)))


def _expect_inside(rows: MaskRows, tokens_q: int, tokens_k: int) -> None:
    """The check under vmap, where metadata cannot be read on the host: kernels trust the rows."""
    for inside in (rows.lo >= 0) & (rows.hi <= tokens_k), (rows.first_q >= 0) & (rows.last_q <= tokens_q):
        expect_true(inside, f"mask: expected metadata within {tokens_q} queries and {tokens_k} keys")


def _outlives_the_call(tensor: Tensor) -> bool:
    """False for tensors made inside a functorch transform or a trace, which are unusable after it."""
    if torch.compiler.is_dynamo_compiling():
        return True  # the compiled code stores what it computes
    return not torch._C._are_functorch_transforms_active() and not is_traced(tensor)

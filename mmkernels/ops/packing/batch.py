"""A packed batch: several samples in one row of tokens, with their boundaries said and never guessed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmkernels.ops._checks import FLOATING, expect_tensor, not_yet, wrong_type, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES, Modality

__all__ = ["IGNORE_LABEL", "NO_SAMPLE", "PackedBatch"]

# What F.cross_entropy ignores by default; the sample id of padding.
IGNORE_LABEL = -100
NO_SAMPLE = -1

_PER_TOKEN = ("tokens", "sample_ids", "position_ids", "modality_ids", "labels", "loss_weight")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S samples in T tokens, sample after sample; padding, if any, is one last segment of its own.

    Build one with `from_samples`. Attention over `cu_seqlens` keeps the samples apart, and the padding apart from them
    all; positions alone would not.

    Attributes:
        tokens: [T] int64 token ids (or any dtype, and trailing dimensions, that the samples have).
        cu_seqlens: [segments+1] int32: where each segment begins, from 0 to T.
        cu_seqlens_host: the same as a tuple, so that nobody needs to ask the device.
        sample_ids: [T] int64: the id of each token's sample, NO_SAMPLE (-1) in padding.
        position_ids: [T] int64, from 0 in each segment.
        modality_ids: [T] uint8, see `Modality`; TEXT in padding.
        padding: tokens in the padding segment; 0 if there is none.
        labels: [T] int64 or None; IGNORE_LABEL (-100) in padding.
        loss_weight: [T] float32 or None; 0 in padding.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_host: tuple[int, ...]
    sample_ids: torch.Tensor
    position_ids: torch.Tensor
    modality_ids: torch.Tensor
    padding: int = 0
    labels: torch.Tensor | None = None
    loss_weight: torch.Tensor | None = None

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[torch.Tensor],
        *,
        capacity: int | None = None,
        sample_ids: Sequence[int] | None = None,
        modality_ids: Sequence[torch.Tensor] | None = None,
        labels: Sequence[torch.Tensor] | None = None,
        loss_weight: Sequence[torch.Tensor] | None = None,
        pad_token: int = 0,
    ) -> PackedBatch:
        """Pack samples one after the other, whole, in the order given.

        Args:
            samples: token tensors [L_i, ...] of one dtype and device, usually 1-D ids; zero length is fine.
            capacity: T; the tokens missing become the padding segment. None for no padding.
            sample_ids: an id >= 0 for each sample, such as the items of a plan's pack; default 0, 1, ...
            modality_ids: [L_i] integers in [0, 32) for each sample; default `Modality.TEXT` everywhere.
            labels: [L_i] integers for each sample.
            loss_weight: [L_i] floats for each sample.
            pad_token: fills the padding.

        Raises:
            TypeError, ValueError: a wrong argument, by name; samples longer than the capacity.
        """
        lengths = _check_samples(samples)
        total = sum(lengths)
        padding = 0 if capacity is None else capacity - total
        if padding < 0:
            raise ValueError(f"capacity: expected at least the {total} tokens of the samples, got {capacity}")
        ids = list(range(len(samples))) if sample_ids is None else [int(i) for i in sample_ids]
        if len(ids) != len(samples) or any(i < 0 for i in ids):
            wrong_value("sample_ids", f"{len(samples)} ids >= 0", sample_ids)

        segments = lengths + [padding] * (padding > 0)
        ends = [0]
        for length in segments:
            ends.append(ends[-1] + length)
        device = samples[0].device if samples else torch.device("cpu")
        sizes = torch.tensor(segments, device=device, dtype=torch.int64)
        begins = torch.tensor(ends[:-1], device=device, dtype=torch.int64)
        owners = torch.tensor(ids + [NO_SAMPLE] * (padding > 0), device=device, dtype=torch.int64)
        position = torch.arange(ends[-1], device=device) - begins.repeat_interleave(sizes, output_size=ends[-1])

        def joined(name: str, parts: Sequence[torch.Tensor] | None, dtype: torch.dtype, fill: float) -> Any:
            if parts is None:
                return None
            _check_parts(name, parts, lengths, dtype)
            return _join([part.to(device, dtype) for part in parts], padding, fill, dtype, device)

        kinds = joined("modality_ids", modality_ids, torch.uint8, Modality.TEXT)
        return cls(
            tokens=_join(list(samples), padding, pad_token, torch.int64, device),
            cu_seqlens=torch.tensor(ends, device=device, dtype=torch.int32),
            cu_seqlens_host=tuple(ends),
            sample_ids=owners.repeat_interleave(sizes, output_size=ends[-1]),
            position_ids=position,
            modality_ids=torch.zeros_like(position, dtype=torch.uint8) if kinds is None else kinds,
            padding=padding,
            labels=joined("labels", labels, torch.int64, IGNORE_LABEL),
            loss_weight=joined("loss_weight", loss_weight, torch.float32, 0.0),
        )

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.shape[0]

    @property
    def num_segments(self) -> int:
        """Samples, and one more if there is padding."""
        return len(self.cu_seqlens_host) - 1

    @property
    def num_samples(self) -> int:
        """S."""
        return self.num_segments - (self.padding > 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        host = self.cu_seqlens_host
        return tuple(end - begin for begin, end in itertools.pairwise(host))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment, padding included; 0 in an empty batch."""
        return max(self.lengths, default=0)

    def _with_tensors(self, function: Any) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: function(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on another device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def split(self, size: int) -> list[PackedBatch]:
        """The samples in batches of `size`, the last one smaller; views, without the padding. `GradCache` cuts so.

        Args:
            size: samples in a batch, at least 1.

        Returns:
            at least one batch: no samples make one empty batch.

        Raises:
            TypeError, ValueError: `size` is not an int, or below 1.
        """
        if isinstance(size, bool) or not isinstance(size, int):
            wrong_type("size", "an int", size)
        if size < 1:
            wrong_value("size", "at least 1", size)
        host, last = self.cu_seqlens_host, self.num_samples
        batches = []
        for first in range(0, max(last, 1), size):
            end = min(first + size, last)
            begin, stop = host[first], host[end]
            per_token = {name: getattr(self, name) for name in _PER_TOKEN}
            cut: dict[str, Any] = {name: None if x is None else x[begin:stop] for name, x in per_token.items()}
            batches.append(
                dataclasses.replace(
                    self,
                    **cut,
                    cu_seqlens=self.cu_seqlens[first : end + 1] - begin,
                    cu_seqlens_host=tuple(at - begin for at in host[first : end + 1]),
                    padding=0,
                )
            )
        return batches

    def validate(self) -> PackedBatch:
        """Check every invariant, reading the tensors (waits for a GPU).

        Returns:
            the batch itself.

        Raises:
            ValueError: the first broken invariant, by name.
        """
        host, total = self.cu_seqlens_host, self.num_tokens
        _require(len(host) > 0 and host[0] == 0, "cu_seqlens", "begins with 0", host[:1])
        _require(host[-1] == total, "cu_seqlens", f"ends with T = {total}", host[-1])
        falls = [i for i, length in enumerate(self.lengths) if length < 0]
        _require(not falls, "cu_seqlens", "does not decrease", f"a fall after entry {falls[:1]}")
        device = (self.cu_seqlens.dtype, tuple(self.cu_seqlens.tolist()))
        _require(device == (torch.int32, host), "cu_seqlens", "is int32 and equal to cu_seqlens_host", device)
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                _require(value.shape[:1] == (total,), name, f"has T = {total} entries", list(value.shape))
                _require(value.device == self.tokens.device, name, f"is on {self.tokens.device}", value.device)
        _require(
            self.padding in (0, self.lengths[-1] if self.lengths else 0), "padding", "is the last segment", self.padding
        )
        self._validate_tokens()
        return self

    def _validate_tokens(self) -> None:
        """The invariants of single tokens."""
        sizes = torch.tensor(self.lengths, dtype=torch.int64)
        begins = torch.tensor(self.cu_seqlens_host[:-1], dtype=torch.int64).repeat_interleave(sizes)
        position = torch.arange(self.num_tokens) - begins
        _require_equal(self.position_ids.cpu(), position, "position_ids", "counts from 0 in each segment")
        owners = self.sample_ids.cpu()
        _require_equal(owners, owners[begins], "sample_ids", "is the same in a whole segment")
        real = self.num_tokens - self.padding
        _require(bool((owners[:real] >= 0).all()), "sample_ids", "is >= 0 outside the padding", owners[:real])
        _require(bool((owners[real:] == NO_SAMPLE).all()), "sample_ids", "is -1 in the padding", owners[real:])
        starts = torch.tensor(self.cu_seqlens_host[: self.num_samples], dtype=torch.int64)
        heads = owners[starts[sizes[: self.num_samples] > 0]]
        _require(len(heads.unique()) == len(heads), "sample_ids", "names each sample once", heads)
        _require(self.modality_ids.dtype == torch.uint8, "modality_ids", "is uint8", self.modality_ids)
        _require(bool((self.modality_ids < MAX_MODALITIES).all()), "modality_ids", "is below 32", self.modality_ids)
        if self.labels is not None:
            _require(bool((self.labels[real:] == IGNORE_LABEL).all()), "labels", "is -100 in the padding", self.labels)
        if self.loss_weight is not None:
            _require(bool((self.loss_weight[real:] == 0).all()), "loss_weight", "is 0 in the padding", self.loss_weight)

    def to_flash_attn(self) -> dict[str, Any]:
        """Keyword arguments of `flash_attn_varlen_func` for self-attention: cu_seqlens and the longest segment."""
        return {
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_k": self.cu_seqlens,
            "max_seqlen_q": self.max_seqlen,
            "max_seqlen_k": self.max_seqlen,
        }

    def to_hf(self) -> dict[str, Any]:
        """Keyword arguments of a transformers causal model with flash attention, batch dimension 1.

        transformers shifts the labels itself, so the first label of each segment, which the last token of the segment
        before would be asked for, becomes IGNORE_LABEL. `loss_weight` has no place there and must be None.
        """
        if self.loss_weight is not None:
            wrong_value("loss_weight", "None for to_hf, whose loss takes no weights", self.loss_weight)
        arguments = {
            "input_ids": self.tokens[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }
        if self.labels is not None:
            arguments["labels"] = torch.where(self.position_ids == 0, IGNORE_LABEL, self.labels)[None]
        return arguments

    def to_nested(self) -> Any:
        """Not there yet."""
        not_yet("to_nested", self)

    def to_megatron(self) -> Any:
        """Not there yet."""
        not_yet("to_megatron", self)

    def __repr__(self) -> str:
        return (
            f"PackedBatch({self.num_samples} samples, {self.num_tokens - self.padding} tokens, {self.padding} padding, "
            f"longest {self.max_seqlen}, on {self.tokens.device})"
        )


def _check_samples(samples: Sequence[torch.Tensor]) -> list[int]:
    """The samples' lengths."""
    if isinstance(samples, torch.Tensor) or not isinstance(samples, Sequence):
        wrong_type("samples", "a sequence of tensors [L, ...]", samples)
    for i, sample in enumerate(samples):
        if not isinstance(sample, torch.Tensor):
            wrong_type(f"samples[{i}]", "a tensor [L, ...]", sample)
        first = samples[0]
        if sample.ndim < 1 or sample.shape[1:] != first.shape[1:]:
            wrong_value(
                f"samples[{i}]", f"[L, ...] with the trailing dimensions of samples[0], {list(first.shape[1:])}", sample
            )
        if sample.dtype != first.dtype or sample.device != first.device:
            wrong_value(f"samples[{i}]", f"{first.dtype} on {first.device} like samples[0]", sample)
    return [sample.shape[0] for sample in samples]


def _check_parts(name: str, parts: Sequence[torch.Tensor], lengths: list[int], dtype: torch.dtype) -> None:
    """One tensor [L_i] per sample that fits into `dtype` without loss."""
    if len(parts) != len(lengths):
        wrong_value(name, f"one tensor for each of {len(lengths)} samples", f"{len(parts)} tensors")
    for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        expected = f"[{length}] {'floating point' if dtype.is_floating_point else 'integer'}"
        integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
        expect_tensor(f"{name}[{i}]", part, expected, ndim=1, dtypes=FLOATING if dtype.is_floating_point else integers)
        if part.shape[0] != length:
            wrong_value(f"{name}[{i}]", expected, part)
        if dtype == torch.uint8 and length and not 0 <= int(part.min()) <= int(part.max()) < MAX_MODALITIES:
            raise ValueError(
                f"{name}[{i}]: expected ids in [0, {MAX_MODALITIES}), got {int(part.min())}..{int(part.max())}"
            )


def _join(
    parts: list[torch.Tensor], padding: int, fill: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The parts, then `padding` entries of `fill`; `dtype` when there is no part to tell."""
    like = parts[0] if parts else torch.empty(0, dtype=dtype, device=device)
    tail = like.new_full((padding, *like.shape[1:]), fill)
    return torch.cat([*parts, tail])


def _require(holds: bool, name: str, invariant: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"PackedBatch: {name} {invariant}: broken, got {got}")


def _require_equal(got: torch.Tensor, expected: torch.Tensor, name: str, invariant: str) -> None:
    wrong = (got != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        _require(False, name, invariant, f"{int(got[at])} at token {at}, expected {int(expected[at])}")

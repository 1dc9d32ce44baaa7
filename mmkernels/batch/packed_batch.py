"""A packed batch: several samples in one row of tokens, with explicit boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.batch import build, check, export, loss
from mmkernels.batch.fields import PackedFields
from mmkernels.batch.media import Media
from mmkernels.ops.checks import integer, wrong_value

__all__ = ["PackedBatch"]


@dataclass(frozen=True, eq=False)
class PackedBatch(PackedFields):
    """S samples back to back in T tokens; padding, if any, is the last segment.

    Build one with `from_samples`. Attention over `cu_seqlens` isolates the samples from each other and from the
    padding; positions alone do not.

    Attributes:
        tokens: [T] int64 token ids (or the samples' dtype and trailing dimensions).
        cu_seqlens: [segments+1] int32: where each segment begins, from 0 to T.
        cu_seqlens_host: cu_seqlens as a tuple, which saves a device synchronisation.
        sample_ids: [T] int64: the id of each token's sample, -1 in padding.
        position_ids: [T] int64, from 0 in each segment; or [3, T], positions in time, height and width.
        modality_ids: [T] uint8, see `Modality`; TEXT in padding.
        span_ids: [T] int32: the index in this batch of the token's image, clip or recording; -1 for none. For
            `AttentionMask.multimodal`.
        padding: tokens in the padding segment; 0 if there is none.
        labels: [T] int64 or None: each token's own label (not shifted), or -100 for none, as in padding.
        loss_weight: [T] float32 or None; 0 in padding.
        sample_weight: [S] float32 or None.
        media: modality -> values, grid_thw and dst_index of its items.
    """

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[Tensor | Sequence[Tensor | Media]],
        *,
        capacity: int | None = None,
        sample_ids: Sequence[int] | None = None,
        modality_ids: Sequence[Tensor] | None = None,
        labels: Sequence[Tensor] | None = None,
        loss_weight: Sequence[Tensor] | None = None,
        sample_weight: Sequence[float] | None = None,
        pad_token: int = 0,
        placeholder: int | Mapping[int, int] = 0,
        mrope: bool | str = False,
        tokens_per_second: float = 1.0,
    ) -> PackedBatch:
        """Pack whole samples in the given order. Nothing is cut, dropped or resized.

        Args:
            samples: each a tensor of tokens [L_i, ...], usually 1-D ids; or a sequence of parts, token ids [n] and
                `Media`. One dtype and device; empty samples are allowed.
            capacity: T; the unused tokens form the padding segment. None for no padding.
            sample_ids: an id >= 0 for each sample, such as the items of a plan's pack; default 0, 1, ...
            modality_ids: [L_i] integers in [0, 32) for each sample; default `Modality.TEXT` for tokens and the media's
                own. Only for samples without media.
            labels: [L_i] integers for each sample, tokens of media included.
            loss_weight: [L_i] floats for each sample.
            sample_weight: a float >= 0 for each sample.
            pad_token: fills the padding.
            placeholder: the token id of media, or modality -> id.
            mrope: positions [3, T] in time, height and width, as from `mrope_position_ids`: True or "spatial" for
                Qwen2-VL, Qwen2.5-VL and Qwen3-VL in transformers >= 5.3, "largest" for these in older releases and for
                Qwen2.5-Omni and Qwen3-Omni. Media without a grid get positions like text.
            tokens_per_second: positions per second of the media's `time_step`, see `mrope_position_ids`. Requires
                mrope, and a time_step for every clip.

        Raises:
            TypeError, ValueError: a wrong argument, by name; samples longer than the capacity.
        """
        fields = build.lay_out(
            samples,
            capacity=capacity,
            sample_ids=sample_ids,
            per_token={"modality_ids": modality_ids, "labels": labels, "loss_weight": loss_weight},
            sample_weight=sample_weight,
            pad_token=pad_token,
            placeholder=placeholder,
            mrope=mrope,
            tokens_per_second=tokens_per_second,
        )
        return cls(**vars(fields))

    def _with_tensors(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: function(value) for name, value in tensors.items() if isinstance(value, Tensor)
        }
        changed["media"] = {modality: media.map(function) for modality, media in self.media.items()}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on another device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def split(self, chunk_size: int) -> list[PackedBatch]:
        """Batches of `chunk_size` samples each, the last one possibly smaller; `GradCache` calls this.

        The chunks are views of this batch. Padding is left out. A batch without samples gives one empty chunk.
        """
        chunk_size = integer("chunk_size", chunk_size, "an int")
        if chunk_size < 1:
            wrong_value("chunk_size", "at least 1", chunk_size)
        firsts = range(0, max(self.num_samples, 1), chunk_size)
        return [self._samples(first, min(first + chunk_size, self.num_samples)) for first in firsts]

    def _samples(self, first: int, last: int) -> PackedBatch:
        """Samples [first, last) without padding."""
        begin, end = self.cu_seqlens_host[first], self.cu_seqlens_host[last]
        media = {modality: media.between(begin, end) for modality, media in self.media.items()}
        spans_before = sum(start < begin for media in self.media.values() for start in media.starts_host)
        span_ids = self.span_ids[begin:end]

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[begin:end]

        return PackedBatch(
            tokens=self.tokens[begin:end],
            cu_seqlens=self.cu_seqlens[first : last + 1] - begin,
            cu_seqlens_host=tuple(value - begin for value in self.cu_seqlens_host[first : last + 1]),
            sample_ids=self.sample_ids[begin:end],
            position_ids=self.position_ids[..., begin:end],
            modality_ids=self.modality_ids[begin:end],
            span_ids=torch.where(span_ids < 0, span_ids, span_ids - spans_before),
            labels=cut(self.labels),
            loss_weight=cut(self.loss_weight),
            sample_weight=None if self.sample_weight is None else self.sample_weight[first:last],
            media={modality: items for modality, items in media.items() if items is not None},
        )

    def validate(self) -> PackedBatch:
        """Check every invariant. Reads the tensors, so it waits for a GPU.

        Returns:
            the batch itself.

        Raises:
            ValueError: the first broken invariant, by name.
        """
        check.check(self)
        return self

    # Losses

    def next_labels(self) -> Tensor:
        """[T] int64: the label of the sample's next token, -100 at a sample's end: a causal language model's shifted
        labels, which never cross into the next sample."""
        return loss.next_labels(self)

    def loss_totals(self, *, causal: bool = True) -> Tensor:
        """[2] float64: the sum of target weights, and the sum of sample_weight (1 without) over samples with a target.

        Sum them over micro-batches and ranks (an all_reduce) and pass the sum to `loss_weights`.
        """
        return loss.totals(self, causal)

    def loss_weights(self, normalize: str, totals: Tensor | None = None, *, causal: bool = True) -> Tensor:
        """[T] float32: weights w such that the loss is the sum of w[t] * nll[t], where nll[t] is for token t's label.

        A target is a label that is not -100; without labels, any token. Its weight is its loss_weight (1 without),
        times its sample's sample_weight.

        Args:
            normalize: "token": all targets count equally, w = weight / sum of all weights. "sample": all samples count
                equally, whatever their length: w = weight / its sample's sum / number of samples that have a target.
            totals: `loss_totals` summed over one optimizer step; the partial losses then add up to the whole step's
                loss, however the samples are packed. Default: this batch alone.
            causal: a sample's first label is not a target, because no token of the sample precedes it. False for masked
                modelling, which predicts tokens in place.

        Returns:
            weights by predicted token t. A causal model predicts it at t - 1: roll by -1 to match `next_labels`.

        Raises:
            ValueError: `normalize` is neither "token" nor "sample".
        """
        return loss.weights(self, normalize, totals, causal)

    # Exporters

    def to_flash_attn(self) -> dict[str, Any]:
        """Keyword arguments for `flash_attn_varlen_func` in self-attention: cu_seqlens and the longest segment."""
        return export.flash_attn(self)

    def to_hf(self, *, mrope: bool | None = None, types: str | None = None) -> dict[str, Any]:
        """Keyword arguments for a transformers causal model, batch size 1.

        Samples stay isolated under any attention implementation. Flash attention and others that take cu_seqlens get
        them. Eager, sdpa and flex attention infer the samples from position_ids, but only without a cache
        (use_cache=False) and without an attention mask. A recurrent model (Mamba) does neither and mixes samples.

        transformers shifts the labels itself, so each segment's first label becomes -100: otherwise the last token of
        the previous segment would be trained to predict it. Images and clips are passed as pixel_values,
        image_grid_thw, pixel_values_videos and video_grid_thw; images without a grid as pixel_values alone.

        Args:
            mrope: whether the model has M-RoPE, like Qwen2-VL. Such a model takes positions [4, 1, T]: from 0 in each
                segment, then time, height and width; from [1, T] it cannot infer the samples. Default: as the batch's
                position_ids, which must be [3, T] with images or clips. Text alone needs [3, T] too, or mrope=True,
                which repeats positions [T].
            types: the argument that tells the model which tokens are images: "token_type_ids" (Gemma 3: 1 for those of
                images, which then see each other; with attn_implementation="mmkernels", because the masks of
                transformers 5.24 misplace them) or "mm_token_type_ids" (1 for images, 2 for videos). None for none.

        Raises:
            ValueError: weights or media that transformers does not take; `mrope` missing, or inconsistent with
                position_ids; `types` that is neither, or does not know the batch's media.
        """
        return export.hf(self, mrope, types)

    def to_megatron(self) -> dict[str, Any]:
        """What Megatron-LM's packed ("thd") path takes: tokens, labels, loss_mask and position_ids [1, T], and the
        keyword arguments of its `PackedSeqParams` as "packed_seq_params".

        Labels are shifted (Megatron does not), 0 where loss_mask is 0. loss_mask is loss_weight times sample_weight.
        """
        return export.megatron(self)

    def to_nested(self, x: Tensor | None = None) -> Tensor:
        """A NestedTensor [S, *, ...], jagged, of `x` [T, ...], by default the tokens: a view, without padding."""
        return export.nested(self, x)

    def __repr__(self) -> str:
        media = "".join(f", {m.num_items} of modality {int(modality)}" for modality, m in self.media.items())
        return (
            f"PackedBatch({self.num_samples} samples, {self.num_tokens - self.padding} tokens, {self.padding} padding, "
            f"longest {self.max_seqlen}{media}, on {self.tokens.device})"
        )


torch.serialization.add_safe_globals([PackedBatch])

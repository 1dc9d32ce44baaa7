"""A packed batch: several samples in one row of tokens, with their boundaries said and never guessed."""

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
    """S samples in T tokens, sample after sample; padding, if any, is one last segment of its own.

    Build one with `from_samples`. Attention over `cu_seqlens` keeps the samples apart, and the padding apart from them
    all; positions alone would not.

    Attributes:
        tokens: [T] int64 token ids (or any dtype, and trailing dimensions, that the samples have).
        cu_seqlens: [segments+1] int32: where each segment begins, from 0 to T.
        cu_seqlens_host: the same as a tuple, so that nobody needs to ask the device.
        sample_ids: [T] int64: the id of each token's sample, -1 in padding.
        position_ids: [T] int64, from 0 in each segment; or [3, T], positions in time, height and width.
        modality_ids: [T] uint8, see `Modality`; TEXT in padding.
        span_ids: [T] int32: the number, in this batch, of the image, clip or recording that a token belongs to; -1 for
            none. `AttentionMask.multimodal` takes it.
        padding: tokens in the padding segment; 0 if there is none.
        labels: [T] int64 or None, each a token's own label (not shifted); -100 where there is none, in padding too.
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
        """Pack samples one after the other, whole, in the order given. Nothing is cut, dropped or resized.

        Args:
            samples: each a tensor of tokens [L_i, ...], usually 1-D ids; or a sequence of parts in their order, token
                ids [n] and `Media`. One dtype and device; zero length is fine.
            capacity: T; the tokens missing become the padding segment. None for no padding.
            sample_ids: an id >= 0 for each sample, such as the items of a plan's pack; default 0, 1, ...
            modality_ids: [L_i] integers in [0, 32) for each sample; default what the parts say, `Modality.TEXT` for
                tokens. Only for samples without media.
            labels: [L_i] integers for each sample, tokens of media included.
            loss_weight: [L_i] floats for each sample.
            sample_weight: a float >= 0 for each sample.
            pad_token: fills the padding.
            placeholder: the token id of media, or modality -> id.
            mrope: positions in time, height and width, [3, T], as from `mrope_position_ids`: True or "spatial" for
                Qwen2-VL, Qwen2.5-VL and Qwen3-VL as transformers has them from 5.3 on, "largest" for the same before
                and for Qwen2.5-Omni and Qwen3-Omni. Media without a grid count like text.
            tokens_per_second: positions to a second of the media's `time_step`, see `mrope_position_ids`. Only with
                mrope; every clip needs its time_step then.

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
        """Batches of `chunk_size` samples each, the last one smaller; `GradCache` calls this.

        The chunks are views of this batch. Padding belongs to no sample and is left out; a batch without samples is one
        chunk without any.
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
        """Check every invariant, reading the tensors (waits for a GPU).

        Returns:
            the batch itself.

        Raises:
            ValueError: the first broken invariant, by name.
        """
        check.check(self)
        return self

    # Losses

    def next_labels(self) -> Tensor:
        """[T] int64: for each token the label of the next one of its sample, -100 at a sample's end: the shifted labels
        of a causal language model, which never reach into the next sample."""
        return loss.next_labels(self)

    def loss_totals(self, *, causal: bool = True) -> Tensor:
        """[2] float64: the batch's sum of target weights, and its number of samples that have a target (their weights).

        Add them up over micro-batches and ranks (an all_reduce), and give the sum to `loss_weights`.
        """
        return loss.totals(self, causal)

    def loss_weights(self, normalize: str, totals: Tensor | None = None, *, causal: bool = True) -> Tensor:
        """[T] float32: weights w such that the loss is the sum of w[t] * nll[t], nll[t] that of token t's label.

        A target is a label that is not -100; without labels, any token. Its weight is its loss_weight (1 without),
        times its sample's sample_weight.

        Args:
            normalize: "token": every target counts alike, w = weight / sum of all weights. "sample": every sample
                counts alike, however long: w = weight / its sample's sum / number of samples that have a target.
            totals: `loss_totals` summed over everything that one optimizer step sees; the losses of its parts then add
                up to the loss of all, whichever way the samples are packed. Default: this batch alone.
            causal: a sample's first label is no target, for nothing comes before it to predict it from. False for
                masked modelling, where a token is predicted in place.

        Returns:
            weights by token t, whose prediction a causal model makes at t - 1: roll by -1 for `next_labels`.

        Raises:
            ValueError: `normalize` is neither.
        """
        return loss.weights(self, normalize, totals, causal)

    # Exporters

    def to_flash_attn(self) -> dict[str, Any]:
        """Keyword arguments of `flash_attn_varlen_func` for self-attention: cu_seqlens and the longest segment."""
        return export.flash_attn(self)

    def to_hf(self, *, mrope: bool | None = None) -> dict[str, Any]:
        """Keyword arguments of a transformers causal model, batch dimension 1.

        Samples stay apart whatever the attention: flash attention and others that take cu_seqlens have them, eager,
        sdpa and flex attention find the samples in position_ids, which they only look for without a cache
        (use_cache=False) and without an attention mask. A recurrent model (Mamba) does neither and mixes them.

        transformers shifts the labels itself, so the first label of each segment, which the last token of the segment
        before would be asked for, becomes -100. Images and clips are passed as pixel_values, image_grid_thw,
        pixel_values_videos and video_grid_thw.

        Args:
            mrope: whether the model has M-RoPE, as Qwen2-VL. It takes positions [4, 1, T]: counted from 0 in each
                segment, then time, height and width; from [1, T] it would not know the samples. Default: what the
                batch's own position_ids are, which must be [3, T] beside images and clips. For text alone too such a
                model needs [3, T], or True here, which repeats positions [T].

        Raises:
            ValueError: weights or media that have no place there; `mrope` missing, or not what position_ids are.
        """
        return export.hf(self, mrope)

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

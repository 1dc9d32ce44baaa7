"""Convert a `PackedBatch` to the arguments of other packages; see its `to_*` methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.batch.fields import IGNORE_LABEL, PackedFields
from mmkernels.batch.loss import firsts, next_labels, target_weights
from mmkernels.ops.checks import expect_tensor, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES, Modality

__all__ = ["flash_attn", "hf", "megatron", "nested"]

_HF_MEDIA = {
    Modality.IMAGE: ("pixel_values", "image_grid_thw"),
    Modality.VIDEO: ("pixel_values_videos", "video_grid_thw"),
}


def flash_attn(batch: PackedFields) -> dict[str, Any]:
    return {
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_k": batch.cu_seqlens,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_k": batch.max_seqlen,
    }


_HF_TYPES = {
    "token_type_ids": {Modality.IMAGE: 1},
    "mm_token_type_ids": {Modality.IMAGE: 1, Modality.VIDEO: 2},
}


def hf(batch: PackedFields, mrope: bool | None, types: str | None) -> dict[str, Any]:
    for name in ("loss_weight", "sample_weight"):
        if getattr(batch, name) is not None:
            wrong_value(name, "None for to_hf, whose loss takes no weights", getattr(batch, name))
    media_arguments: dict[str, Any] = {}
    for modality, media in batch.media.items():
        if modality not in _HF_MEDIA or (media.grid_thw is None and modality != Modality.IMAGE):
            expected = "images, and videos with grid_thw, for to_hf"
            wrong_value("media", expected, f"modality {int(modality)}")
        values, grid = _HF_MEDIA[Modality(modality)]
        media_arguments[values] = media.values
        if media.grid_thw is not None:
            media_arguments[grid] = media.grid_thw
    arguments = {
        "input_ids": batch.tokens[None],
        "position_ids": _hf_positions(batch, mrope),
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        # With a cache transformers sees one sequence: eager, sdpa and flex attention would mix samples.
        "use_cache": False,
    }
    if batch.labels is not None:
        arguments["labels"] = torch.where(firsts(batch), IGNORE_LABEL, batch.labels)[None]
    if types is not None:
        arguments[types] = _hf_types(batch, types)[None]
    return arguments | media_arguments


def _hf_types(batch: PackedFields, types: str) -> Tensor:
    """[T] int64: the modality of each token, in the numbers of transformers."""
    if types not in _HF_TYPES:
        wrong_value("types", f"None or one of {', '.join(_HF_TYPES)}", types)
    numbers = _HF_TYPES[types]
    other = set(batch.media) - set(numbers)
    if other:
        wrong_value("types", f"None for a batch with media of modality {min(map(int, other))}", types)
    table = torch.zeros(MAX_MODALITIES, dtype=torch.int64, device=batch.tokens.device)
    for modality, number in numbers.items():
        table[modality] = number
    return table[batch.modality_ids.long()]


def _hf_positions(batch: PackedFields, mrope: bool | None) -> Tensor:
    """[1, T], or [4, 1, T]: positions in the segment, from which transformers infers samples, then M-RoPE's three rows.

    An M-RoPE model expands [1, T] to its axes and then does not infer samples from it.
    """
    positions, plain = batch.position_ids, batch.position_ids.ndim == 1
    if mrope is None:
        if plain and batch.media:
            expected = "True or False (whether the model has M-RoPE) for a batch of positions [T] with images or clips"
            wrong_value("mrope", expected, mrope)
        mrope = not plain
    if not mrope:
        if not plain:
            wrong_value("mrope", "True or None for a batch of positions [3, T]", mrope)
        return positions[None]
    if plain:
        return positions.expand(4, 1, -1)
    begins = torch.where(firsts(batch), torch.arange(batch.num_tokens, device=batch.tokens.device), 0)
    within = torch.arange(batch.num_tokens, device=batch.tokens.device) - begins.cummax(0).values
    return torch.cat([within[None], positions])[:, None]


def megatron(batch: PackedFields) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "tokens": batch.tokens[None],
        "position_ids": batch.position_ids[None] if batch.position_ids.ndim == 1 else batch.position_ids[:, None],
        "packed_seq_params": {
            "qkv_format": "thd",
            "cu_seqlens_q": batch.cu_seqlens,
            "cu_seqlens_kv": batch.cu_seqlens,
            "cu_seqlens_q_padded": batch.cu_seqlens,
            "cu_seqlens_kv_padded": batch.cu_seqlens,
            "max_seqlen_q": batch.max_seqlen,
            "max_seqlen_kv": batch.max_seqlen,
        },
    }
    if batch.labels is not None:
        labels = next_labels(batch)
        weight = target_weights(batch).float().roll(-1)
        arguments["labels"] = torch.where(labels == IGNORE_LABEL, 0, labels)[None]
        arguments["loss_mask"] = torch.where(labels == IGNORE_LABEL, 0, weight)[None]
    return arguments


def nested(batch: PackedFields, x: Tensor | None) -> Tensor:
    if x is None:
        x = batch.tokens
    elif not isinstance(x, Tensor) or x.ndim < 1 or x.shape[0] != batch.num_tokens:
        expect_tensor("x", x, f"[{batch.num_tokens}, ...]", dtypes=(x.dtype,) if isinstance(x, Tensor) else ())
        wrong_value("x", f"[{batch.num_tokens}, ...]", x)
    offsets = batch.cu_seqlens[: batch.num_samples + 1].long()
    lengths = batch.lengths[: batch.num_samples]
    return torch.nested.nested_tensor_from_jagged(
        x[: batch.num_tokens - batch.padding],
        offsets,
        min_seqlen=min(lengths, default=0),
        max_seqlen=max(lengths, default=0),
    )

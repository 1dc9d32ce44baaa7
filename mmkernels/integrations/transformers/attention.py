"""`mmkernels.attention` as an attention implementation of transformers."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, attention
from mmkernels.integrations.transformers.rows import (
    Seen,
    Segments,
    decoded,
    encoded,
    from_dense,
    is_encoded,
    is_padded,
    kept,
)

__all__ = ["NAME", "attention_forward", "teach_vision"]

NAME = "mmkernels"

# Arguments of models that change no logit, or that the mask has in it already.
_HARMLESS = {
    "attention_mask",
    "cache_position",
    "deepstack_visual_embeds",
    "labels",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "past_key_values",
    "position_embeddings",
    "seq_idx",
    "token_type_ids",
    "visual_pos_masks",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `transformers.AttentionInterface` asks for it.

    Samples in one row of a batch are told apart by `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [S+1], boundaries), or,
    where the caller gave no padding mask, by `position_ids` that begin again at 0.

    Args:
        module: the layer; its `is_causal` decides where there is neither a mask nor an argument.
        query: [B, H, Tq, D]; key, value: [B, Hkv, Tk, D].
        attention_mask: None, what `make_mask` returns, or a dense mask [B, 1, Tq, Tk] without biases.
        dropout: probability.
        scaling: factor of the logits.
        is_causal: of a call without a mask.
        sliding_window: of a call without a mask; masks have it in them.
        softcap: bound of the logits (Gemma 2).
        s_aux: [H] logits of sinks (GPT-OSS).

    Returns:
        [B, Tq, H, Dv], and None instead of weights.

    Raises:
        ValueError: an argument that changes what is computed and has no counterpart here, by its name.
    """
    _expect_supported(kwargs)
    if not torch.compiler.is_compiling():
        teach_vision(module)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if _of_images(module) or _crosses(module, attention_mask, cu_seq_lens_q):
        position_ids = cu_seq_lens_q = cu_seq_lens_k = None  # of the text, which the model hands to all its layers
    batch, tokens_q, tokens_k = key.shape[0], query.shape[2], key.shape[2]
    query = query.expand(batch, -1, -1, -1)  # queries that are learned, the same for all rows
    boundaries = None
    if cu_seq_lens_q is not None:
        boundaries = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        _expect_boundaries(*boundaries, batch, tokens_q, tokens_k)
    mask = _mask(attention_mask, batch, tokens_q, tokens_k, is_causal, sliding_window, position_ids, boundaries, key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = attention(q, k, v, mask, scale=scaling, softcap=softcap, sink=s_aux, dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out, None


def _expect_supported(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False (weights are never stored), got True; use 'eager'")
    if kwargs.get("cache") is not None:
        raise ValueError("cache: expected None (attention does not read caches in pages: no continuous batching)")
    for name, value in kwargs.items():
        if name not in _HARMLESS and isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected no tensor that attn_implementation={NAME!r} does not know, got "
                f"{list(value.shape)} {value.dtype}; use 'eager' if it changes the attention"
            )


def _expect_boundaries(cu_q: Tensor, cu_k: Tensor, batch: int, tokens_q: int, tokens_k: int) -> None:
    """They cover the tokens of one row. Reads their first and last values, once."""
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: expected packed samples in a batch of one row, got one of {batch} rows")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seq_lens_k: expected {len(cu_q)} boundaries like cu_seq_lens_q, got {len(cu_k)}")
    for name, cu, tokens in (("cu_seq_lens_q", cu_q, tokens_q), ("cu_seq_lens_k", cu_k, tokens_k)):
        expected = f"{name}: expected boundaries from 0 to {tokens}, the tokens here"
        if torch.compiler.is_compiling():
            torch._assert_async((cu[0] == 0) & (cu[-1] == tokens), expected)
        elif (ends := kept(cu, ("ends",), functools.partial(_ends, cu))) != (0, tokens):
            raise ValueError(f"{expected}, got {ends[0]} to {ends[1]}")


def _ends(cu: Tensor) -> tuple[int, int]:
    return int(cu[0]), int(cu[-1])


def _mask(
    given: Tensor | None,
    batch: int,
    tokens_q: int,
    tokens_k: int,
    causal: bool,
    window: int | None,
    position_ids: Tensor | None,
    boundaries: tuple[Tensor, Tensor] | None,
    like: Tensor,
) -> AttentionMask | None:
    """What each query sees."""
    if given is None:
        if tokens_q == 1 or not causal:
            return _bidirectional(boundaries, window if tokens_k > 1 else None)
        given = _causal(batch, tokens_q, tokens_k, window, like)
    if not is_encoded(given):
        dense = given
        given = kept(dense, (tokens_q, tokens_k), lambda: encoded(from_dense(dense, tokens_q, tokens_k), padded=True))
    ours, restarts = given, None
    if boundaries is None and tokens_q == tokens_k and position_ids is not None and not is_padded(given):
        restarts = position_ids if position_ids.ndim == 2 and position_ids.shape[1] == tokens_q else None

    def narrowed() -> AttentionMask:
        segments = None
        if boundaries is not None:
            segments = Segments.of_boundaries(*boundaries, tokens_q)
        elif restarts is not None:
            segments = Segments.of_positions(restarts)
        return decoded(ours, batch, tokens_q, tokens_k, segments)

    return kept(given, (tokens_q, tokens_k, batch, *(boundaries or (None, None)), restarts), narrowed)


def _bidirectional(boundaries: tuple[Tensor, Tensor] | None, window: int | None) -> AttentionMask | None:
    if window is not None:
        raise ValueError(f"sliding_window: expected a mask with it in a call that is not causal, got {window} without")
    if boundaries is None:
        return None
    return kept(boundaries[0], boundaries, lambda: AttentionMask.packed(*boundaries))


def _causal(batch: int, tokens_q: int, tokens_k: int, window: int | None, like: Tensor) -> Tensor:
    """Of a call that is causal and brings no mask."""
    if tokens_q != tokens_k:
        raise ValueError(
            f"attention_mask: expected one for {tokens_q} queries and {tokens_k} keys of a causal call, got None"
        )
    end = torch.arange(1, tokens_q + 1, device=like.device)
    begin = end * 0 if window is None else (end - window).clamp(min=0)
    return encoded(Seen(begin.expand(batch, -1), end.expand(batch, -1)), padded=False)


def _crosses(module: nn.Module, mask: Tensor | None, cu_seq_lens: Tensor | None) -> bool:
    """Whether its keys are other tokens than its queries, so that only a mask can tell which belong to which sample."""
    if "Cross" not in type(module).__name__ and not getattr(module, "is_cross_attention", False):
        return False
    if cu_seq_lens is not None and mask is None:
        raise ValueError("attention_mask: expected one for cross attention in a row of several samples, got None")
    return True


# Vision towers


def _of_images(module: nn.Module) -> bool:
    """Whether it is a vision tower that does not pack images, but hands on the arguments of the text around them."""
    source = sys.modules.get(type(module).__module__)
    of_vision = "Vision" in type(getattr(module, "config", None)).__name__
    return of_vision and not hasattr(source, "is_flash_attention_requested")


def teach_vision(module: nn.Module) -> None:
    """Let the vision towers of Qwen-VL and their like hand over all images at once.

    Their attention asks `is_flash_attention_requested(config)` whether an implementation takes `cu_seq_lens_q`; ours
    does. Without it they call it image by image. It is told where a model's attention is first met, so that nothing
    of transformers changes for models that use another implementation.
    """
    source = sys.modules.get(type(module).__module__)
    asked = getattr(source, "is_flash_attention_requested", None)
    if source is None or asked is None or "VisionAttention" not in type(module).__name__ or hasattr(asked, "mmkernels"):
        return
    kind = type(getattr(module, "config", None))

    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        of_ours = type(config) is kind and getattr(config, "_attn_implementation", None) == NAME
        if of_ours and not args and not kwargs:
            return True
        return bool(asked(config, *args, **kwargs))

    is_flash_attention_requested.mmkernels = True  # type: ignore[attr-defined]
    source.is_flash_attention_requested = is_flash_attention_requested  # type: ignore[attr-defined]

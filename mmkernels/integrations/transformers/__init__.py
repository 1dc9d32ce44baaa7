"""`attn_implementation="mmkernels"` in the models of transformers.

from mmkernels.integrations.transformers import register

register()
model = AutoModel.from_pretrained(..., attn_implementation="mmkernels")

`PackedCollator` packs what its processor returns.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from mmkernels.integrations.transformers.attention import NAME, attention_forward
from mmkernels.integrations.transformers.collate import PackedCollator
from mmkernels.integrations.transformers.masks import make_mask

__all__ = ["PackedCollator", "attention_forward", "make_mask", "register"]


def register() -> None:
    """Make `attn_implementation="mmkernels"` known to transformers: attention and masks. Calling it again is harmless.

    Samples may be padded on either side, or packed: with `cu_seq_lens_q`, `cu_seq_lens_k`, or with `position_ids` that
    begin again and no padding mask. Sliding windows, image spans, cross attention, caches, grouped heads, soft caps
    and sinks are those of the model. Masks take O(tokens) memory. What is not supported raises an error that names it.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)

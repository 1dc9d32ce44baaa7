"""The prologue of attention: QK norm over the head dim and rotary embedding, in one pass."""

from mmkernels.ops.attention.rope.api import norm_rope, qk_norm_rope
from mmkernels.ops.attention.rope.table import rotary_cos_sin

__all__ = ["norm_rope", "qk_norm_rope", "rotary_cos_sin"]

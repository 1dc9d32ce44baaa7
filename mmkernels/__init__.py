"""Fused cross-modal attention, large-batch contrastive losses and token packing for multimodal pretraining."""

from importlib import metadata as _metadata

__all__ = [
    "AttentionCost",
    "AttentionMask",
    "BackendError",
    "ContrastiveStats",
    "EncoderCost",
    "FalseNegatives",
    "GatheredKeys",
    "GradCache",
    "Link",
    "Machine",
    "Media",
    "Modality",
    "PackedBatch",
    "PackedMedia",
    "PackingPlan",
    "RankSchedule",
    "StepPlan",
    "StreamPlanner",
    "TrainingStep",
    "__version__",
    "additive_attention",
    "attention",
    "attention_weights",
    "balance_ranks",
    "embed_splice",
    "gated_residual",
    "gather_keys",
    "infonce",
    "maxsim",
    "mrope_position_ids",
    "norm_rope",
    "pack",
    "pad",
    "patchify",
    "plan_packing",
    "plan_scale",
    "qk_norm_rope",
    "received_bytes",
    "rotary_cos_sin",
    "sample_negatives",
    "segment_pool",
    "siglip",
    "similarity_logsumexp",
    "topk_similar",
    "unpack",
    "unpad",
    "unpatchify",
]

try:
    __version__ = _metadata.version("mmkernels")
except _metadata.PackageNotFoundError:  # a source tree on sys.path
    __version__ = "0+unknown"

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as _error:  # `mmkernels info` must still work and report it
    _why_no_torch = str(_error)

    def __getattr__(name: str) -> object:
        if name in __all__:
            advice = "pip install torch (https://pytorch.org says which build)"
            raise ImportError(f"mmkernels.{name} needs PyTorch: {advice}; the import says: {_why_no_torch}")
        raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")

else:
    from mmkernels.batch import Media, PackedBatch, PackedMedia
    from mmkernels.gradcache import GradCache
    from mmkernels.ops.attention import (
        AttentionMask,
        additive_attention,
        attention,
        attention_weights,
        gated_residual,
        norm_rope,
        qk_norm_rope,
        rotary_cos_sin,
    )
    from mmkernels.ops.contrastive import (
        ContrastiveStats,
        FalseNegatives,
        GatheredKeys,
        gather_keys,
        infonce,
        sample_negatives,
        siglip,
        similarity_logsumexp,
        topk_similar,
    )
    from mmkernels.ops.modality import Modality
    from mmkernels.ops.packing import (
        embed_splice,
        maxsim,
        mrope_position_ids,
        pack,
        pad,
        patchify,
        segment_pool,
        unpack,
        unpad,
        unpatchify,
    )
    from mmkernels.planning import (
        AttentionCost,
        EncoderCost,
        PackingPlan,
        RankSchedule,
        StepPlan,
        StreamPlanner,
        TrainingStep,
        balance_ranks,
        plan_packing,
        plan_scale,
    )
    from mmkernels.runtime.backends import BackendError
    from mmkernels.runtime.machine import Link, Machine
    from mmkernels.runtime.received import received_bytes

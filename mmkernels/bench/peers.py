"""Adapters to other packages, if installed: each takes a bench's inputs and returns its outputs.

None is a dependency. `python -m mmkernels.bench.peers` lists which are installed. An adapter imports its package lazily
and passes the same checks as every contender: a peer with a wrong result on a point is reported as wrong and not timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkernels.bench import planner_peers

Inputs = dict[str, Any]
Adapter = Callable[[Inputs], tuple[Any, ...]]  # None: an output that the package does not compute


@dataclass(frozen=True)
class Peer:
    """A package: its import name, its pip name, whether it needs a GPU, and its adapters by name."""

    module: str
    install: str
    needs_cuda: bool = True
    adapters: dict[str, Adapter] = field(default_factory=dict)


def _contrastive_gradients(loss: Tensor, inputs: Inputs, *names: str) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss, [inputs[name] for name in names])


def open_clip_clip_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """`infonce`: queries, keys, logit_scale -> loss, dqueries, dkeys, dlogit_scale."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()(inputs["queries"], inputs["keys"], inputs["logit_scale"])
    return _contrastive_gradients(loss, inputs, "queries", "keys", "logit_scale")


def open_clip_siglip_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """`siglip`: queries, keys, logit_scale, logit_bias -> loss, dqueries, dkeys, dlogit_scale, dlogit_bias."""
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()(inputs["queries"], inputs["keys"], inputs["logit_scale"], inputs["logit_bias"])
    return _contrastive_gradients(loss, inputs, "queries", "keys", "logit_scale", "logit_bias")


def inf_cl_symmetric(inputs: Inputs) -> tuple[Tensor, ...]:
    """`infonce`: one direction per call, so two calls."""
    from inf_cl import cal_flash_loss

    queries, keys, scale = inputs["queries"], inputs["keys"], inputs["logit_scale"]
    forth, back = cal_flash_loss(queries, keys, scale=scale), cal_flash_loss(keys, queries, scale=scale)
    return _contrastive_gradients((forth.mean() + back.mean()) / 2, inputs, "queries", "keys", "logit_scale")


def memeff_clip_loss(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """`infonce`: the temperature is a Python float, so there is no gradient of the scale."""
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, its default, returns a gradient that does not match the loss.
    loss_fn = MemoryEfficientCLIPLoss(
        temperature=1 / float(inputs["logit_scale"]), normalized_inputs=True, stable=False
    )
    loss = loss_fn(inputs["queries"], inputs["keys"])
    return *_contrastive_gradients(loss, inputs, "queries", "keys"), None


def siglip_kernel_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """`siglip`: takes the logarithm of the scale."""
    from siglip_kernel import fused_siglip_loss

    log_scale = inputs["logit_scale"].log()
    loss = fused_siglip_loss(inputs["queries"], inputs["keys"], log_scale, inputs["logit_bias"])
    return _contrastive_gradients(loss, inputs, "queries", "keys", "logit_scale", "logit_bias")


def sentence_transformers_symmetric(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """`infonce`: the scale is a Python float, so there is no gradient of it."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss_fn = MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        scale=float(inputs["logit_scale"]),
        similarity_fct=dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    queries, keys = inputs["queries"], inputs["keys"]
    loss = loss_fn.compute_loss_from_embeddings([queries, keys], torch.empty(0, device=queries.device))
    return *_contrastive_gradients(loss, inputs, "queries", "keys"), None


def liger_linear_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    """`infonce`: each direction is a linear layer of the other side's features with cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    queries, keys, scale = inputs["queries"], inputs["keys"], inputs["logit_scale"]
    labels = torch.arange(len(queries), device=queries.device)
    forth = liger_fused_linear_cross_entropy(queries * scale.to(queries.dtype), keys, labels)
    back = liger_fused_linear_cross_entropy(keys * scale.to(keys.dtype), queries, labels)
    return _contrastive_gradients((forth + back) / 2, inputs, "queries", "keys", "logit_scale")


def flash_attn_varlen(inputs: Inputs) -> tuple[Tensor, ...]:
    """Packed attention: q, k, v, cu_seqlens_*, max_seqlen_*, causal, grad_out -> out, dq, dk, dv."""
    from flash_attn import flash_attn_varlen_func

    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    out = flash_attn_varlen_func(*(inputs[name] for name in names), causal=inputs["causal"])
    return out, *torch.autograd.grad(out, [inputs["q"], inputs["k"], inputs["v"]], inputs["grad_out"])


def flash_attn_4_varlen(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same by FlashAttention-4, a package of its own, in CuTe DSL."""
    from flash_attn.cute import flash_attn_varlen_func

    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options = {name: inputs[name] for name in names}
    found = flash_attn_varlen_func(*(inputs[name] for name in "qkv"), **options, causal=inputs["causal"])
    out = found[0] if isinstance(found, tuple) else found
    return out, *torch.autograd.grad(out, [inputs["q"], inputs["k"], inputs["v"]], inputs["grad_out"])


def xformers_block_diagonal(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same through xformers' block-diagonal bias; it has no GQA, so head counts must match."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths_q, lengths_k = inputs["cu_seqlens_q"].diff().tolist(), inputs["cu_seqlens_k"].diff().tolist()
    bias = BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    bias = bias.make_causal() if inputs["causal"] else bias
    q, k, v = (inputs[name] for name in "qkv")
    out = memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
    return out, *torch.autograd.grad(out, [q, k, v], inputs["grad_out"])


def fbgemm_padded(inputs: Inputs) -> tuple[Tensor, ...]:
    """Packed to padded: x, cu_seqlens, max_seqlen, grad_padded -> out, dx."""
    import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)

    offsets = [inputs["cu_seqlens"].long()]
    out = torch.ops.fbgemm.jagged_to_padded_dense(inputs["x"], offsets, [inputs["max_seqlen"]], 0.0)
    return out, *torch.autograd.grad(out, [inputs["x"]], inputs["grad_padded"])


PEERS = {
    "open_clip": Peer(
        "open_clip",
        "open-clip-torch",
        needs_cuda=False,
        adapters={"clip_loss": open_clip_clip_loss, "siglip_loss": open_clip_siglip_loss},
    ),
    "inf_cl": Peer("inf_cl", "inf-cl", adapters={"symmetric": inf_cl_symmetric}),
    "memeff": Peer("memeff", "memeff", adapters={"clip_loss": memeff_clip_loss}),
    "siglip_kernel": Peer("siglip_kernel", "siglip-kernel", adapters={"loss": siglip_kernel_loss}),
    "sentence_transformers": Peer(
        "sentence_transformers",
        "sentence-transformers",
        needs_cuda=False,
        adapters={"symmetric": sentence_transformers_symmetric},
    ),
    "liger_kernel": Peer("liger_kernel", "liger-kernel", adapters={"linear_cross_entropy": liger_linear_cross_entropy}),
    "flash_attn": Peer("flash_attn", "flash-attn", adapters={"varlen": flash_attn_varlen}),
    "flash_attn_4": Peer("flash_attn.cute", "flash-attn-4", adapters={"varlen": flash_attn_4_varlen}),
    "fbgemm_gpu": Peer("fbgemm_gpu", "fbgemm-gpu", needs_cuda=False, adapters={"padded": fbgemm_padded}),
    "xformers": Peer("xformers", "xformers", adapters={"block_diagonal": xformers_block_diagonal}),
    "trl": Peer("trl", "trl", needs_cuda=False, adapters={"bfd": planner_peers.trl_bfd}),
    "numba": Peer("numba", "numba", needs_cuda=False, adapters={"first_fit": planner_peers.numba_first_fit}),
    "lightbinpack": Peer(
        "lightbinpack", "lightbinpack", needs_cuda=False, adapters={"obfd": planner_peers.lightbinpack_obfd}
    ),
    "torchtune": Peer(
        "torchtune", "torchtune", needs_cuda=False, adapters={"next_fit": planner_peers.torchtune_next_fit}
    ),
}


def _is_here(peer: Peer) -> bool:
    try:
        return importlib.util.find_spec(peer.module) is not None
    except ImportError:  # of the package that the module would be in, or of a build for another torch
        return False


def adapter(package: str, name: str, device: str) -> tuple[Adapter | None, str]:
    """An adapter, or None and why it is unavailable."""
    peer = PEERS[package]
    if not _is_here(peer):
        return None, f"absent (pip install {peer.install})"
    if peer.needs_cuda and device == "cpu":
        return None, "needs a GPU"
    return peer.adapters[name], ""


if __name__ == "__main__":
    for package, peer in PEERS.items():
        version = importlib.metadata.version(peer.install) if _is_here(peer) else f"absent (pip install {peer.install})"
        print(f"{package:16} {version}{', needs a GPU' if peer.needs_cuda else ''}")

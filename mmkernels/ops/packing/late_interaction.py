"""Late interaction of packed queries and documents."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.checks import dtype_names, expect_tensor, integer, narrowed, wrong_value
from mmkernels.ops.packing import op, op_maxsim
from mmkernels.ops.packing.checks import check_cu_seqlens
from mmkernels.runtime.backends import resolve

__all__ = ["maxsim"]

_INTEGERS = (torch.int64, torch.int32)
# Tokens on each side of a block of products: 4 MiB, within a CPU's caches, or 256 MiB.
_BLOCK_CPU, _BLOCK_GPU = 1024, 8192
_LARGEST_BLOCK = 2**31 - 1


def maxsim(
    queries: Tensor,
    documents: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    reduction: str = "sum",
    block: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every query against every document by their tokens: late interaction, "MaxSim".

        score_ab = sum over tokens i of query a of  max over tokens j of document b of  <q_i, d_j>

    Products are taken block by block; only the largest of each query token with each document and the number of the
    token that has it are kept. Gradients read those tokens alone, so that memory is O(Tq · Nd) and a block, and a
    backward costs a small part of the forward. Of equal products the first token's counts. Rows are taken as they are:
    normalise them for cosines.

    Products and sums are float32 for low-precision dtypes: no product is rounded to 16 bits before the maximum is
    taken. They are PyTorch's products and follow `torch.set_float32_matmul_precision`. Dtypes are kept under
    torch.autocast. A token of documents that is NaN makes its document's scores NaN, a token of queries its query's.
    The call does not sync with a GPU.

        scores = maxsim(queries, documents, cu_seqlens_q, cu_seqlens_k)  # document a belongs to query a
        loss = F.cross_entropy(scores * scale, torch.arange(len(scores), device=scores.device))

    Args:
        queries: [Tq, E] floating point, the tokens of all queries, packed.
        documents: [Td, E], in queries' dtype.
        cu_seqlens_q: [Nq+1] int32 (int64 is converted), as in `segment_pool`; rows past its end score nothing.
        cu_seqlens_k: [Nd+1] int32 (int64 is converted), likewise.
        reduction: "sum" over the query's tokens; or "mean", as FILIP.
        block: tokens of queries and of documents whose products, at most block x block, are held at a time. None: 1024
            on a CPU, 8192 on a GPU.
        backend: as in `pack`.

    Returns:
        [Nq, Nd] float32 (float64 for float64 tokens). Where the query or the document has no token: 0, without a
        gradient; a loss over documents some of which are empty must mask their scores.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.

    Source: Khattab and Zaharia 2020 (arXiv:2004.12832), equation 3; Yao et al. 2021 (arXiv:2111.07783), equations 1 and
    2.
    """
    expect_tensor("queries", queries, "[Tq, E] floating point", ndim=2)
    expected = f"[Td, {queries.shape[1]}] {dtype_names(queries.dtype)}"
    expect_tensor("documents", documents, expected, ndim=2, dtypes=(queries.dtype,), like=queries)
    if documents.shape[1] != queries.shape[1]:
        wrong_value("documents", expected, documents)
    cu_seqlens_q = _boundaries("cu_seqlens_q", cu_seqlens_q, "Nq", queries)
    cu_seqlens_k = _boundaries("cu_seqlens_k", cu_seqlens_k, "Nd", documents)
    if reduction not in ("sum", "mean"):
        wrong_value("reduction", '"sum" or "mean"', reduction)
    if block is None:
        block = _BLOCK_CPU if queries.device.type == "cpu" else _BLOCK_GPU
    block = min(integer("block", block, "None or an integer >= 1", at_least=1), _LARGEST_BLOCK)
    check_cu_seqlens(cu_seqlens_q, queries.shape[0], "cu_seqlens_q")  # before the work
    served = resolve("packing", queries, backend)
    # Rows past the end may hold anything: a weight of 0 would not hide their NaN, nor a NaN of the documents from them.
    inside = torch.arange(queries.shape[0], device=queries.device) < cu_seqlens_q[-1]
    queries = torch.where(inside[:, None], queries, 0)
    best, _ = op_maxsim.maxsim(queries, documents, cu_seqlens_k, block, served)
    return op.segment_pool(best, cu_seqlens_q, reduction, served)[0]


def _boundaries(name: str, cu_seqlens: Tensor, letters: str, x: Tensor) -> Tensor:
    expected = f"[{letters}+1] int32"
    expect_tensor(name, cu_seqlens, expected, ndim=1, dtypes=_INTEGERS, like=x)
    if cu_seqlens.shape[0] == 0:
        wrong_value(name, f"{expected} with at least one entry", cu_seqlens)
    return narrowed(name, cu_seqlens, torch.int32)

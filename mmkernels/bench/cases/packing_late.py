"""Late interaction over packed tokens, against the padded einsum that trainers write."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import maxsim
from mmkernels.bench.case import Case, Inputs, Work
from mmkernels.bench.cases.packing_rows import Params
from mmkernels.testing.packing import cu_seqlens_of, plain_maxsim


def lengths_of(p: Params) -> tuple[list[int], list[int]]:
    """Of queries and documents; ragged ones lie between an eighth of the longest and the longest."""
    if p["lengths"] == "equal":
        return [p["Lq"]] * p["N"], [p["Lk"]] * p["N"]
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(most // 8, most + 1, (p["N"],), generator=generator) for most in (p["Lq"], p["Lk"]))
    ragged_q, ragged_k = (lengths.tolist() for lengths in drawn)
    return ragged_q, ragged_k


def setup(p: Params, device: torch.device) -> Inputs:
    lengths = lengths_of(p)
    rows = (torch.randn(sum(each), p["E"], device=device) for each in lengths)
    queries, documents = (torch.nn.functional.normalize(x, dim=1).to(getattr(torch, p["dtype"])) for x in rows)
    cu_seqlens_q, cu_seqlens_k = (cu_seqlens_of(each, device) for each in lengths)
    grad_out = torch.randn(p["N"], p["N"], device=device)
    return {
        "queries": queries.requires_grad_(),
        "documents": documents.requires_grad_(),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "grad_out": grad_out,
    }


def batch(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs["queries"], inputs["documents"], inputs["cu_seqlens_q"], inputs["cu_seqlens_k"]


def with_gradients(scores: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    grad_out = inputs["grad_out"].to(scores.dtype)
    return scores, *torch.autograd.grad(scores, [inputs["queries"], inputs["documents"]], grad_out)


def by_document(inputs: Inputs) -> tuple[Tensor, ...]:
    """No padding, and as many products as there are pairs of tokens: one document at a time."""
    queries, documents, cu_seqlens_q, cu_seqlens_k = batch(inputs)
    parts = documents.split(cu_seqlens_k.diff().tolist())
    best = torch.stack([(queries @ part.T).max(1).values for part in parts], 1)
    return with_gradients(torch.stack([x.sum(0) for x in best.split(cu_seqlens_q.diff().tolist())]), inputs)


def work(p: Params) -> Work:
    """All products once; gradients of the winners only."""
    tokens_q, tokens_k = (sum(each) for each in lengths_of(p))
    return Work(flops=2 * p["E"] * tokens_q * (tokens_k + 2 * p["N"]))


SIZES = [
    {"N": 64, "Lq": 32, "Lk": 180, "lengths": "ragged"},  # ColBERT: passages
    {"N": 64, "Lq": 32, "Lk": 180, "lengths": "equal"},
    {"N": 32, "Lq": 24, "Lk": 1030, "lengths": "ragged"},  # ColPali: pages
    {"N": 128, "Lq": 77, "Lk": 196, "lengths": "equal"},  # FILIP: captions and patches
]
DTYPES = {"float32": SIZES, "bfloat16": SIZES[:1]}
MAXSIM = Case(
    name="maxsim fwd+bwd",
    full=[{**size, "E": 128, "dtype": dtype} for dtype, sizes in DTYPES.items() for size in sizes],
    quick=[{"N": 32, "Lq": 32, "Lk": 180, "lengths": "ragged", "E": 128, "dtype": "float32"}],
    gate={"N": 12},
    setup=setup,
    ours=lambda inputs, backend: with_gradients(maxsim(*batch(inputs), backend=backend), inputs),
    plain=lambda inputs: with_gradients(plain_maxsim(*batch(inputs)), inputs),
    others={"one document at a time": by_document},
    baseline=("plain PyTorch", "one document at a time"),
    outputs=("scores", "grad_queries", "grad_documents"),
    work=work,
)

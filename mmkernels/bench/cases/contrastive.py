"""Contrastive losses: forward + backward and forward alone, against plain PyTorch, chunked checkpointing and peers.

The work is the minimum for every contender: 2·N²·E forward, and 6·N²·E with the backward. So computing the logits
twice, or recomputing them, as ours do, shows as fewer TFLOP/s. Ratios refer to the fastest of the plain PyTorch forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import FalseNegatives, infonce, siglip
from mmkernels.bench.case import Case, Inputs, Settings, Work, compiled
from mmkernels.bench.cases.contrastive_forms import USUAL, chunked_infonce, chunked_siglip, plain_statistics
from mmkernels.testing.contrastive import (
    infonce_terms,
    plain_infonce,
    plain_infonce_options,
    plain_infonce_two_matrices,
    plain_siglip,
    siglip_terms,
)

Params = Mapping[str, Any]
Outputs = tuple[Tensor, ...]

USUAL_FORM = "plain PyTorch, usual form"  # "plain PyTorch" has every option, and is the ground truth
INFONCE = ("queries", "keys", "logit_scale")
SIGLIP = (*INFONCE, "logit_bias")


def setup(p: Params, device: torch.device) -> Inputs:
    """Unit rows; a key is similar to its query (cosine about .7), as in mid-training."""
    generator = torch.Generator(device).manual_seed(p.get("seed", 0))
    draw = partial(torch.randn, p["N"], p["E"], generator=generator, device=device)
    queries = F.normalize(draw(), dim=1)
    keys = F.normalize(queries + F.normalize(draw(), dim=1), dim=1)
    dtype = getattr(torch, p["dtype"])
    inputs = {"queries": queries.to(dtype), "keys": keys.to(dtype)}
    inputs["logit_scale"] = torch.tensor(1 / 0.07, device=device)
    inputs["logit_bias"] = torch.tensor(-10.0, device=device)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    # About four pairs share an id; the queue has as many keys again; the teacher is the features plus noise.
    inputs["ids"] = torch.randint(0, max(p["N"] // 4, 1), (p["N"],), generator=generator, device=device)
    inputs["queue"] = F.normalize(draw(), dim=1).to(dtype)
    for name in ("queries", "keys"):
        moved = inputs[name].detach().float() + 0.3 * F.normalize(draw(), dim=1)
        inputs[f"teacher_{name}"] = F.normalize(moved, dim=1).to(dtype)
        # Small integers, whose products are exact in every dtype: the same keys are left out.
        inputs[f"guide_{name}"] = (inputs[name].detach().float() * p["E"] ** 0.5 / 2).round().clamp(-2, 2).to(dtype)
    return inputs


# Cases

DRAWS = 32  # that the float64 gate judges together: the loss and the scale's gradient are one number a draw


def forward(loss: Callable[..., Tensor], names: tuple[str, ...], inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return (loss(*(inputs[name] for name in names)),)


def forward_backward(loss: Callable[..., Tensor], names: tuple[str, ...], inputs: Inputs) -> Outputs:
    leaves = [inputs[name] for name in names]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves)


def terms(inputs: Inputs) -> Outputs:
    """Sums of the absolute terms of an InfoNCE loss and its gradients."""
    with torch.no_grad():
        return infonce_terms(*(inputs[name] for name in INFONCE))


def terms_of_siglip(inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return siglip_terms(*(inputs[name] for name in SIGLIP))


def work(gemms: int, p: Params) -> Work:
    """Features are read once, and with a backward their gradients written."""
    element = getattr(torch, p["dtype"]).itemsize
    return Work(flops=2 * gemms * p["N"] ** 2 * p["E"], bytes=(2 if gemms == 1 else 4) * p["N"] * p["E"] * element)


# Contenders that store N x N logits are skipped beyond these sizes: plain PyTorch holds several such float32 matrices,
# the reference some in float64.
LARGEST = {"plain PyTorch": 32768, "plain PyTorch, two matrices": 32768, "torch.compile": 32768}
LARGEST |= {"open_clip": 32768, "sentence_transformers": 32768, "mmkernels [reference]": 16384}


def limits(p: Params, name: str) -> str | None:
    largest = LARGEST.get(name)
    return f"stores N x N logits: skipped beyond N={largest}" if largest is not None and p["N"] > largest else None


def points(dtype: str, *sizes: int) -> list[Params]:
    return [{"N": n, "E": 512, "dtype": dtype} for n in sizes]


def large(*sizes: int) -> list[Params]:
    return [*points("float32", *sizes), *points("bfloat16", *sizes)]


# Without bfloat16 instructions plain PyTorch is 25 times slower in it.
FULL = [*points("float32", 1024, 4096, 8192), *points("bfloat16", 1024, 2048)]
QUICK: list[Params] = [{"N": 2048, "E": 512, "dtype": "float32"}, {"N": 512, "E": 512, "dtype": "bfloat16"}]

Losses = Mapping[str, Callable[..., Tensor]]


def case(
    name: str,
    ours: Callable[..., Tensor],
    plain: Losses,
    others: Losses,
    names: tuple[str, ...],
    gemms: int,
    peers: Mapping[str, str],
    run: Callable[[Callable[..., Tensor], tuple[str, ...], Inputs], Outputs],
) -> Case:
    """`plain`: forms of the loss in plain PyTorch; the first, in float64, is the ground truth."""
    first, *more = plain
    return Case(
        name=name,
        full=FULL if run is forward_backward else points("float32", 8192),
        quick=QUICK if run is forward_backward else QUICK[:1],
        large=[*points("bfloat16", 8192), *large(32768, 65536, 131072, 1048576)],
        gate={"N": 389, "E": 128},
        draws=DRAWS,
        terms=terms if names == INFONCE else terms_of_siglip,
        setup=setup,
        ours=lambda inputs, backend: run(partial(ours, backend=backend), names, inputs),
        plain=partial(run, plain[first], names),
        others={
            **{form: partial(run, plain[form], names) for form in more},
            "torch.compile": partial(run, compiled(plain[first]), names),
            **{form: partial(run, loss, names) for form, loss in others.items()},
        },
        peers=peers,
        work=partial(work, gemms),
        outputs=("loss", *(f"gradient of {of}" for of in names)) if run is forward_backward else ("loss",),
        limits=limits,
        baseline=(*plain, "torch.compile"),
        backends_of="contrastive",
    )


def filter_of(inputs: Inputs) -> FalseNegatives:
    """A guide of the same width, and a margin by which it leaves out a few keys of most queries."""
    return FalseNegatives(inputs["guide_queries"], inputs["guide_keys"], inputs["guide_keys"].shape[1] // 8)


# Options of infonce, and the least number of matmuls of 2·N²·E that each needs forward and backward.
OPTIONS: dict[str, tuple[Callable[[Inputs], dict[str, Any]], int]] = {
    "ids": (lambda inputs: {"query_ids": inputs["ids"]}, 3),
    "ignored ids": (lambda inputs: {"query_ids": inputs["ids"], "same_id": "ignore"}, 3),
    "negatives": (lambda inputs: {"negatives": inputs["queue"]}, 5),
    "label smoothing": (lambda inputs: {"label_smoothing": 0.1}, 3),
    "teacher": (lambda inputs: {"teacher": (inputs["teacher_queries"], inputs["teacher_keys"], 0.4)}, 4),
    "decoupled": (lambda inputs: {"decoupled": True}, 3),
    "hardness": (lambda inputs: {"hardness": 9.0}, 3),
    "false negatives": (lambda inputs: {"false_negatives": filter_of(inputs), "symmetric": False}, 4),
    "false negatives, both ways": (lambda inputs: {"false_negatives": filter_of(inputs)}, 4),
}


def option_case(name: str) -> Case:
    options, gemms = OPTIONS[name]

    def run(loss: Callable[..., Tensor], inputs: Inputs) -> Outputs:
        leaves = [inputs[of] for of in INFONCE]
        value = loss(*leaves, **options(inputs))
        return value, *torch.autograd.grad(value, leaves)

    def ours(inputs: Inputs, backend: str | None) -> Outputs:
        return run(partial(infonce, backend=backend), inputs)

    def usual(inputs: Inputs) -> Outputs:
        leaves = [inputs[of] for of in INFONCE]
        value = USUAL[name](*leaves, inputs)
        return value, *torch.autograd.grad(value, leaves)

    return Case(
        name=f"infonce with {name} fwd+bwd",
        full=points("float32", 4096),
        quick=[{"N": 1024, "E": 256, "dtype": "float32"}],
        large=large(32768, 131072),
        gate={"N": 389, "E": 128},
        draws=DRAWS,
        terms=terms,
        setup=setup,
        ours=ours,
        plain=partial(run, plain_infonce_options),
        others={USUAL_FORM: usual},
        baseline=("plain PyTorch", USUAL_FORM),
        work=partial(work, gemms),
        outputs=("loss", *(f"gradient of {of}" for of in INFONCE)),
        limits=limits,
    )


def statistics(inputs: Inputs, backend: str | None) -> Outputs:
    """Forward and backward, with statistics from the same pass."""
    leaves = [inputs[of] for of in INFONCE]
    loss, stats = infonce(*leaves, return_stats=True, backend=backend)
    return loss, *torch.autograd.grad(loss, leaves), stats.accuracy_q, stats.entropy


INFONCE_PLAIN = {"plain PyTorch": plain_infonce, "plain PyTorch, two matrices": plain_infonce_two_matrices}
SIGLIP_PLAIN = {"plain PyTorch": plain_siglip}
INFONCE_PEERS = {
    "open_clip": "clip_loss",
    "sentence_transformers": "symmetric",
    "inf_cl": "symmetric",
    "memeff": "clip_loss",
    "liger_kernel": "linear_cross_entropy",
}
SIGLIP_PEERS = {"open_clip": "siglip_loss", "siglip_kernel": "loss"}
INFONCE_OTHERS = {"chunked checkpointing": chunked_infonce}
SIGLIP_OTHERS = {"chunked checkpointing": chunked_siglip}

CASES = [
    case("infonce fwd+bwd", infonce, INFONCE_PLAIN, INFONCE_OTHERS, INFONCE, 3, INFONCE_PEERS, forward_backward),
    *(option_case(name) for name in OPTIONS),
    Case(
        name="infonce with statistics fwd+bwd",
        full=points("float32", 4096),
        quick=[{"N": 1024, "E": 256, "dtype": "float32"}],
        gate={"N": 389, "E": 128},
        draws=DRAWS,
        terms=terms,
        setup=setup,
        ours=statistics,
        plain=lambda inputs: plain_statistics(*(inputs[of] for of in INFONCE)),
        work=partial(work, 3),
        outputs=("loss", *(f"gradient of {of}" for of in INFONCE), "accuracy", "entropy"),
        limits=limits,
    ),
    case("infonce fwd", infonce, INFONCE_PLAIN, INFONCE_OTHERS, INFONCE, 1, {}, forward),
    case("siglip fwd+bwd", siglip, SIGLIP_PLAIN, SIGLIP_OTHERS, SIGLIP, 3, SIGLIP_PEERS, forward_backward),
    case("siglip fwd", siglip, SIGLIP_PLAIN, SIGLIP_OTHERS, SIGLIP, 1, {}, forward),
]


def cases(settings: Settings) -> list[Case]:
    return CASES

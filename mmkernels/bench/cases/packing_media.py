"""Packing's ops on images and text: `embed_splice` and `patchify`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmkernels.bench.case import Case, Inputs, Work
from mmkernels.bench.cases.packing_rows import Params
from mmkernels.ops.packing import embed_splice, patchify

# Splicing image features into embedded tokens


def setup_splice(p: Params, device: torch.device) -> Inputs:
    """Half of the tokens are images of 64 features each, at random positions, as in an interleaved document."""
    dtype, tokens, width = getattr(torch, p["dtype"]), p["T"], p["E"]
    images = tokens // 2 // 64
    spans = torch.randperm(tokens // 64, device=device)[:images].sort().values * 64
    dst_index = (spans[:, None] + torch.arange(64, device=device)).flatten()
    token_ids = torch.randint(0, p["V"], (tokens,), device=device)
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    mask[dst_index] = True
    return {
        "table": torch.randn(p["V"], width, device=device).to(dtype).requires_grad_(),
        "features": torch.randn(len(dst_index), width, device=device).to(dtype).requires_grad_(),
        "token_ids": token_ids,
        "dst_index": dst_index,
        "mask": mask,
        "grad_out": torch.randn(tokens, width, device=device).to(dtype),
    }


def splice_gradients(out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, [inputs["table"], inputs["features"]], inputs["grad_out"])


def splice(inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    names = ("token_ids", "table", "features", "dst_index")
    return splice_gradients(embed_splice(*(inputs[name] for name in names), backend=backend), inputs)


def masked_scatter(inputs: Inputs) -> tuple[Tensor, ...]:
    """What transformers' multimodal models do."""
    embedded = torch.nn.functional.embedding(inputs["token_ids"], inputs["table"])
    out = embedded.masked_scatter(inputs["mask"][:, None].expand_as(embedded), inputs["features"])
    return splice_gradients(out, inputs)


def index_put(inputs: Inputs) -> tuple[Tensor, ...]:
    embedded = torch.nn.functional.embedding(inputs["token_ids"], inputs["table"])
    return splice_gradients(embedded.index_put((inputs["dst_index"],), inputs["features"]), inputs)


def splice_floor(inputs: Inputs) -> tuple[Tensor, ...]:
    """The ceiling: a copy of the tokens forward, and writes of the table's and the features' gradients backward."""
    table, features, grad = inputs["table"].detach(), inputs["features"].detach(), inputs["grad_out"]
    out = torch.empty_like(grad).copy_(grad)
    return out, torch.empty_like(table).zero_(), torch.empty_like(features).copy_(grad[: len(features)])


def check_splice(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    expected = masked_scatter(inputs)
    assert torch.equal(outputs[0], expected[0]), f"{name}: wrong rows"
    assert torch.equal(outputs[2], expected[2]), f"{name}: wrong gradient of the features"
    distance = (outputs[1].double() - expected[1].double()).norm() / expected[1].double().norm()
    assert distance < 1e-2, f"{name}: the gradient of the table is {distance:.1e} off"


def splice_bytes(p: Params) -> Work:
    """Forward reads and writes the tokens; backward reads their gradients, and writes the features' and the table's."""
    element = torch.finfo(getattr(torch, p["dtype"])).bits // 8
    return Work(bytes=element * p["E"] * (3.5 * p["T"] + p["V"]))


SPLICE = Case(
    name="embed_splice fwd+bwd",
    full=[
        {"T": 16384, "E": width, "V": vocabulary, "dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for width, vocabulary in ((1024, 8192), (2048, 32768))
    ],
    quick=[{"T": 4096, "E": 1024, "V": 8192, "dtype": "float32"}],
    setup=setup_splice,
    ours=splice,
    others={
        "embedding + masked_scatter": masked_scatter,
        "embedding + index_put": index_put,
        "copy of the same bytes": splice_floor,
    },
    check=check_splice,
    baseline=("embedding + masked_scatter", "embedding + index_put"),
    work=splice_bytes,
)

# Patches


def setup_images(p: Params, device: torch.device) -> Inputs:
    """Images of side U(64, 384) and varying aspect, as from a native-resolution loader."""
    rng, dtype, side = np.random.default_rng(0), getattr(torch, p["dtype"]), p["patch"]
    images, room = [], p["MiB"] * 2**20 // torch.finfo(dtype).bits * 8
    while room > 0:
        size, aspect = rng.uniform(64, 384), np.exp(rng.normal(0, 0.35) / 2)
        height, width = (max(1, round(s / side)) * side for s in (size * aspect, size / aspect))
        images.append(torch.randn(3, height, width, device=device).to(dtype))
        room -= images[-1].numel()
    return {"images": images, "patch": side}


def patches_in_torch(inputs: Inputs) -> tuple[Tensor]:
    """einops' rearrange per image, then a concatenation."""
    side, rows = inputs["patch"], []
    for image in inputs["images"]:
        channels, height, width = image.shape
        cut = image.view(channels, height // side, side, width // side, side).permute(1, 3, 0, 2, 4)
        rows.append(cut.reshape(-1, channels * side * side))
    return (torch.cat(rows),)


def patches_by_unfold(inputs: Inputs) -> tuple[Tensor]:
    side = inputs["patch"]
    rows = [torch.nn.functional.unfold(image[None], side, stride=side)[0].T for image in inputs["images"]]
    return (torch.cat(rows),)


def check_patches(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    assert "copy" in name or torch.equal(outputs[0], patches_in_torch(inputs)[0]), f"{name}: wrong patches"


PATCHES = Case(
    name="patchify fwd",
    full=[{"patch": 14, "MiB": 128, "dtype": "bfloat16"}, {"patch": 16, "MiB": 128, "dtype": "float32"}],
    quick=[{"patch": 14, "MiB": 32, "dtype": "float32"}],
    setup=setup_images,
    ours=lambda inputs, backend: (patchify(inputs["images"], inputs["patch"], backend=backend)[0],),
    others={
        "permute + cat": patches_in_torch,
        "unfold + cat": patches_by_unfold,
        "copy of the same bytes": lambda inputs: (torch.cat([image.flatten() for image in inputs["images"]]),),
    },
    check=check_patches,
    baseline=("permute + cat",),
    work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
)

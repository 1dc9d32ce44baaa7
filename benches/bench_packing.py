"""Packing: the ops against a copy of the same bytes and plain PyTorch; the planner's bench is bench_planner.py.

python benches/bench_packing.py --help
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Case, Inputs, Work, main
from torch import Tensor

from mmkernels.ops.packing import embed_splice, pack, pad, patchify, segment_pool, unpack
from mmkernels.testing.lengths import lengths_like

Params = Mapping[str, Any]

# The ops. `dtype` decides the bytes of a row; each case moves about `MiB` of them in and as many out.


def rows_of(p: Params) -> int:
    return p["MiB"] * 2**20 // (p["E"] * torch.finfo(getattr(torch, p["dtype"])).bits // 8)


def setup_rows(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    grad_out = torch.randn_like(x)
    index = torch.randperm(rows, device=device)
    return {"x": x.requires_grad_(), "index": index, "grad_out": grad_out}


def with_gradient(out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs["x"], inputs["grad_out"])


def same_bytes(inputs: Inputs) -> tuple[Tensor, ...]:
    """The ceiling: a copy of as many bytes there, and one back."""
    return torch.empty_like(inputs["x"]).copy_(inputs["x"].detach()), inputs["grad_out"].clone()


def check_moved(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0], inputs["x"].detach()[inputs["index"]]), f"{name}: wrong rows"
    assert torch.equal(outputs[1][inputs["index"]], inputs["grad_out"]), f"{name}: wrong gradient"


WIDTHS = [
    {"E": width, "MiB": 256, "dtype": dtype} for dtype in ("bfloat16", "float32") for width in (64, 512, 1024, 4096)
]
QUICK = [{"E": 512, "MiB": 4, "dtype": "bfloat16"}]


def bytes_moved(p: Params) -> Work:
    """Rows read and written, forward and backward."""
    return Work(bytes=4 * p["MiB"] * 2**20)


PACK = Case(
    name="pack fwd+bwd",
    grid=WIDTHS,
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(pack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={
        "index_select": lambda inputs: with_gradient(inputs["x"].index_select(0, inputs["index"]), inputs),
        "x[index]": lambda inputs: with_gradient(inputs["x"][inputs["index"]], inputs),
        "copy of the same bytes": same_bytes,
    },
    check=check_moved,
    baseline="copy of the same bytes",
    work=bytes_moved,
)


def unpack_in_torch(inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["x"]
    return with_gradient(torch.zeros_like(x).index_add(0, inputs["index"], x), inputs)


def check_unpacked(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    if "copy" in name:
        return
    assert torch.equal(outputs[0][inputs["index"]], inputs["x"].detach()), f"{name}: wrong rows"
    assert torch.equal(outputs[1], inputs["grad_out"][inputs["index"]]), f"{name}: wrong gradient"


UNPACK = Case(
    name="unpack fwd+bwd",
    grid=WIDTHS,
    quick=QUICK,
    setup=setup_rows,
    ours=lambda inputs, backend: with_gradient(unpack(inputs["x"], inputs["index"], backend=backend), inputs),
    others={"zeros.index_add": unpack_in_torch, "copy of the same bytes": same_bytes},
    check=check_unpacked,
    baseline="copy of the same bytes",
    work=bytes_moved,
)


def setup_pool(p: Params, device: torch.device) -> Inputs:
    rows = rows_of(p)
    x = torch.randn(rows, p["E"], device=device).to(getattr(torch, p["dtype"]))
    lengths, _ = lengths_like("caption@4096", max(1, rows // 256))
    ends = np.minimum(np.cumsum(lengths), rows)
    ends[-1] = rows
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    grad_out = torch.randn(len(ends), p["E"], device=device).to(x.dtype)
    return {"x": x.requires_grad_(), "cu_seqlens": cu_seqlens, "grad_out": grad_out}


def copy_of_rows(inputs: Inputs) -> tuple[None, None]:
    """The ceiling: a copy reads and writes as many bytes as reading the rows and writing their gradient."""
    torch.empty_like(inputs["x"]).copy_(inputs["x"].detach())
    return None, None


def pool(mode: str, inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    return with_gradient(segment_pool(inputs["x"], inputs["cu_seqlens"], mode, backend=backend), inputs)


def pool_in_torch(mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    offsets = inputs["cu_seqlens"].long()
    return with_gradient(torch.segment_reduce(inputs["x"], mode, offsets=offsets), inputs)


def pool_by_index_add(mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """What most trainers write; it knows no max."""
    x, lengths = inputs["x"], inputs["cu_seqlens"].diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    out = x.new_zeros(len(lengths), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    out = out.index_add(0, segment, x.to(out.dtype)) / lengths.clamp(min=1)[:, None]
    return with_gradient(out.to(x.dtype), inputs)


POOLS = [
    Case(
        name=f"segment_pool {mode} fwd+bwd",
        # Low precision has ties, whose gradient torch shares out and ours gives to the first.
        grid=[p for p in WIDTHS if p["E"] >= 512 and (mode == "mean" or p["dtype"] == "float32")],
        quick=QUICK if mode == "mean" else [{**QUICK[0], "dtype": "float32"}],
        gate={"MiB": 1},
        setup=setup_pool,
        ours=partial(pool, mode),
        plain=partial(pool_in_torch, mode),
        others={"copy of the same bytes": copy_of_rows}
        | ({"index_add": partial(pool_by_index_add, mode)} if mode == "mean" else {}),
        outputs=("out", "grad_x"),
        work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
    )
    for mode in ("mean", "max")
]

# Packed to padded


def setup_pad(p: Params, device: torch.device) -> Inputs:
    inputs = setup_pool(p, device)
    longest = int(inputs["cu_seqlens"].diff().max())
    shape = (len(inputs["cu_seqlens"]) - 1, longest, p["E"])
    return inputs | {"max_seqlen": longest, "grad_padded": torch.randn(shape, device=device).to(inputs["x"].dtype)}


def pad_gradient(out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, [inputs["x"]], inputs["grad_padded"])


def pad_by_index(inputs: Inputs) -> tuple[Tensor, ...]:
    """What flash-attn's bert_padding does."""
    x, cu_seqlens = inputs["x"], inputs["cu_seqlens"].long()
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    at = segment * inputs["max_seqlen"] + torch.arange(len(x), device=x.device) - cu_seqlens[segment]
    out = x.new_zeros(len(lengths) * inputs["max_seqlen"], x.shape[1]).index_copy(0, at, x)
    return pad_gradient(out.view(len(lengths), inputs["max_seqlen"], x.shape[1]), inputs)


def copy_of_padded(inputs: Inputs) -> tuple[None, None]:
    """The ceiling: the rows and as many zeros as there is padding written, and the rows back."""
    x, grad = inputs["x"].detach().view(-1), inputs["grad_padded"].view(-1)
    padded = torch.empty_like(grad)
    padded[: len(x)].copy_(x)
    padded[len(x) :].zero_()
    torch.empty_like(x).copy_(grad[: len(x)])
    return None, None


PAD = Case(
    name="pad fwd+bwd",
    grid=[p for p in WIDTHS if p["E"] >= 512],
    quick=QUICK,
    gate={"MiB": 1},
    setup=setup_pad,
    ours=lambda inputs, backend: pad_gradient(
        pad(inputs["x"], inputs["cu_seqlens"], inputs["max_seqlen"], backend=backend), inputs
    ),
    plain=pad_by_index,
    others={"copy of the same bytes": copy_of_padded},
    peers={"fbgemm_gpu": "padded"},
    outputs=("out", "grad_x"),
    work=bytes_moved,
)

# Tokens: an embedding table and the features of images, spliced.


def setup_splice(p: Params, device: torch.device) -> Inputs:
    """Half of the tokens are images of 64 features each, at random places, as in an interleaved document."""
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
    """The ceiling: a copy of as many bytes as the tokens there, and into a table's and the features' gradients back."""
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
    """Tokens read and written forward; their gradients read, features' and table's written backward."""
    element = torch.finfo(getattr(torch, p["dtype"])).bits // 8
    return Work(bytes=element * p["E"] * (3.5 * p["T"] + p["V"]))


SPLICE = Case(
    name="embed_splice fwd+bwd",
    grid=[
        {"T": 16384, "E": width, "V": vocabulary, "dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for width, vocabulary in ((1024, 8192), (1024, 32768), (2048, 32768))
    ],
    quick=[{"T": 1024, "E": 128, "V": 512, "dtype": "float32"}],
    setup=setup_splice,
    ours=splice,
    others={
        "embedding + masked_scatter": masked_scatter,
        "embedding + index_put": index_put,
        "copy of the same bytes": splice_floor,
    },
    check=check_splice,
    baseline="embedding + masked_scatter",
    work=splice_bytes,
)

# Several sources


def setup_sources(p: Params, device: torch.device) -> Inputs:
    inputs = setup_rows(p, device)
    rows = rows_of(p)
    parts = inputs["x"].detach().split([rows // 2, rows // 4, rows - rows // 2 - rows // 4])
    return inputs | {"parts": [part.clone() for part in parts]}


def check_forward(name: str, outputs: Sequence[Tensor], inputs: Inputs) -> None:
    assert "copy" in name or torch.equal(outputs[0], inputs["x"].detach()[inputs["index"]]), f"{name}: wrong rows"


SOURCES = Case(
    name="pack 3 sources fwd",
    grid=[p for p in WIDTHS if p["E"] >= 512],
    quick=QUICK,
    setup=setup_sources,
    ours=lambda inputs, backend: (pack(inputs["parts"], inputs["index"], backend=backend),),
    others={
        "torch.cat + index_select": lambda inputs: (torch.cat(inputs["parts"]).index_select(0, inputs["index"]),),
        "copy of the same bytes": lambda inputs: (torch.empty_like(inputs["x"]).copy_(inputs["x"].detach()),),
    },
    check=check_forward,
    baseline="torch.cat + index_select",
    work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
)

# Patches


def setup_images(p: Params, device: torch.device) -> Inputs:
    """Images of side U(64, 384) and varying aspect, as a loader at native resolution gives them."""
    rng, dtype, side = np.random.default_rng(0), getattr(torch, p["dtype"]), p["patch"]
    images, room = [], p["MiB"] * 2**20 // torch.finfo(dtype).bits * 8
    while room > 0:
        size, aspect = rng.uniform(64, 384), np.exp(rng.normal(0, 0.35) / 2)
        height, width = (max(1, round(s / side)) * side for s in (size * aspect, size / aspect))
        images.append(torch.randn(3, height, width, device=device).to(dtype))
        room -= images[-1].numel()
    return {"images": images, "patch": side}


def patches_in_torch(inputs: Inputs) -> tuple[Tensor]:
    """einops' rearrange, image by image, and a concatenation."""
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
    grid=[{"patch": patch, "MiB": 128, "dtype": dtype} for patch in (14, 16) for dtype in ("bfloat16", "float32")],
    quick=[{"patch": 14, "MiB": 2, "dtype": "float32"}],
    setup=setup_images,
    ours=lambda inputs, backend: (patchify(inputs["images"], inputs["patch"], backend=backend)[0],),
    others={
        "permute + cat": patches_in_torch,
        "unfold + cat": patches_by_unfold,
        "copy of the same bytes": lambda inputs: (torch.cat([image.flatten() for image in inputs["images"]]),),
    },
    check=check_patches,
    baseline="permute + cat",
    work=lambda p: Work(bytes=2 * p["MiB"] * 2**20),
)


def weighted(inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    x, weights = inputs["x"], inputs["weights"]
    out = segment_pool(x, inputs["cu_seqlens"], "weighted", weights=weights, backend=backend)
    return out, *torch.autograd.grad(out, [x, weights], inputs["grad_out"])


def weighted_in_torch(inputs: Inputs) -> tuple[Tensor, ...]:
    x, weights = inputs["x"], inputs["weights"]
    rows = (x * weights[:, None]).to(x.dtype)
    out = torch.segment_reduce(rows, "sum", offsets=inputs["cu_seqlens"].long())
    return out, *torch.autograd.grad(out, [x, weights], inputs["grad_out"])


def setup_weighted(p: Params, device: torch.device) -> Inputs:
    inputs = setup_pool(p, device)
    # float64 for the gate, where every input is doubled.
    return inputs | {"weights": torch.rand(len(inputs["x"]), device=device).requires_grad_()}


def copy_of_three(inputs: Inputs) -> tuple[None, None, None]:
    """The ceiling: half a copy reads the rows, a whole one reads them again and writes their gradient."""
    x = inputs["x"].detach()
    half = x[: len(x) // 2]
    torch.empty_like(half).copy_(half)
    torch.empty_like(x).copy_(x)
    return None, None, None


WEIGHTED = Case(
    name="segment_pool weighted fwd+bwd",
    grid=[p for p in WIDTHS if p["E"] >= 512],
    quick=QUICK,
    gate={"MiB": 1},
    setup=setup_weighted,
    ours=weighted,
    plain=weighted_in_torch,
    others={"copy of the same bytes": copy_of_three},
    outputs=("out", "grad_x", "grad_weights"),
    work=lambda p: Work(bytes=3 * p["MiB"] * 2**20),
)

if __name__ == "__main__":
    main("packing", [PACK, SOURCES, UNPACK, PAD, *POOLS, WEIGHTED, SPLICE, PATCHES])

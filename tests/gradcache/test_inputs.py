"""GradCache takes any input: how it is split, and the error when it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradcache.toys import Encoder, assert_same, clear, gradients
from torch import Tensor

from mmkernels import GradCache, PackedBatch, segment_pool
from mmkernels.gradcache import Args, Ragged
from mmkernels.testing.contrastive import plain_infonce


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor


class Packed:
    """Ragged samples; only this class knows how to split itself."""

    def __init__(self, samples: list[Tensor]) -> None:
        self.samples = samples

    def split(self, size: int) -> list[Packed]:
        return [Packed(self.samples[i : i + size]) for i in range(0, len(self.samples), size)]


def _by_key(batch: dict[str, Any]) -> Tensor:
    return batch["x"] * batch["nested"]["mask"] * batch["gain"]


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[..., Tensor]]] = {
    "dict": (lambda x, m: {"x": x, "nested": {"mask": m}, "gain": torch.tensor(1.5)}, _by_key),
    "tuple": (lambda x, m: (x, (m, "whole")), lambda t: t[0] * t[1][0] * 1.5),
    "namedtuple": (lambda x, m: Pair(x, m), lambda t: t.x * t.mask * 1.5),
    "args": (lambda x, m: Args(x, mask=m, gain=1.5), lambda x, mask, gain: x * mask * gain),
    "list of samples": (lambda x, m: list(x * m), lambda samples: torch.stack(samples) * 1.5),
    "ragged list": (
        lambda x, m: [row.expand(1 + i % 3, 6) for i, row in enumerate(x * m)],
        lambda samples: torch.stack([sample.mean(0) for sample in samples]) * 1.5,
    ),
    "split method": (lambda x, m: Packed(list(x * m)), lambda packed: torch.stack(packed.samples) * 1.5),
    "packed in a dict": (
        lambda x, m: {"a": Packed(list(x)), "m": m},
        lambda d: torch.stack(d["a"].samples) * d["m"] * 1.5,
    ),
    "lists in a dict": (
        lambda x, m: {"images": [[row, row] for row in x], "m": list(m)},
        lambda d: torch.stack([sum(pair) / 2 * mask for pair, mask in zip(d["images"], d["m"], strict=True)]) * 1.5,
    ),
    "ragged": (
        lambda x, m: Args(
            Ragged((x * m).repeat_interleave(torch.arange(7) % 3 + 1, 0), [1, 2, 3, 1, 2, 3, 1]),
            counts=torch.arange(7) % 3 + 1,
        ),
        lambda rows, counts: torch.stack([part.mean(0) for part in rows.split(counts.tolist())]) * 1.5,
    ),
    "packed batch": (
        lambda x, m: PackedBatch.from_samples([row.expand(1 + i % 3, 6) for i, row in enumerate(x * m)], capacity=20),
        lambda batch: segment_pool(batch.tokens, batch.cu_seqlens, "mean") * 1.5,
    ),
    "array": (lambda x, m: (x * m).numpy(), lambda a: torch.from_numpy(a) * 1.5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_input(shape: str) -> None:
    make, read = SHAPES[shape]
    image, text, x, y = Encoder(), Encoder(), torch.randn(7, 6), torch.randn(7, 6)
    mask = (torch.rand(7, 6) > 0.3).float()
    plain_infonce(image(1.5 * x * mask), text(y)).backward()
    expected = gradients(image, text)
    clear(image, text)
    image.calls.clear()
    step = GradCache([lambda *a, **k: image(read(*a, **k)), text], plain_infonce, chunk_size=[3, 7])
    step(make(x, mask), y)
    assert image.calls == [3, 3, 1] * 2
    assert_same(gradients(image, text), expected)


def test_rows_and_samples_may_differ() -> None:
    """Two keys per sample: M = 2 N."""
    image, text, x, y = Encoder(), Encoder(), torch.randn(5, 6), torch.randn(5, 2, 6)

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(10 * a @ b.T, torch.arange(0, 10, 2))

    loss_fn(image(x), text(y.flatten(0, 1))).backward()
    expected = gradients(image, text)
    clear(image, text)
    GradCache([image, lambda keys: text(keys.flatten(0, 1))], loss_fn, chunk_size=2)(x, y)
    assert_same(gradients(image, text), expected)


ENCODER = Encoder()
X = torch.randn(6, 6)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no encoders": (lambda: GradCache([], plain_infonce, chunk_size=2), TypeError, "encoders: expected a non-empty"),
    "a bare module": (lambda: GradCache(ENCODER, plain_infonce, chunk_size=2), TypeError, "encoders: expected"),
    "not callable": (lambda: GradCache([ENCODER, 3], plain_infonce, chunk_size=2), TypeError, r"encoders\[1\]"),
    "loss": (lambda: GradCache([ENCODER], None, chunk_size=2), TypeError, "loss_fn: expected a callable"),
    "zero chunk": (lambda: GradCache([ENCODER], plain_infonce, chunk_size=0), ValueError, "at least 1, got 0"),
    "float chunk": (lambda: GradCache([ENCODER], plain_infonce, chunk_size=2.0), TypeError, "chunk_size"),
    "chunks": (lambda: GradCache([ENCODER] * 2, plain_infonce, chunk_size=[2]), ValueError, "each of the 2 encoders"),
    "word chunk": (lambda: GradCache([ENCODER], plain_infonce, chunk_size="big"), TypeError, 'an int or "auto"'),
    "budget without auto": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2, memory_budget=1),
        ValueError,
        "memory_budget: expected None, unless a chunk_size is 'auto'",
    ),
    "budget of no size": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size="auto", memory_budget=0),
        ValueError,
        "memory_budget: expected at least 1 byte",
    ),
    "budget in words": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size="auto", memory_budget="1GB"),
        TypeError,
        "memory_budget: expected None or bytes",
    ),
    "token loss": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2, token_loss_fn=3),
        TypeError,
        "token_loss_fn: expected a callable",
    ),
    "group": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2, group="world"),
        TypeError,
        "group: expected a process group",
    ),
    "scale": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2)(X, scale_loss=1024.0),
        TypeError,
        "scale_loss: expected a callable",
    ),
    "ragged values": (lambda: Ragged([X], [6]), TypeError, "values: expected a tensor"),
    "ragged counts": (lambda: Ragged(X, [2, 3]), ValueError, "counts: expected numbers that add up to the rows"),
    "ragged minus": (lambda: Ragged(X, [7, -1]), ValueError, "counts: expected numbers >= 0"),
    "inputs": (lambda: step(X), ValueError, "inputs: expected 2, one per encoder, got 1"),
    "members disagree": (
        lambda: step(Args(X, mask=X[:5]), X),
        ValueError,
        r"inputs\[0\].kwargs\['mask'\]: expected 6 samples like inputs\[0\].args\[0\]",
    ),
    "a list of arguments": (lambda: step({"x": X, "rest": [X, X]}, X), ValueError, "a list has one entry per sample"),
    "nothing to split": (lambda: step(3, X), TypeError, r"inputs\[0\]: expected a tensor"),
    "no way to split": (lambda: step({"x": X, "o": object()}, X), TypeError, r"inputs\[0\]\['o'\]"),
    "output type": (lambda: bad_output(lambda x: (x,)), TypeError, r"encoders\[0\]: output"),
    "output dtype": (lambda: bad_output(lambda x: x.long()), TypeError, r"encoders\[0\]: output"),
    "output shape": (lambda: bad_output(lambda x: x.sum()), ValueError, r"encoders\[0\]: output"),
    "loss type": (lambda: bad_loss(lambda a, b: 3.0), TypeError, "loss_fn: output"),
    "loss shape": (lambda: bad_loss(lambda a, b: a), ValueError, "loss_fn: output"),
    "constant loss": (lambda: bad_loss(lambda a, b: a.detach().sum()), ValueError, "something trainable"),
}


def step(*inputs: Any) -> Any:
    return GradCache([ENCODER, ENCODER], plain_infonce, chunk_size=2)(*inputs)


def bad_output(encoder: Callable[[Tensor], Any]) -> Any:
    return GradCache([encoder, ENCODER], plain_infonce, chunk_size=2)(X, X)


def bad_loss(loss_fn: Callable[..., Any]) -> Any:
    return GradCache([ENCODER, ENCODER], loss_fn, chunk_size=2)(X, X)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


def test_ragged_images_without_any() -> None:
    """Samples without an image, also a whole chunk of them."""
    image, text, y = Encoder(), Encoder(), torch.randn(6, 6)
    counts = [0, 0, 2, 1, 0, 0]
    rows = torch.randn(3, 6)

    def pooled(values: Tensor, counts: Tensor) -> Tensor:
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        return image(torch.zeros(len(counts), 6).index_add(0, owner, values))

    plain_infonce(pooled(rows, torch.tensor(counts)), text(y)).backward()
    expected = gradients(image, text)
    clear(image, text)
    batch = Args(Ragged(rows, counts), torch.tensor(counts))
    GradCache([pooled, text], plain_infonce, chunk_size=2)(batch, y)
    assert_same(gradients(image, text), expected)


def test_array_input_keeps_its_dtype() -> None:
    seen = []

    def encoder(chunk: np.ndarray) -> Tensor:
        seen.append(chunk.dtype)
        return ENCODER(torch.from_numpy(chunk))

    GradCache([encoder, ENCODER], plain_infonce, chunk_size=4)(X.numpy(), X)
    assert seen == [np.dtype(np.float32)] * 4

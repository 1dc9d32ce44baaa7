"""Both passes compute the same: shared random state is replayed, private state is detected."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.nn import InfoNCELoss
from mmkernels.testing.contrastive import plain_infonce


class Noisy(nn.Module):
    """A tower that scales each input feature by a number drawn at every call."""

    def __init__(self, draw: Callable[[tuple[int, ...]], Any]) -> None:
        super().__init__()
        self.tower, self.draw = Encoder(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x * (1 + torch.as_tensor(self.draw(tuple(x.shape)), dtype=x.dtype)))


SHARED = {
    "random": lambda shape: [[random.random() for _ in range(shape[1])] for _ in range(shape[0])],
    "random.gauss": lambda shape: [[random.gauss(0, 1) for _ in range(shape[1])] for _ in range(shape[0])],
    "numpy": np.random.random_sample,
    "numpy, odd normals": lambda shape: np.random.standard_normal(shape) + np.random.standard_normal(),
    "numpy, choice": lambda shape: np.random.choice([0.0, 1.0], shape),
    "torch": torch.rand,
}


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def following() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()


@pytest.mark.parametrize("draw", SHARED.values(), ids=SHARED)
def test_everybodys_generators_are_replayed(draw: Callable[..., Any]) -> None:
    for chunk_size in (4, 11, "auto"):
        towers, inputs = [Noisy(draw), Noisy(draw)], [torch.randn(11, 6), torch.randn(11, 6)]
        cached = GradCache(towers, plain_infonce, chunk_size=chunk_size)
        if chunk_size == "auto":
            cached(*inputs)  # measures; a measurement draws nothing
            clear(*towers)
        seed_all()
        cached(*inputs)
        got, then = gradients(*towers), following()
        clear(*towers)
        seed_all()
        plain_infonce(*chunk_graph(towers, inputs, cached.chunk_sizes)).backward()
        assert_same(got, gradients(*towers))
        assert then == following(), f"chunks of {chunk_size}: generators must stand where one forward leaves them"


def test_the_generators_of_a_token_loss_are_replayed() -> None:
    tower, x = Encoder(), torch.randn(12, 6)

    def token_loss(outputs: list[Any], inputs: list[Any]) -> tuple[Tensor, Tensor]:
        kept = torch.from_numpy(np.random.random_sample(len(outputs[0])) < 0.9)
        keep = kept & torch.tensor([random.random() < 0.5 for _ in outputs[0]])
        return (outputs[0].square().sum(1) * keep * torch.arange(len(keep))).sum(), keep.sum()

    seed_all()
    GradCache([tower], lambda a: a.sum(), chunk_size=4, token_loss_fn=token_loss)(x)
    got = gradients(tower)
    clear(tower)
    seed_all()
    parts = [tower(chunk) for chunk in x.split(4)]
    sums, counts = zip(*(token_loss([part], [None]) for part in parts), strict=True)
    (torch.cat(parts).sum() + sum(sums) / sum(counts)).backward()
    assert_same(got, gradients(tower))


@contextmanager
def swapped_bit_generator() -> Iterator[None]:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(5))
    try:
        yield
    finally:
        np.random.set_bit_generator(before)


def test_another_bit_generator_behind_numpys() -> None:
    towers, inputs = [Noisy(np.random.random_sample)], [torch.randn(11, 6)]
    with swapped_bit_generator():
        GradCache(towers, lambda a: a[:, 0].sum(), chunk_size=4)(*inputs)


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, shape: tuple[int, ...]) -> float:
        self.calls += 1
        return self.calls / 10


def private() -> dict[str, Callable[..., Any]]:
    ours, numpys, pythons = torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)
    return {
        "torch.Generator": lambda shape: torch.rand(shape, generator=ours),
        "numpy.Generator": numpys.random,
        "random.Random": lambda shape: [[pythons.random() for _ in range(shape[1])] for _ in range(shape[0])],
        "a counter": Counter(),
        "a clock": lambda shape: time.perf_counter() * 1e3 % 1,
        "one feature of one row": lambda shape: np.eye(*shape) * (numpys.random() > 0.5) * np.eye(shape[0])[:, :1],
    }


@pytest.mark.parametrize("name", private())
def test_what_is_not_replayed_raises(name: str) -> None:
    quiet, noisy, (x, y) = Encoder(), Noisy(private()[name]), torch.randn(2, 40, 6)
    with pytest.raises(RuntimeError, match=r"encoders\[1\]: chunk \d+ of 10: expected the second pass to match"):
        GradCache([quiet, noisy], plain_infonce, chunk_size=4)(x, y)
    GradCache([quiet, Noisy(private()[name])], plain_infonce, chunk_size=40)(x, y)  # one chunk, one pass
    GradCache([quiet, noisy], plain_infonce, chunk_size=4, check_passes=False)(x, y)


def test_what_is_not_replayed_raises_under_autocast() -> None:
    tower, x = Noisy(private()["numpy.Generator"]), torch.randn(40, 6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"encoders\[0\]: chunk"):
        GradCache([tower], lambda a: a.float().square().sum(), chunk_size=4)(x)


def test_another_number_of_rows_raises() -> None:
    tower, rows = Encoder(), iter(range(4, 20))
    with pytest.raises(RuntimeError, match=r"encoders\[0\]: chunk 1 of 3: expected \[4, 8\] float32 .* got \[7, 8\]"):
        GradCache([lambda x: tower(x.new_ones(next(rows), 6))], lambda a: a.sum(), chunk_size=4)(torch.randn(12, 6))


def test_another_count_of_tokens_raises() -> None:
    tower, own = Encoder(), np.random.default_rng(3)

    def token_loss(outputs: list[Any], inputs: list[Any]) -> tuple[Tensor, int]:
        keep = torch.from_numpy(own.random(len(outputs[0])) < 0.5)
        return outputs[0][keep].square().sum(), int(keep.sum())

    options = {"chunk_size": 20, "token_loss_fn": token_loss}
    with pytest.raises(RuntimeError, match=r"token_loss_fn: count of token_loss in chunk 1 of 3"):
        GradCache([tower], lambda a: a.sum(), **options)(torch.randn(60, 6))
    GradCache([tower], lambda a: a.sum(), check_passes=False, **options)(torch.randn(60, 6))


@pytest.mark.parametrize(
    ("kind", "size", "raises"),
    [("float32", 1e-3, False), ("float32", 0.05, True), ("bfloat16", 0.05, False), ("bfloat16", 0.3, True),
     ("bfloat16 inside", 0.05, False), ("autocast", 0.05, False)],
)  # fmt: skip
def test_roundings_are_no_difference(kind: str, size: float, raises: bool) -> None:
    """Kernels may differ between the passes by rounding: by more where anything is in half precision."""
    tower, calls = Encoder(), iter(range(100))
    if "bfloat16" in kind:
        tower = tower.bfloat16()

    def encoder(x: Tensor) -> Tensor:
        out = tower(x.bfloat16() if "bfloat16" in kind else x) * (1 + size * (next(calls) >= 3))
        return out.float() if kind == "bfloat16 inside" else out

    cached = GradCache([encoder], lambda a: a.float().square().sum(), chunk_size=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if raises:
            with pytest.raises(RuntimeError, match=r"got a relative difference of [\d.]+e-0[12]"):
                cached(torch.randn(12, 6))
        else:
            cached(torch.randn(12, 6))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_what_is_not_finite_is_not_judged(value: float) -> None:
    tower = Encoder()
    cached = GradCache([lambda x: tower(x) * value], lambda a: a.sum(), chunk_size=4)
    assert torch.equal(cached(torch.randn(12, 6)).isfinite(), torch.tensor(value == 0.0))


class _Late(nn.Module):
    """Zeros in the first pass only."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear, self.calls, self.size = nn.Linear(6, 4), 0, size

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.size * (self.calls > 2)


@pytest.mark.parametrize("size", [1e-20, 1.0, 10.0, 1e20])
def test_a_difference_of_any_size_is_seen(size: float) -> None:
    cache = GradCache([_Late(size), nn.Linear(6, 4)], InfoNCELoss(normalize=False), chunk_size=4)
    with pytest.raises(RuntimeError, match="expected the second pass to match the first"):
        cache(torch.randn(8, 6), torch.randn(8, 6))


def test_batch_norm_and_its_statistics() -> None:
    """A chunk's own statistics are the same in both passes; running statistics move once."""
    tower = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    with pytest.warns(UserWarning, match="BatchNorm in training mode"):
        GradCache([tower, tower], plain_infonce, chunk_size=4)(x, y)
    assert tower[1].num_batches_tracked.item() == 6


def test_check_passes_is_a_bool() -> None:
    with pytest.raises(TypeError, match="check_passes: expected True or False, got 1"):
        GradCache([Encoder()], plain_infonce, chunk_size=4, check_passes=1)

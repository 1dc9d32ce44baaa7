"""backward=: a backward that a trainer owns; and batches accumulated with `__call__`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from gradcache.test_auto import Limited
from gradcache.test_loss import Pair, after, batch, same_bits
from gradcache.test_ranks import Dual, _alive, _expected, _inputs
from gradcache.test_tokens import Captioner
from gradcache.test_tokens import batch as words_of
from gradcache.toys import Encoder, assert_same, clear, gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Owner:
    """A trainer's backward, with its own factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, loss: Tensor) -> None:
        assert loss.shape == () and loss.requires_grad
        self.calls += 1
        (loss * self.factor).backward()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [3, [3, 11], 11])
def test_equals_torchs_backward(size: Any) -> None:
    pair, inputs = Pair(0.3), batch()
    expected = after(pair, lambda: pair.cache(size)(*inputs))
    owner = Owner()
    same_bits(after(pair, lambda: pair.cache(size, backward=owner)(*inputs)), expected)
    assert owner.calls == {"3": 9, "[3, 11]": 6, "11": 2}[str(size)], "each chunk, and the loss's parameter"
    same_bits(after(pair, lambda: pair.cache(size, backward=Owner(0.25))(*inputs)), [grad / 4 for grad in expected])


@pytest.mark.parametrize("size", [1, 4, 64])
def test_with_token_losses(size: int) -> None:
    image, text = Encoder(dropout=0.3), Captioner(0.3)
    x, words = words_of()
    found = []
    for options in ({}, {"backward": Owner(0.5)}):
        clear(image, text)
        torch.manual_seed(5)
        GradCache([image, text], plain_infonce, chunk_size=size, token_loss_fn=text.token_loss, **options)(x, words)
        found.append(gradients(image, text))
    assert_same([2 * grad for grad in found[1]], found[0])


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_in_half_precision(kind: str) -> None:
    image, text, inputs = Encoder(dropout=0.3), Encoder(20), [torch.randn(11, 6), torch.randn(11, 6)]
    if kind == "bfloat16":
        image, text, inputs = image.bfloat16(), text.bfloat16(), [x.bfloat16() for x in inputs]
    found = []
    for options in ({}, {"backward": Owner(2.0**10)}):
        clear(image, text)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            GradCache([image, text], plain_infonce, chunk_size=4, **options)(*inputs)
        found.append(gradients(image, text))
    assert all(torch.equal(a, b * 2.0**10) for a, b in zip(found[1], found[0], strict=True))


def test_a_scaler_and_a_backward() -> None:
    """`scale_loss` scales everything; a backward that scales by itself needs none."""
    pair = Pair()
    inputs = batch()
    expected = after(pair, lambda: pair.cache()(*inputs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = after(pair, lambda: pair.cache(backward=Owner())(*inputs, scale_loss=scaler.scale))
    same_bits([grad / 1024 for grad in scaled], expected)
    scaled = after(pair, lambda: pair.cache(backward=lambda loss: scaler.scale(loss).backward())(*inputs))
    same_bits([grad / 1024 for grad in scaled], expected)


def test_with_automatic_sizes_when_memory_runs_out() -> None:
    image, text = Limited("backward", 5).eval(), Encoder()
    inputs = [torch.randn(48, 6), torch.randn(48, 6)]
    cache = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=8000, backward=Owner())
    cache(*inputs)
    clear(image, text)
    image.armed = True
    cache(*inputs)
    assert image.hits > 0 and cache.chunk_sizes[0] <= 5
    actual = gradients(image, text)
    clear(image, text)
    plain_infonce(image(inputs[0][:5]), text(inputs[1][:5]))  # still armed
    image.armed = False
    plain_infonce(image(inputs[0]), text(inputs[1])).backward()
    assert_same(actual, gradients(image, text), 3e-6)


def _ddp(rank: int, world: int) -> None:
    model = Dual()
    sizes: Callable[[int], list[int]] = lambda r: [3, 2 + r]  # noqa: E731
    expected = _expected(model, world, sizes)
    wrapper = DistributedDataParallel(model)
    _alive.append(wrapper)
    encoders = [functools.partial(wrapper, which) for which in ("image", "text")]
    cache = GradCache(encoders, model.loss, chunk_size=sizes(rank), group=dist.group.WORLD, backward=Owner())
    for _ in range(2):
        clear(model)
        torch.manual_seed(5 + rank)
        cache(*_inputs(world)[rank])
        assert_same(gradients(model), expected)


def test_over_ranks() -> None:
    ranks.run(2, _ddp)


def test_mistakes() -> None:
    pair, inputs = Pair(), batch()
    with pytest.raises(TypeError, match="backward: expected None or a callable, got 'engine'"):
        pair.cache(backward="engine")
    with pytest.raises(RuntimeError, match="backward: expected a function that runs the backward of the loss"):
        pair.cache(backward=lambda loss: None)(*inputs)
    with pytest.raises(ValueError, match="backward: expected None for as_loss, whose backward is the trainer's"):
        pair.cache(backward=Owner()).as_loss()
    with pytest.raises(ValueError, match="a loss that depends on something trainable"):
        GradCache([pair.image], lambda a: torch.ones(()), chunk_size=3, backward=Owner())(inputs[0])


# Accumulated batches


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("count", [1, 3])
def test_the_mean_over_accumulated_batches(count: int) -> None:
    pair, batches = Pair(0.3), [batch() for _ in range(count)]
    plain = after(pair, lambda: sum(pair.plain(*each, sizes=(3, 4)) / count for each in batches).backward())
    cache = pair.cache([3, 4])

    def run() -> None:
        for each in batches:
            cache(*each, scale_loss=lambda loss: loss / count)

    assert_same(after(pair, run), plain, 1e-12)


def test_clipping_and_optimizer_step_after_accumulation() -> None:
    pair, batches = Pair(), [batch() for _ in range(2)]
    start, ends = {name: p.clone() for name, p in pair.state_dict().items()}, []
    for cached in (False, True):
        pair.load_state_dict(start)
        optimizer = torch.optim.AdamW(pair.parameters(), lr=0.01)
        for _ in range(3):
            for each in batches:
                if cached:
                    pair.cache()(*each, scale_loss=lambda loss: loss / 2)
                else:
                    (pair.plain(*each) / 2).backward()
            nn.utils.clip_grad_norm_(pair.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in pair.parameters()])
    assert_same(ends[1], ends[0], 2e-5)

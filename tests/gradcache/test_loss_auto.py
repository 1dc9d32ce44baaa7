"""GradCache.as_loss with automatic sizes and with token losses."""

from __future__ import annotations

from typing import Any

import pairwise
import pytest
import torch
from gradcache.test_auto import ERRORS, Limited
from gradcache.test_tokens import Captioner
from gradcache.test_tokens import batch as words_of
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


@pytest.mark.parametrize("budget", [4000, 10**9])
def test_sizes_are_those_of_the_call(budget: int) -> None:
    image, text = Encoder(dropout=0.3), Encoder(20, dropout=0.3)
    inputs = [torch.randn(50, 6), torch.randn(50, 6)]
    found = []
    for deferred in (False, True):
        cache = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=budget)
        for _ in range(2):
            clear(image, text)
            torch.manual_seed(5)
            if deferred:
                cache.as_loss()(*inputs).backward()
            else:
                cache(*inputs)
        found.append((cache.chunk_sizes, gradients(image, text)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.filterwarnings("ignore:.*BatchNorm in training mode")
@pairwise.cases(where=("first", "again", "backward"), accumulating=(False, True), error=ERRORS)
def test_memory_runs_out(where: str, accumulating: bool, error: str) -> None:
    """In the forward or in the backward: the gradient is that of chunks of the new sizes, BatchNorm moves once."""
    image, text = Limited(where, 5, ERRORS[error]), Encoder(dropout=0.2)
    inputs, scale = [torch.randn(48, 6), torch.randn(48, 6)], nn.Parameter(torch.tensor(2.0))

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a, b, scale.exp())

    def everything() -> list[Tensor]:
        return [*gradients(image, text), scale.grad.clone()]

    cache = GradCache([image, text], loss_fn, chunk_size="auto", memory_budget=8000)
    cache.as_loss()(*inputs).backward()
    before = list(cache.chunk_sizes)
    if not accumulating:
        clear(image, text)
        scale.grad = None
    earlier = everything() if accumulating else None
    image.armed = True
    torch.manual_seed(7)
    moved = image.norm.num_batches_tracked.item()
    loss = cache.as_loss()(*inputs)
    torch.manual_seed(8)
    between = torch.get_rng_state()
    (loss / 4).backward()
    assert torch.equal(torch.get_rng_state(), between)
    assert image.hits > 0 and before[0] > 10
    assert cache.chunk_sizes[0] <= 5 and cache.chunk_sizes[1] == before[1]
    steps = -(-48 // (cache.chunk_sizes[0] if where == "first" else before[0]))
    assert image.norm.num_batches_tracked.item() - moved == steps, "those of the forward"
    actual = everything()

    image.armed = False
    clear(image, text)
    scale.grad = None
    torch.manual_seed(7)
    (loss_fn(*chunk_graph([image, text], inputs, cache.chunk_sizes)) / 4).backward()
    target = everything() if earlier is None else [a + b for a, b in zip(earlier, everything(), strict=True)]
    large = [i for i, g in enumerate(target) if g.norm() > 1e-5]  # BatchNorm leaves a bias before it nothing
    assert len(large) == len(target) - 1
    assert_same([actual[i] for i in large], [target[i] for i in large], 3e-6)


def test_interleaved_when_memory_runs_out() -> None:
    image, text = Limited("backward", 5).eval(), Encoder()
    batches = [[torch.randn(48, 6), torch.randn(48, 6)] for _ in range(2)]
    cache = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=8000)
    losses = [cache.as_loss()(*each) for each in batches]
    image.armed = True
    for loss in losses:
        loss.backward()
    assert image.hits > 1 and cache.chunk_sizes[0] <= 5
    actual = gradients(image, text)
    clear(image, text)
    image.armed = False
    for x, y in batches:
        plain_infonce(image(x), text(y)).backward()
    assert_same(actual, gradients(image, text), 3e-6)


def test_what_never_fits_leaves_nothing() -> None:
    image, text = Limited("again", 0).eval(), Encoder()
    cache = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=8000)
    inputs = [torch.randn(48, 6), torch.randn(48, 6)]
    loss = cache.as_loss()(*inputs)
    image.armed = True
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
        loss.backward()
    assert all(p.grad is None for p in (*image.parameters(), *text.parameters()))


@pytest.mark.parametrize("size", [1, 4, 64, "auto"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_token_losses(size: Any, dropout: float) -> None:
    image, text = Encoder(dropout=dropout), Captioner(dropout)
    x, words = words_of()
    log_scale = nn.Parameter(torch.tensor(1.0))

    def loss_fn(a: Tensor, b: Tensor) -> tuple[Tensor, str]:
        return plain_infonce(a, b, log_scale.exp()), "more"

    found = []
    for deferred in (False, True):
        budget = {"memory_budget": 4000} if size == "auto" else {}
        cache = GradCache([image, text], loss_fn, chunk_size=size, token_loss_fn=text.token_loss, **budget)
        clear(image, text)
        log_scale.grad = None
        torch.manual_seed(5)
        if deferred:
            loss, more, parts = cache.as_loss()(x, words)
            assert loss.requires_grad and not any(part.requires_grad for part in parts.values())
            (loss / 4).backward()
        else:
            loss, more, parts = cache(x, words, scale_loss=lambda loss: loss / 4)
        assert more == "more"
        found.append((loss.detach(), parts, [*gradients(image, text), log_scale.grad]))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_token_losses_without_gradients_and_alone() -> None:
    image, text = Encoder().requires_grad_(False), Captioner()
    x, words = words_of()
    cache = GradCache([image, text], lambda a, b: torch.zeros(()), chunk_size=4, token_loss_fn=text.token_loss)
    with torch.no_grad():
        quiet, parts = cache.as_loss()(x, words)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, sum(parts.values()))
    loss, _ = cache.as_loss()(x, words)
    torch.testing.assert_close(loss.detach(), quiet)
    loss.backward()
    actual = gradients(text)
    clear(text)
    cache(x, words)
    assert_same(actual, gradients(text))

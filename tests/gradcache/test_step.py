"""GradCache: the gradient is the whole batch's, whatever the encoders, the loss and the chunks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels import GradCache, infonce, siglip
from mmkernels.testing.contrastive import plain_infonce


@pytest.mark.parametrize("sizes", [1, 3, 4, 11, 64, [2, 5], [11, 3]])
def test_equals_the_full_batch(sizes: Any) -> None:
    image, text = Encoder(), Encoder(20)
    x, y = torch.randn(11, 6), torch.randn(11, 6)
    loss = plain_infonce(image(x), text(y))
    loss.backward()
    expected = gradients(image, text)
    clear(image, text)
    cached = GradCache([image, text], plain_infonce, chunk_size=sizes)(x, y)
    assert not cached.requires_grad
    torch.testing.assert_close(cached, loss.detach())
    assert_same(gradients(image, text), expected)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_with_the_losses_of_this_package(loss: str) -> None:
    image, text = Encoder(), Encoder(20)
    scale, bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-3.0))
    x, y = torch.randn(11, 6), torch.randn(11, 6)

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return infonce(a, b, scale) if loss == "infonce" else siglip(a, b, scale, bias)

    plain = loss_fn(image(x), text(y))
    plain.backward()
    own = [p for p in (scale, bias) if p.grad is not None]
    assert len(own) == (1 if loss == "infonce" else 2)
    expected = [*gradients(image, text), *(p.grad.clone() for p in own)]
    clear(image, text)
    for p in own:
        p.grad = None
    cached = GradCache([image, text], loss_fn, chunk_size=[3, 4])(x, y)
    torch.testing.assert_close(cached, plain.detach())
    assert_same([*gradients(image, text), *(p.grad for p in own)], expected)


@pytest.mark.parametrize("sizes", [[1, 1], [4, 4], [3, 7]])
def test_dropout_is_replayed(sizes: list[int]) -> None:
    encoders = [Encoder(dropout=0.4), Encoder(20, dropout=0.2)]
    inputs = [torch.randn(11, 6), torch.randn(11, 6)]
    torch.manual_seed(5)
    plain_infonce(*chunk_graph(encoders, inputs, sizes)).backward()
    expected, following = gradients(*encoders), torch.rand(3)
    clear(*encoders)
    torch.manual_seed(5)
    GradCache(encoders, plain_infonce, chunk_size=sizes)(*inputs)
    assert_same(gradients(*encoders), expected)
    assert torch.equal(torch.rand(3), following), "the generator must stand where one forward leaves it"


def test_random_numbers_of_the_loss_are_not_replayed_into_the_encoders() -> None:
    encoders, inputs = [Encoder(dropout=0.4), Encoder(dropout=0.4)], [torch.randn(9, 6), torch.randn(9, 6)]

    def noisy(a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a + 0.1 * torch.randn_like(a), b)

    torch.manual_seed(5)
    noisy(*chunk_graph(encoders, inputs, [4, 4])).backward()
    expected = gradients(*encoders)
    clear(*encoders)
    torch.manual_seed(5)
    GradCache(encoders, noisy, chunk_size=4)(*inputs)
    assert_same(gradients(*encoders), expected)


def test_tied_encoders() -> None:
    tower, x, y = Encoder(), torch.randn(10, 6), torch.randn(10, 6)
    plain_infonce(tower(x), tower(y)).backward()
    expected = gradients(tower)
    clear(tower)
    GradCache([tower, tower], plain_infonce, chunk_size=[3, 4])(x, y)
    assert_same(gradients(tower), expected)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.forward, lambda m: functools.partial(m, gain=1.0)])
def test_frozen_encoder(wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    image, text = Encoder(), Encoder().requires_grad_(False)
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    plain_infonce(image(x), text(y)).backward()
    expected = gradients(image)
    clear(image)
    text.calls.clear()
    GradCache([image, wrap(text)], plain_infonce, chunk_size=2)(x, y)
    assert_same(gradients(image), expected)
    if isinstance(wrap(text), functools.partial):  # found only by trying
        assert 5 < len(text.calls) <= 7
    else:
        assert text.calls == [2] * 5


def test_frozen_encoder_with_an_input_that_learns() -> None:
    image, prompt = Encoder().requires_grad_(False), torch.randn(10, 6, requires_grad=True)
    text, y = Encoder(), torch.randn(10, 6)
    (expected,) = torch.autograd.grad(plain_infonce(image(prompt), text(y)), prompt)
    GradCache([image, text], plain_infonce, chunk_size=4)(prompt, y)
    assert prompt.grad is not None
    assert_same([prompt.grad], [expected])


def test_loss_with_parameters_and_further_output() -> None:
    image, text, log_scale = Encoder(), Encoder(), nn.Parameter(torch.tensor(2.0))
    x, y = torch.randn(10, 6), torch.randn(10, 6)

    def loss_fn(a: Tensor, b: Tensor) -> tuple[Tensor, str]:
        return plain_infonce(a, b, log_scale.exp()), "more"

    loss_fn(image(x), text(y))[0].backward()
    expected, scale_grad = gradients(image, text), log_scale.grad.clone()
    clear(image, text)
    log_scale.grad = None
    loss, more = GradCache([image, text], loss_fn, chunk_size=3)(x, y)
    assert more == "more"
    assert not loss.requires_grad
    assert_same([*gradients(image, text), log_scale.grad], [*expected, scale_grad])


def test_gradients_accumulate_and_scale_loss() -> None:
    image, text = Encoder(), Encoder()
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    plain_infonce(image(x), text(y)).backward()
    expected = gradients(image, text)
    clear(image, text)
    step = GradCache([image, text], plain_infonce, chunk_size=3)
    losses = [step(x, y, scale_loss=lambda loss: loss / 4) for _ in range(4)]
    assert_same(gradients(image, text), expected, 3e-6)
    torch.testing.assert_close(losses[0], plain_infonce(image(x), text(y)).detach())


def test_grad_scaler() -> None:
    image, text = Encoder(), Encoder()
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    plain_infonce(image(x), text(y)).backward()
    expected = gradients(image, text)
    clear(image, text)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([*image.parameters(), *text.parameters()])
    GradCache([image, text], plain_infonce, chunk_size=3)(x, y, scale_loss=scaler.scale)
    assert_same([grad / 1024 for grad in gradients(image, text)], expected)
    scaler.unscale_(optimizer)
    assert_same(gradients(image, text), expected)


def test_single_sample_and_three_encoders() -> None:
    towers, inputs = [Encoder() for _ in range(3)], [torch.randn(6, 6) for _ in range(3)]

    def loss_fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return plain_infonce(a, b) + (b * c).sum() + (a * c).mean() + a.sum()

    for rows in (6, 1):
        cut = [value[:rows] for value in inputs]
        clear(*towers)
        loss_fn(*(tower(value) for tower, value in zip(towers, cut, strict=True))).backward()
        expected = gradients(*towers)
        clear(*towers)
        GradCache(towers, loss_fn, chunk_size=[1, 2, 6])(*cut)
        assert_same(gradients(*towers), expected, 2e-6)


def test_one_chunk_takes_one_forward() -> None:
    image, text = Encoder(), Encoder()
    GradCache([image, text], plain_infonce, chunk_size=8)(torch.randn(8, 6), torch.randn(8, 6))
    assert image.calls == text.calls == [8]


def test_an_embedding_that_the_loss_ignores() -> None:
    image, text = Encoder(), Encoder()
    GradCache([image, text], lambda a, b: a.sum(), chunk_size=2)(torch.randn(4, 6), torch.randn(4, 6))
    assert all(p.grad is None for p in text.parameters())
    assert all(p.grad is not None for p in image.parameters())


def test_activation_memory_is_one_chunk() -> None:
    """What autograd saves at a time in pass 3 does not grow with the batch."""
    image, text = Encoder(), Encoder()
    peaks = []
    for rows in (16, 64):
        live, peak = 0, 0

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal live, peak
                self.tensor, self.size = tensor, tensor.numel() if tensor.ndim > 1 and len(tensor) == 4 else 0
                live += self.size
                peak = max(peak, live)

            def __del__(self) -> None:
                nonlocal live
                live -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            GradCache([image, text], plain_infonce, chunk_size=4)(torch.randn(rows, 6), torch.randn(rows, 6))
        peaks.append(peak)
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_encoder(reentrant: bool) -> None:
    image, text = Encoder(dropout=0.3), Encoder()
    x, y = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
    checkpointed = functools.partial(checkpoint, image, use_reentrant=reentrant)
    torch.manual_seed(5)
    GradCache([image, text], plain_infonce, chunk_size=3)(x, y)
    expected = gradients(image, text)
    clear(image, text)
    torch.manual_seed(5)
    GradCache([checkpointed, text], plain_infonce, chunk_size=3)(x, y)
    assert_same(gradients(image, text), expected)


def test_batch_norm_is_warned_about_once_and_moves_once() -> None:
    norm = nn.BatchNorm1d(6)
    image, text = nn.Sequential(norm, Encoder()), Encoder()
    step = GradCache([image, text], plain_infonce, chunk_size=4)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    with pytest.warns(UserWarning, match=r"encoders\[0\]: BatchNorm in training mode"):
        step(x, y)
    mean = torch.zeros(6)
    for chunk in x.split(4):
        mean = 0.9 * mean + 0.1 * chunk.mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    assert norm.num_batches_tracked == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, y)
        image.eval()
        GradCache([image, text], plain_infonce, chunk_size=4)(x, y)


def hinge(a: Tensor, b: Tensor) -> Tensor:
    """Frome et al. 2013: every wrong key should be less similar than the right one by a margin."""
    similarity = a @ b.T
    return (0.1 + similarity - similarity.diagonal()[:, None]).clamp(min=0).sum() / len(a)


def cca(a: Tensor, b: Tensor) -> Tensor:
    """Minus the total canonical correlation: each gradient depends on every row."""
    a, b = a - a.mean(0), b - b.mean(0)

    def whitened(x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(x.T @ x / len(x) + 1e-3 * torch.eye(x.shape[1]))
        return x @ (vectors * values.rsqrt()) @ vectors.T

    return -torch.linalg.matrix_norm(whitened(a).T @ whitened(b) / len(a), "nuc")


class Cycle(nn.Module):
    """Two maps between the spaces, each the inverse of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        there, back = F.mse_loss(self.there(a), b), F.mse_loss(self.back(self.there(a)), a)
        return there + back, {"there": there.detach(), "back": back.detach()}


@pytest.mark.parametrize("kind", ["hinge", "cca", "cycle"])
def test_any_loss_of_embeddings(kind: str) -> None:
    """In float64: the canonical correlation is ill-conditioned, and the sum over chunks has another order."""
    image, text = Encoder(dropout=0.2).double(), Encoder(20).double()
    torch.set_default_dtype(torch.float64)
    try:
        loss_fn = {"hinge": hinge, "cca": cca, "cycle": Cycle()}[kind]
        own = [loss_fn] if isinstance(loss_fn, nn.Module) else []
        inputs = [torch.randn(13, 6), torch.randn(13, 6)]
        torch.manual_seed(5)
        output = loss_fn(*chunk_graph([image, text], inputs, [4, 13]))
        (output[0] if isinstance(output, tuple) else output).backward()
        expected = gradients(image, text, *own)
        clear(image, text, *own)
        torch.manual_seed(5)
        cached = GradCache([image, text], loss_fn, chunk_size=[4, 13])(*inputs)
        torch.testing.assert_close(cached, (output[0].detach(), *output[1:]) if own else output.detach())
        assert_same(gradients(image, text, *own), expected, 1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


class Outcome(NamedTuple):
    loss: Tensor
    logits: Tensor


def test_further_output_keeps_its_type_and_no_graph() -> None:
    image, text = Encoder(), Encoder()
    inputs = torch.randn(6, 6), torch.randn(6, 6)
    for size in (2, 6):
        out = GradCache([image, text], lambda a, b: Outcome(plain_infonce(a, b), a @ b.T), chunk_size=size)(*inputs)
        assert isinstance(out, Outcome)
        assert not out.loss.requires_grad and not out.logits.requires_grad


def test_compiled_encoders() -> None:
    """A compiled module and a compiled function; the last chunk is shorter."""
    torch._dynamo.reset()
    backend = "aot_eager"
    encoders = [Encoder(dropout=0.3), Encoder(20)]
    inputs = [torch.randn(10, 6), torch.randn(10, 6)]
    layers = [torch.compile(encoder.layers, backend=backend) for encoder in encoders]
    run = [layers[0], torch.compile(lambda x: F.normalize(layers[1](x), dim=-1), backend=backend)]
    torch.manual_seed(5)
    plain_infonce(*chunk_graph(run, inputs, [4, 3])).backward()
    expected = gradients(*encoders)
    clear(*encoders)
    torch.manual_seed(5)
    GradCache(run, plain_infonce, chunk_size=[4, 3])(*inputs)
    assert_same(gradients(*encoders), expected)


def test_no_samples_at_all() -> None:
    """A rank without data: no gradient from its samples, but the same step as the others."""
    image, text = Encoder(), Encoder()
    loss = GradCache([image, text], lambda a, b: infonce(a, b, 10.0), chunk_size=2)(
        torch.empty(0, 6), torch.empty(0, 6)
    )
    assert loss == 0
    assert all(not g.any() for g in gradients(image, text))


@pytest.mark.gpu
def test_cuda_generators_are_replayed() -> None:
    encoders = [Encoder(dropout=0.4).cuda(), Encoder(20, dropout=0.2).cuda()]
    inputs = [torch.randn(11, 6, device="cuda"), torch.randn(11, 6, device="cuda")]

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(10 * a @ b.T, torch.arange(len(a), device="cuda"))

    torch.manual_seed(5)
    loss_fn(*chunk_graph(encoders, inputs, [4, 4])).backward()
    expected = gradients(*encoders)
    clear(*encoders)
    torch.manual_seed(5)
    GradCache(encoders, loss_fn, chunk_size=4)(*inputs)
    assert_same(gradients(*encoders), expected)


@pytest.mark.parametrize(("size", "told"), [(2, [0, 1]), (5, [0, 1]), ("auto", [0, 1])])
def test_tells_of_embeddings_before_the_next_encoder_runs(size: Any, told: list[int]) -> None:
    first, second = Encoder(), Encoder(20)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    seen: list[Any] = []

    def runs(chunk: Tensor) -> Tensor:
        seen.append("runs")
        return second(chunk)

    def heard(number: int, rows: Tensor) -> None:
        assert not rows.requires_grad
        torch.testing.assert_close(rows, (first, second)[number]((x, y)[number]).detach())
        seen.append(number)

    budget = {"memory_budget": 10**9} if size == "auto" else {}
    step = GradCache([first, runs], plain_infonce, chunk_size=size, on_embedded=heard, **budget)
    for _ in range(2):  # automatic sizes are measured in the first
        seen.clear()
        step(x, y)
    assert [each for each in seen if each != "runs"] == told
    assert size == "auto" or seen[0] == 0, "before the second runs"


def test_on_embedded_is_checked() -> None:
    with pytest.raises(TypeError, match="on_embedded: expected None or a callable, got 3"):
        GradCache([Encoder()], plain_infonce, chunk_size=2, on_embedded=3)  # type: ignore[arg-type]

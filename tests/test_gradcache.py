"""GradCache: the gradient is the whole batch's, whatever the encoders, the inputs and the chunks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mmkernels import infonce, siglip
from mmkernels.gradcache import Args, GradCache


def plain_infonce(queries: Tensor, keys: Tensor, scale: Tensor | float = 10.0) -> Tensor:
    logits = scale * queries @ keys.T
    targets = torch.arange(len(queries))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Encoder(nn.Module):
    """A small tower; counts its calls."""

    def __init__(self, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 8))
        self.calls: list[int] = []

    def forward(self, x: Tensor, gain: float = 1.0, mask: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        x = x if mask is None else x * mask
        return F.normalize(gain * self.layers(x), dim=-1)


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """The relative distance of each gradient."""
    assert len(actual) == len(expected) > 0
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        distance = (a - b).norm() / b.norm()
        assert distance <= tolerance, f"gradient {i}: relative distance {distance:.2e}"


def chunk_graph(encoders: list[nn.Module], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """All chunks in the order of pass 1, in one graph."""
    return [
        torch.cat([encoder(chunk) for chunk in value.split(size)])
        for encoder, value, size in zip(encoders, inputs, sizes, strict=True)
    ]


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
    if isinstance(wrap(text), functools.partial):  # known only by trying
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


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_is_the_same_in_both_passes(cache_enabled: bool) -> None:
    image, text = Encoder(), Encoder()
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    seen: list[torch.dtype] = []
    image.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
        embeddings = chunk_graph([image, text], [x, y], [4, 4])
        loss = plain_infonce(*embeddings)
    loss.backward()
    expected = gradients(image, text)
    clear(image, text)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
        cached = GradCache([image, text], plain_infonce, chunk_size=4)(x, y)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled() == cache_enabled
    assert seen == [torch.bfloat16] * 6
    assert torch.equal(cached, loss.detach())
    # A weight's gradient is summed over chunks in bfloat16 in one graph, and in float32 here.
    assert_same(gradients(image, text), expected, 2e-2)


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor


class Packed:
    """Ragged samples: only it knows how to split itself."""

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


def test_checkpointed_encoder() -> None:
    image, text = Encoder(dropout=0.3), Encoder()
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, image, use_reentrant=False)
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


def _dual_model() -> tuple[nn.Module, nn.Module, nn.Module, nn.Parameter]:
    class Dual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = Encoder(), Encoder(20)
            self.log_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, which: str, x: Tensor) -> Tensor:
            return self.image(x) if which == "image" else self.text(x)

    torch.manual_seed(0)
    model = Dual()
    return model, model.image, model.text, model.log_scale


def _ddp_worker(rank: int, world: int, shared: bool) -> None:
    model, image, text, log_scale = _dual_model()
    x, y = torch.randn(world, 7, 6), torch.randn(world, 7, 6)

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a, b, log_scale.exp())

    expected = []
    for r in range(world):
        loss_fn(image(x[r]), text(y[r])).backward()
    expected = [grad / world for grad in gradients(model)]
    clear(model)

    reductions = 0

    def count(state, bucket):  # unannotated: DDP reads annotations, not strings
        nonlocal reductions
        reductions += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    encoders: list[Callable[..., Tensor]]
    if shared:
        wrapper = nn.parallel.DistributedDataParallel(model)
        wrapper.register_comm_hook(None, count)
        encoders = [functools.partial(wrapper, "image"), functools.partial(wrapper, "text")]
    else:
        wrappers = [nn.parallel.DistributedDataParallel(m) for m in (image, text)]
        for each in wrappers:
            each.register_comm_hook(None, count)
        encoders = list(wrappers)
    step = GradCache(encoders, loss_fn, chunk_size=[3, 2 + rank])  # ranks differ in chunks
    for _ in range(2):  # a second step fails if the first left a reducer waiting
        clear(model)
        before = reductions
        step(x[rank], y[rank])
        assert reductions - before == (1 if shared else 2), "one bucket per wrapper, reduced once"
    if not shared:  # the scale is in no wrapper: its reduction is the caller's
        dist.all_reduce(log_scale.grad)
        log_scale.grad /= world
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_ddp_reduces_once(shared: bool, tmp_path: Any) -> None:
    ranks.run(_ddp_worker, 2, tmp_path, shared)


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


ENCODER = Encoder()
X = torch.randn(6, 6)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no encoders": (lambda: GradCache([], plain_infonce, chunk_size=2), TypeError, "encoders: expected a non-empty"),
    "a bare module": (lambda: GradCache(ENCODER, plain_infonce, chunk_size=2), TypeError, "encoders: expected"),
    "not callable": (lambda: GradCache([ENCODER, 3], plain_infonce, chunk_size=2), TypeError, r"encoders\[1\]"),
    "loss": (lambda: GradCache([ENCODER], None, chunk_size=2), TypeError, "loss_fn: expected a callable"),
    "zero chunk": (lambda: GradCache([ENCODER], plain_infonce, chunk_size=0), ValueError, "at least 1, got 0"),
    "float chunk": (lambda: GradCache([ENCODER], plain_infonce, chunk_size=2.0), TypeError, "chunk_size"),
    "chunks": (lambda: GradCache([ENCODER] * 2, plain_infonce, chunk_size=[2]), ValueError, "the 2 encoders"),
    "auto": (lambda: GradCache([ENCODER], plain_infonce, chunk_size="auto"), NotImplementedError, "chunk_size"),
    "budget": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2, memory_budget=1),
        NotImplementedError,
        "memory_budget",
    ),
    "token loss": (
        lambda: GradCache([ENCODER], plain_infonce, chunk_size=2, token_loss_fn=plain_infonce),
        NotImplementedError,
        "token_loss_fn",
    ),
    "inputs": (lambda: step(X), ValueError, "inputs: expected 2, one per encoder, got 1"),
    "members disagree": (
        lambda: step(Args(X, mask=X[:5]), X),
        ValueError,
        r"inputs\[0\].kwargs\['mask'\]: expected 6 samples like inputs\[0\].args\[0\]",
    ),
    "a list of arguments": (lambda: step({"x": X, "rest": [X, X]}, X), ValueError, "a list holds one entry a sample"),
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


def test_array_input_keeps_its_dtype() -> None:
    seen = []

    def encoder(chunk: np.ndarray) -> Tensor:
        seen.append(chunk.dtype)
        return ENCODER(torch.from_numpy(chunk))

    GradCache([encoder, ENCODER], plain_infonce, chunk_size=4)(X.numpy(), X)
    assert seen == [np.dtype(np.float32)] * 4

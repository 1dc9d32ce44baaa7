"""GradCache.as_loss: the backward is the trainer's, whenever it comes, and gives what `__call__` gives."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Pair(nn.Module):
    """Two towers and the scale of their loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image, self.text = Encoder(dropout=dropout), Encoder(20, dropout=dropout)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a, b, self.log_scale.exp())

    def cache(self, size: Any = 3, **options: Any) -> GradCache:
        return GradCache([self.image, self.text], self.loss, chunk_size=size, **options)

    def plain(self, *inputs: Tensor, sizes: Any = (11, 11)) -> Tensor:
        return self.loss(*chunk_graph([self.image, self.text], list(inputs), sizes))


def batch(rows: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randn(rows, 6)


def after(pair: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    clear(pair)
    torch.manual_seed(5)
    run()
    return gradients(pair)


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("sizes", [[1, 1], [3, 3], [11, 3], [11, 11], [64, 64]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_call_and_the_plain_step(sizes: list[int], dropout: float) -> None:
    pair, inputs = Pair(dropout), batch()
    called = after(pair, lambda: pair.cache(sizes)(*inputs))
    plain = after(pair, lambda: pair.plain(*inputs, sizes=sizes).backward())
    following: list[Tensor] = []

    def deferred() -> None:
        loss = pair.cache(sizes).as_loss()(*inputs)
        assert all(p.grad is None for p in pair.parameters())
        following.append(torch.rand(3))  # a trainer may draw numbers before its backward
        loss.backward()
        following.append(torch.rand(3))

    same_bits(after(pair, deferred), called)
    assert_same(called, plain, 1e-12)
    torch.manual_seed(5)
    pair.plain(*inputs, sizes=sizes)
    assert all(torch.equal(drawn, torch.rand(3)) for drawn in following), "as after one forward"


def test_the_loss_itself() -> None:
    pair, inputs = Pair(), batch()
    loss = pair.cache().as_loss()(*inputs)
    assert loss.requires_grad and loss.shape == ()
    torch.testing.assert_close(loss.detach(), pair.plain(*inputs).detach(), rtol=1e-12, atol=0)


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "halved": lambda loss: loss / 2,
    "in place": lambda loss: loss.mul_(0.3),
    "of a sum": lambda loss: loss * 3 + loss.square(),
    "negative": lambda loss: -loss,
}


@pytest.mark.parametrize("name", FACTORS)
def test_whatever_the_trainer_makes_of_the_loss(name: str) -> None:
    pair, inputs = Pair(0.3), batch()
    cached = after(pair, lambda: FACTORS[name](pair.cache().as_loss()(*inputs)).backward())
    plain = after(pair, lambda: FACTORS[name](pair.plain(*inputs, sizes=(3, 3))).backward())
    assert_same(cached, plain, 1e-12)


def test_accumulated_batches_one_after_another_and_interleaved() -> None:
    pair, batches = Pair(0.3), [batch() for _ in range(3)]
    plain = after(pair, lambda: sum(pair.plain(*each, sizes=(3, 4)) / 3 for each in batches).backward())
    loss_of = pair.cache([3, 4]).as_loss()

    def interleaved() -> None:
        losses = [loss_of(*each) / 3 for each in batches]
        for loss in (losses[1], losses[0], losses[2]):
            loss.backward()

    def each_by_itself() -> None:
        for one in batches:
            (loss_of(*one) / 3).backward()

    for run in (interleaved, each_by_itself, lambda: (sum(loss_of(*one) for one in batches) / 3).backward()):
        assert_same(after(pair, run), plain, 1e-12)


def test_beside_other_losses_of_the_same_parameters() -> None:
    pair, inputs = Pair(), batch()

    def other() -> Tensor:
        return sum(p.square().sum() for p in pair.parameters()) + pair.image(inputs[0]).sum()

    plain = after(pair, lambda: (pair.plain(*inputs) + other()).backward())
    assert_same(after(pair, lambda: (pair.cache().as_loss()(*inputs) + other()).backward()), plain, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_and_a_loss_scale(dtype: torch.dtype, inside: bool) -> None:
    """The scale reaches the embeddings' gradient before it is rounded: in float16 it would vanish."""
    pair, inputs = Pair(0.3).float(), [x.float() for x in batch()]
    pair.loss = lambda a, b: plain_infonce(a, b, pair.log_scale.exp()).float() * 1e-6  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def called() -> None:
        with torch.autocast("cpu", dtype):
            pair.cache()(*inputs, scale_loss=scaler.scale)

    def deferred() -> None:
        with torch.autocast("cpu", dtype):
            loss = pair.cache().as_loss()(*inputs)
            if inside:
                scaler.scale(loss).backward()
        if not inside:
            scaler.scale(loss).backward()

    expected = after(pair, called)
    assert all(grad.any() for grad in expected)
    same_bits(after(pair, deferred), expected)
    assert not torch.is_autocast_enabled("cpu")


def test_without_gradients() -> None:
    pair, inputs = Pair(), batch()
    plain = pair.plain(*inputs).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        for size in (3, 11, "auto"):
            pair.image.calls.clear()
            with context:
                loss = pair.cache(size).as_loss()(*inputs)
            assert not loss.requires_grad and loss.grad_fn is None
            torch.testing.assert_close(loss.clone(), plain)
            assert size == "auto" or max(pair.image.calls) == size
    pair.requires_grad_(False)
    assert not pair.cache().as_loss()(*inputs).requires_grad
    assert all(p.grad is None for p in pair.parameters())


def test_errors_of_the_backward() -> None:
    pair, inputs = Pair(), batch()
    loss_of = pair.cache().as_loss()
    loss = loss_of(*inputs)
    loss.backward(retain_graph=True)
    kept = gradients(pair)
    with pytest.raises(RuntimeError, match="expected one backward for each loss, got a second one"):
        loss.backward()
    with pytest.raises(RuntimeError, match="expected a backward with create_graph=False"):
        torch.autograd.grad(loss_of(*inputs), pair.log_scale, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one gradient of the loss, got a batch"):
        torch.autograd.grad(loss_of(*inputs), pair.log_scale, torch.ones(2), is_grads_batched=True)
    same_bits(gradients(pair), kept)
    with pytest.raises(ValueError, match="inputs: expected 2, one per encoder, got 1"):
        loss_of(inputs[0])


def test_a_loss_without_a_backward_leaves_nothing() -> None:
    pair, cache = Pair(), None
    seen: list[weakref.ref[Tensor]] = []

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((weakref.ref(a), weakref.ref(b)))
        return pair.loss(a, b)

    cache = GradCache([pair.image, pair.text], loss_fn, chunk_size=3)
    gc.disable()
    try:
        loss = cache.as_loss()(*batch())
        assert all(each() is not None for each in seen)
        del loss
        assert all(each() is None for each in seen), "freed at once, without cycles"
        loss = cache.as_loss()(*batch())
        loss.backward()
        assert all(each() is None for each in seen), "freed by the backward, while the loss lives"
    finally:
        gc.enable()
    clear(pair)
    cache.as_loss()(*batch())
    assert all(p.grad is None for p in pair.parameters())


def test_a_second_pass_that_differs_raises_in_the_backward() -> None:
    tower, own = Encoder(), np.random.default_rng(1)
    cache = GradCache(
        [lambda x: tower(x * torch.from_numpy(own.random(6)))], lambda a: a.square()[:, 0].sum(), chunk_size=4
    )
    loss = cache.as_loss()(torch.randn(12, 6))
    with pytest.raises(RuntimeError, match="expected the second pass to match the first"):
        loss.backward()


def test_each_parameter_is_accumulated_once() -> None:
    pair, times = Pair(), []
    for parameter in pair.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: times.append(id(p)))
    pair.cache(2).as_loss()(*batch()).backward()
    assert sorted(times) == sorted(map(id, pair.parameters()))


def test_gradients_that_are_asked_for() -> None:
    pair, inputs = Pair(), batch()
    parameters = list(pair.parameters())
    expected = after(pair, lambda: pair.plain(*inputs).backward())
    clear(pair)
    assert_same(list(torch.autograd.grad(pair.cache().as_loss()(*inputs), parameters)), expected, 1e-12)
    assert all(p.grad is None for p in parameters)
    pair.cache().as_loss()(*inputs).backward(inputs=[parameters[0]])
    assert_same(gradients(pair), expected[:1], 1e-12)


def test_inputs_that_learn_and_inputs_that_other_modules_make() -> None:
    pair, adapter, prompt = Pair(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Parameter(torch.randn(11, 6))
    x, y = batch()
    everything = nn.ModuleList([pair, adapter, nn.ParameterList([prompt])])

    def run(loss_of: Callable[..., Tensor]) -> None:
        made = adapter(x)
        (loss_of(made, y + prompt) + made.sum()).backward()

    plain = after(everything, lambda: run(pair.plain))
    for size in (3, 11):
        assert_same(after(everything, lambda: run(pair.cache(size).as_loss())), plain, 1e-12)  # noqa: B023

    plain = after(everything, lambda: pair.plain(prompt, y).backward())
    assert_same(after(everything, lambda: pair.cache().as_loss()(prompt, y).backward()), plain, 1e-12)


def test_parameters_that_cannot_be_seen() -> None:
    """Behind an object: found in the graph."""
    pair, inputs = Pair(), batch()

    class Hidden:
        __slots__ = ("tower",)

        def __call__(self, x: Tensor) -> Tensor:
            return self.tower(x)

    hidden = Hidden()
    hidden.tower = pair.text
    plain = after(pair, lambda: (pair.plain(*inputs) / 4).backward())
    cache = GradCache([pair.image, hidden], pair.loss, chunk_size=3)
    assert_same(after(pair, lambda: (cache.as_loss()(*inputs) / 4).backward()), plain, 1e-12)


def test_tied_and_frozen_encoders() -> None:
    pair, (x, y) = Pair(), batch()
    tied = GradCache([pair.image, pair.image], pair.loss, chunk_size=[3, 4])
    plain = after(pair, lambda: pair.loss(pair.image(x), pair.image(y)).backward())
    assert_same(after(pair, lambda: tied.as_loss()(x, y).backward()), plain, 1e-12)
    pair.text.requires_grad_(False)
    pair.text.calls.clear()
    plain = after(pair, lambda: pair.plain(x, y).backward())
    assert_same(after(pair, lambda: pair.cache(4).as_loss()(x, y).backward()), plain, 1e-12)
    assert pair.text.calls == [11, 4, 4, 3]


class Outcome(NamedTuple):
    loss: Tensor
    logits: Tensor


def test_further_output() -> None:
    pair, inputs = Pair(), batch()
    loss_fn = lambda a, b: Outcome(pair.loss(a, b), a @ b.T)  # noqa: E731
    out = GradCache([pair.image, pair.text], loss_fn, chunk_size=3).as_loss()(*inputs)
    assert isinstance(out, Outcome)
    assert out.loss.requires_grad and not out.logits.requires_grad
    assert_same(after(pair, out.loss.backward), after(pair, lambda: pair.plain(*inputs).backward()), 1e-12)


def test_checkpointed_encoders() -> None:
    pair, inputs = Pair(0.3), batch()
    expected = after(pair, lambda: pair.cache()(*inputs))
    for reentrant in (False, True):
        encoder = lambda x: checkpoint(pair.image, x, use_reentrant=reentrant)  # noqa: B023, E731
        cache = GradCache([encoder, pair.text], pair.loss, chunk_size=3)
        x = inputs[0].clone().requires_grad_()
        run = lambda: cache.as_loss()(x, inputs[1]).backward()  # noqa: B023, E731
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=True"):
                after(pair, run)
        else:
            same_bits(after(pair, run), expected)


def test_the_backward_holds_the_activations_of_one_chunk() -> None:
    pair, peaks = Pair(), []
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
            pair.cache(4).as_loss()(*batch(rows)).backward()
        peaks.append(peak)
    assert peaks[0] == peaks[1] > 0


class Whole(nn.Module):
    def __init__(self, compiled: Callable[[Any], Any]) -> None:
        super().__init__()
        self.pair = Pair(0.3)
        encoders = [compiled(self.pair.image.layers), compiled(self.pair.text.layers)]
        self.cache = GradCache(encoders, self.pair.loss, chunk_size=[4, 3])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cache.as_loss()(x + 1, y) * 2


@pytest.mark.parametrize("where", ["the encoders", "the whole model"])
def test_compiled(where: str) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = functools.partial(torch.compile, backend=backend)
    inputs = batch()
    whole = Whole(compiled if where == "the encoders" else lambda module: module)
    plain = Whole(lambda module: module)
    plain.load_state_dict(whole.state_dict())
    expected = after(plain, lambda: plain(*inputs).backward())
    run = whole if where == "the encoders" else compiled(whole)
    for _ in range(2):
        assert_same(after(whole, lambda: run(*inputs).backward()), expected, 1e-12)
    assert graphs and (where == "the whole model" or max(graphs) > 4)

"""chunk_size="auto": the budget holds, and a step that runs out of memory restarts without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pairwise
import pytest
import torch
import torch.nn.functional as F
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache, PackedBatch, segment_pool
from mmkernels.gradcache import Args
from mmkernels.testing.contrastive import plain_infonce


@contextmanager
def live_bytes(*modules: nn.Module) -> Iterator[list[int]]:
    """[peak bytes saved by autograd], without parameters; each storage counts once."""
    parameters = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    live: dict[tuple[int, int], int] = {}
    peak = [0]

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.key = tensor, (tensor.data_ptr(), tensor.nbytes)
            if tensor.untyped_storage().data_ptr() not in parameters:
                live[self.key] = live.get(self.key, 0) + 1
                peak[0] = max(peak[0], sum(size for _, size in live))

        def __del__(self) -> None:
            if self.key in live:
                live[self.key] -= 1
                if not live[self.key]:
                    del live[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield peak


def bytes_of(encoder: nn.Module, rows: int) -> int:
    with live_bytes(encoder) as peak:
        encoder(torch.randn(rows, 6))
    return peak[0] - rows * 6 * 4  # minus the input, which exists anyway


@pytest.mark.parametrize("budget", [3_000, 10_000, 10**9])
def test_the_largest_chunk_within_the_budget(budget: int) -> None:
    image, text = Encoder(), Encoder(48)
    step = GradCache([image, text], lambda a, b: (a.sum() - b.sum()).square(), chunk_size="auto", memory_budget=budget)
    x, y = torch.randn(70, 6), torch.randn(70, 6)
    step(x, y)
    for encoder, size in zip((image, text), step.chunk_sizes, strict=True):
        assert bytes_of(encoder, min(size, 70)) <= budget
        assert size >= 70 or bytes_of(encoder, size + 1) > budget
    if budget < 10**9:
        assert step.chunk_sizes[0] > step.chunk_sizes[1] > 1
        with live_bytes(image, text) as peak:  # of a whole step, including the embeddings' loss
            step(x, y)
        assert peak[0] <= budget + 2 * 70 * 6 * 4 + 2 * 70 * 8 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_with_dropout(tied: bool) -> None:
    first = Encoder(dropout=0.3)
    towers = [first, first if tied else Encoder(20, dropout=0.3)]
    inputs = [torch.randn(50, 6), torch.randn(50, 6)]
    step = GradCache(towers, plain_infonce, chunk_size="auto", memory_budget=4000)
    torch.manual_seed(5)
    loss, following = step(*inputs), torch.rand(2)
    assert 1 < step.chunk_sizes[0] < 50
    actual = gradients(*towers)
    clear(*towers)
    torch.manual_seed(5)
    expected = plain_infonce(*chunk_graph(towers, inputs, step.chunk_sizes))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same(actual, gradients(*towers))
    assert torch.equal(following, torch.rand(2)), "the probe leaves the generators where they were"


def test_an_automatic_encoder_beside_a_fixed_one_and_a_frozen_one() -> None:
    image, text, frozen = Encoder(), Encoder(), Encoder().requires_grad_(False)
    inputs = [torch.randn(40, 6) for _ in range(3)]
    step = GradCache(
        [image, text, frozen],
        lambda a, b, c: plain_infonce(a, b) + plain_infonce(a, c),
        chunk_size=["auto", 3, "auto"],
        memory_budget=3000,
    )
    step(*inputs)
    assert step.chunk_sizes[1] == 3
    assert 1 < step.chunk_sizes[0] < 40 <= step.chunk_sizes[2], "a frozen encoder saves nothing"
    actual = gradients(image, text)
    clear(image, text)
    (plain_infonce(image(inputs[0]), text(inputs[1])) + plain_infonce(image(inputs[0]), frozen(inputs[2]))).backward()
    assert_same(actual, gradients(image, text))


def test_tokens_count_where_samples_differ_in_length() -> None:
    """Later batches have samples eight times as long: chunks hold fewer of them."""
    table, text = nn.Linear(6, 8), Encoder()
    seen: list[int] = []

    def encode(batch: PackedBatch) -> Tensor:
        seen.append(batch.num_tokens)
        return F.normalize(segment_pool(table(batch.tokens).tanh(), batch.cu_seqlens, "mean"), dim=-1)

    def batch(length: int) -> PackedBatch:
        return PackedBatch.from_samples([torch.randn(length + i % 3, 6) for i in range(40)])

    step = GradCache([encode, text], plain_infonce, chunk_size=["auto", 40], memory_budget=6000)
    most = []
    for length in (2, 16):
        step(batch(length), torch.randn(40, 6))
        most.append((step.chunk_sizes[0], max(seen[-2 * (40 // step.chunk_sizes[0]) :])))
        del seen[:]
    (short, tokens), (long, tokens_again) = most
    assert long < short / 2
    assert abs(tokens - tokens_again) <= 18, "as many tokens, within a sample"


class Limited(nn.Module):
    """An encoder that, once armed, runs out of memory in one of its passes above a number of rows."""

    def __init__(self, where: str, limit: int, error: type[BaseException] = torch.cuda.OutOfMemoryError) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 12), nn.BatchNorm1d(12), Encoder(dropout=0.3)
        self.down = nn.Linear(12, 6)
        self.where, self.limit, self.error, self.armed, self.hits = where, limit, error, False, 0

    def _run_out(self) -> None:
        self.hits += 1
        raise self.error("out of memory: can't allocate memory")

    def forward(self, x: Tensor) -> Tensor:
        over = self.armed and len(x) > self.limit
        grad = torch.is_grad_enabled()
        if over and self.where == ("again" if grad else "first"):
            self._run_out()
        hidden = self.norm(self.first(x))
        if over and grad and self.where == "backward":  # by then the gradients of later layers are already accumulated
            hidden.register_hook(lambda _: self._run_out())
        return self.second(self.down(hidden))


ERRORS = {"of a device": torch.cuda.OutOfMemoryError, "of Python": MemoryError, "of a CPU": RuntimeError}


@pytest.mark.filterwarnings("ignore:.*BatchNorm in training mode")
@pairwise.cases(where=("first", "again", "backward"), accumulating=(False, True), error=ERRORS)
def test_back_off(where: str, accumulating: bool, error: str) -> None:
    image, text = Limited(where, 5, ERRORS[error]), Encoder(dropout=0.2)
    inputs = [torch.randn(48, 6), torch.randn(48, 6)]
    scale = nn.Parameter(torch.tensor(2.0))

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return plain_infonce(a, b, scale.exp())

    def everything() -> list[Tensor]:
        return [*gradients(image, text), scale.grad.clone()]

    step = GradCache([image, text], loss_fn, chunk_size="auto", memory_budget=8000)
    step(*inputs)
    before = list(step.chunk_sizes)
    assert before[0] > 10
    if not accumulating:
        clear(image, text)
        scale.grad = None
    earlier = everything() if accumulating else None
    statistics = [b.clone() for b in image.norm.buffers()]

    image.armed = True
    torch.manual_seed(7)
    loss, following = step(*inputs), torch.rand(2)
    assert image.hits > 0
    assert step.chunk_sizes[0] <= 5 and step.chunk_sizes[1] == before[1]
    actual, moved = everything(), [b.clone() for b in image.norm.buffers()]

    image.armed = False
    clear(image, text)
    scale.grad = None
    for buffer, value in zip(image.norm.buffers(), statistics, strict=True):
        buffer.copy_(value)
    torch.manual_seed(7)
    expected = loss_fn(*chunk_graph([image, text], inputs, step.chunk_sizes))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(following, torch.rand(2))
    for ours, theirs in zip(moved, image.norm.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    target = everything() if earlier is None else [a + b for a, b in zip(earlier, everything(), strict=True)]
    # BatchNorm makes the gradient of the preceding bias zero up to rounding: not comparable.
    small = [i for i, g in enumerate(target) if g.norm() < 1e-5]
    assert len(small) == 1
    assert_same(
        [g for i, g in enumerate(actual) if i not in small], [g for i, g in enumerate(target) if i not in small], 3e-6
    )


def test_the_size_stays_halved_and_one_sample_is_the_end() -> None:
    image, text = Limited("backward", 1).eval(), Encoder()
    inputs = [torch.randn(45, 6), torch.randn(45, 6)]
    step = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=10_000)
    step(*inputs)
    image.armed = True
    step(*inputs)
    assert step.chunk_sizes[0] == 1
    hits = image.hits
    step(*inputs)
    assert image.hits == hits, "nothing is tried again that failed"
    clear(image, text)
    image.limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
        step(*inputs)
    assert all(p.grad is None for p in (*image.parameters(), *text.parameters())), "the failed step left nothing"


def test_without_auto_the_error_is_the_users() -> None:
    image, text = Limited("again", 3), Encoder()
    image.armed = True
    image.eval()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        GradCache([image, text], plain_infonce, chunk_size=5)(torch.randn(8, 6), torch.randn(8, 6))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        GradCache([image, text], plain_infonce, chunk_size=[5, "auto"])(torch.randn(8, 6), torch.randn(8, 6))


def test_the_probe_may_run_out_too() -> None:
    image, text = Limited("again", 7).eval(), Encoder()
    image.armed = True
    inputs = [torch.randn(45, 6), torch.randn(45, 6)]
    step = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=100_000)
    step(*inputs)
    assert image.hits > 0 and 1 < step.chunk_sizes[0] <= 7
    actual = gradients(image, text)
    clear(image, text)
    image.armed = False
    image.second.layers[2].p = 0.0
    plain_infonce(image(inputs[0]), text(inputs[1])).backward()
    assert_same(actual, gradients(image, text), 3e-6)


def test_a_budget_below_one_sample_is_said() -> None:
    step = GradCache([Encoder(), Encoder()], plain_infonce, chunk_size="auto", memory_budget=10)
    with pytest.warns(UserWarning, match=r"inputs\[0\]: a single sample is expected to take more than memory_budget"):
        step(torch.randn(4, 6), torch.randn(4, 6))
    assert step.chunk_sizes == [1, 1]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_samples(rows: int) -> None:
    image, text = Encoder(), Encoder()
    x, y = torch.randn(rows, 6), torch.randn(rows, 6)
    step = GradCache([image, text], lambda a, b: (a * b).sum() + a.sum() ** 2, chunk_size="auto")
    step(x, y)
    actual = gradients(image, text)
    clear(image, text)
    a, b = image(x), text(y)
    ((a * b).sum() + a.sum() ** 2).backward()
    for ours, theirs in zip(actual, gradients(image, text), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_goes_to_every_chunk_whole_counts_once() -> None:
    """A large table beside the samples changes nothing: memory grows with the samples only."""
    image, text = Encoder(), Encoder()
    sizes = []
    for make in (lambda x: x, lambda x: Args(x, gain=1.0)):
        step = GradCache([image, text], plain_infonce, chunk_size="auto", memory_budget=4000)
        step(make(torch.randn(60, 6)), torch.randn(60, 6))
        sizes.append(step.chunk_sizes[0])
    assert sizes[0] == sizes[1] < 60


def test_with_a_token_loss_all_encoders_are_measured_together() -> None:
    image, text, head = Encoder(), Encoder(), nn.Linear(8, 30)
    labels = torch.randint(30, (40,))

    def token_loss(outputs: list[Tensor], inputs: list[Any]) -> tuple[Tensor, int]:
        return F.cross_entropy(head(outputs[0] + outputs[1]), inputs[1][1], reduction="sum"), len(outputs[0])

    step = GradCache(
        [image, lambda pair: text(pair[0])],
        plain_infonce,
        chunk_size="auto",
        memory_budget=9000,
        token_loss_fn=token_loss,
    )
    x, y = torch.randn(40, 6), torch.randn(40, 6)
    loss, _ = step(x, (y, labels))
    size = step.chunk_sizes[0]
    assert step.chunk_sizes == [size, size]
    assert 1 < size < 40

    def run(rows: int) -> None:
        outputs = [image(x[:rows]), text(y[:rows])]
        kept.append((outputs, token_loss(outputs, [x, (y, labels[:rows])])))

    totals = []
    for rows in (size, size + 1):
        kept: list[Callable[..., Any] | Any] = []
        with live_bytes(image, text, head) as peak:
            run(rows)
        totals.append(peak[0] - 2 * rows * 6 * 4 - rows * 8)
    assert totals[0] <= 9000 < totals[1]
    actual = gradients(image, text, head)
    clear(image, text, head)
    a, b = image(x), text(y)
    whole = plain_infonce(a, b) + F.cross_entropy(head(a + b), labels)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    assert_same(actual, gradients(image, text, head), 2e-6)


@pytest.mark.gpu
def test_budget_on_a_device() -> None:
    image = nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 256)).cuda()
    x = torch.randn(8192, 256, device="cuda")
    budget = 64 << 20
    step = GradCache([image], lambda a: a.square().mean(), chunk_size="auto", memory_budget=budget)
    step(x)
    assert 32 < step.chunk_sizes[0] < 8192
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    image(x[: step.chunk_sizes[0]]).sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * budget

"""Gradient caching: the gradient of a large batch with the activations of one chunk in memory.

    1. embed      every chunk through its encoder without gradients; the random state before each chunk is kept
    2. loss       on the detached embeddings of the whole batch; its backward gives dloss/dembedding, the cache
    3. re-embed   chunk by chunk with gradients and the random state replayed, backward from the cache

The chain rule makes this exact: `.grad` afterwards equals that of one graph over the whole batch. The price is a second
forward; what is saved is every activation but one chunk's.

Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021
(arXiv:2101.06983).
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels._chunks import Args, split, tensors
from mmkernels.ops._checks import not_yet, wrong_type, wrong_value

__all__ = ["Args", "GradCache"]

Encoder = Callable[..., Tensor]


class GradCache:
    """Forward and backward of a loss over embeddings, chunk by chunk.

    `p.grad += d loss_fn(encoder_0(input_0), encoder_1(input_1), ...) / dp` for every parameter of the encoders and of
    the loss.

    Each call takes one input per encoder. An input is split into chunks along its samples:

    - a tensor or NumPy array along dim 0;
    - a list by its entries, one a sample (ragged images, strings);
    - a dict, tuple or `Args` member by member, all with the same number of samples;
    - any other object by its own `split(chunk_size)`, which returns a sequence of chunks (packed batches);
    - None, numbers, strings and 0-dim tensors go to every chunk whole.

    A chunk goes to its encoder as one argument, or as several when the input is `Args`. The encoder returns a tensor
    whose rows are embeddings; the rows of all chunks, concatenated, go to the loss.

    Both forward passes run under the caller's autocast, both backward passes outside it. Dropout and whatever else
    draws from PyTorch's CPU and CUDA generators draws the same numbers in both passes; afterwards the generators stand
    where one forward leaves them. An encoder whose parameters are all frozen is not run a second time. When every
    input is a single chunk there is nothing to cache and one plain step is taken.

    DistributedDataParallel encoders (or `functools.partial`s and bound methods of one) reduce their gradients once, in
    the last backward that reaches them; encoders that share a wrapper run their last chunks in one backward. Parameters
    of the loss are reduced with it when they belong to a wrapper.

    BatchNorm in training mode normalises by the chunk, so that its gradient is not the whole batch's: this is warned
    about once. Its running statistics move once per chunk, in the first pass.

    Args:
        encoders: callables, each `chunk -> [rows, ...]` floating point; one may come several times (tied towers).
        loss_fn: `(*embeddings) -> scalar loss`, or a tuple that begins with the loss. May have parameters of its own.
        chunk_size: samples in a chunk, for all encoders or one per encoder. "auto" is not supported yet.
        memory_budget: bytes for "auto"; not supported yet.
        token_loss_fn: loss per token in the third pass; not supported yet.

    Raises:
        TypeError: an argument, an input or an encoder's output of the wrong type.
        ValueError: a chunk size below 1, a wrong number of inputs, or members of one input that disagree in samples.
        NotImplementedError: an option that is not there yet.

    Example:
        >>> step = GradCache([image_tower, text_tower], lambda x, y: infonce(x, y, log_scale.exp()), chunk_size=64)
        >>> loss = step(images, texts)          # images [4096, 3, 224, 224]; gradients are in place
        >>> optimizer.step()
    """

    def __init__(
        self,
        encoders: Sequence[Encoder] | nn.ModuleList,
        loss_fn: Callable[..., Any],
        *,
        chunk_size: int | Sequence[int] | Literal["auto"],
        memory_budget: int | None = None,
        token_loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        if not isinstance(encoders, (Sequence, nn.ModuleList)) or not len(encoders):
            wrong_type("encoders", "a non-empty sequence of callables", encoders)
        for i, encoder in enumerate(encoders):
            if not callable(encoder):
                wrong_type(f"encoders[{i}]", "a callable", encoder)
        if not callable(loss_fn):
            wrong_type("loss_fn", "a callable", loss_fn)
        if chunk_size == "auto":
            not_yet("chunk_size", chunk_size)
        if memory_budget is not None:
            not_yet("memory_budget", memory_budget)
        if token_loss_fn is not None:
            not_yet("token_loss_fn", token_loss_fn)
        self.encoders: list[Encoder] = list(encoders)
        self.loss_fn = loss_fn
        self.chunk_sizes = _chunk_sizes(chunk_size, len(self.encoders))
        self._warned_of_batch_norm = False

    def __call__(self, *inputs: Any, scale_loss: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Run forward and backward; gradients are added to `.grad`.

        Args:
            inputs: one per encoder, see the class.
            scale_loss: applied to the loss before its backward, and so to every gradient: `scaler.scale` of a
                `torch.amp.GradScaler`, or a division by the number of accumulated batches.

        Returns:
            what `loss_fn` returned, the loss detached and not scaled.
        """
        if len(inputs) != len(self.encoders):
            wrong_value("inputs", f"{len(self.encoders)}, one per encoder", len(inputs))
        towers = [
            _Tower(encoder, split(value, size, f"inputs[{i}]"), f"encoders[{i}]")
            for i, (encoder, value, size) in enumerate(zip(self.encoders, inputs, self.chunk_sizes, strict=True))
        ]
        if all(len(tower.chunks) == 1 for tower in towers):
            output = self.loss_fn(*(tower.embed(tower.chunks[0]) for tower in towers))
            return self._backward_loss(output, scale_loss)
        self._warn_of_batch_norm(towers)

        with _no_sync(towers):
            # 1. Embed without gradients. The cache of cast weights goes: filled under no_grad, it would cut pass 3 off.
            for tower in towers:
                tower.embed_all()
            torch.clear_autocast_cache()

            # 2. Loss on the detached embeddings of the whole batch; `.grad` of these is the cache.
            output = self.loss_fn(*(tower.embeddings for tower in towers))
            loss_leaves = _leaves(_loss_of(output))
            result = self._backward_loss(output, scale_loss)

        # 3. Re-embed with gradients, backward from the cache.
        for group in _groups(towers):
            _backward_from_cache(group, loss_leaves)
        return result

    @staticmethod
    def _backward_loss(output: Any, scale_loss: Callable[[Tensor], Tensor] | None) -> Any:
        """Backward of what `loss_fn` returned; gives it back with the loss detached."""
        loss = _loss_of(output)
        if not _backward([loss if scale_loss is None else scale_loss(loss)], [None]):
            wrong_value("loss_fn: output", "a loss that depends on something trainable", loss)
        return (loss.detach(), *output[1:]) if isinstance(output, tuple) else loss.detach()

    def _warn_of_batch_norm(self, towers: list[_Tower]) -> None:
        for tower in towers:
            if not self._warned_of_batch_norm and len(tower.chunks) > 1 and tower.batch_norms():
                self._warned_of_batch_norm = True
                warnings.warn(
                    f"{tower.name}: BatchNorm in training mode normalises by the chunk, not by the batch, so gradients "
                    "differ from the full batch's. Use LayerNorm or GroupNorm, or set those layers to eval().",
                    stacklevel=3,
                )


@dataclass
class _Tower:
    """One encoder's share of a step."""

    encoder: Encoder
    chunks: list[Any]
    name: str
    states: list[_RandomState] = field(default_factory=list)  # before each chunk of pass 1
    rows: list[int] = field(default_factory=list)  # embeddings of each chunk
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))  # [all rows, ...], detached

    def __post_init__(self) -> None:
        self.modules = _modules_behind(self.encoder)
        self.wrapper = next((m for m in self.modules if isinstance(m, DistributedDataParallel)), None)

    def embed(self, chunk: Any) -> Tensor:
        """[rows, ...] of one chunk."""
        out = self.encoder(*chunk.args, **chunk.kwargs) if isinstance(chunk, Args) else self.encoder(chunk)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            wrong_type(f"{self.name}: output", "a floating-point tensor [rows, ...]", out)
        if out.ndim == 0:
            wrong_value(f"{self.name}: output", "a floating-point tensor [rows, ...]", out)
        return out

    @torch.no_grad()
    def embed_all(self) -> None:
        """Pass 1."""
        devices = self._cuda_devices()
        parts = []
        for chunk in self.chunks:
            self.states.append(_RandomState.now(devices))
            parts.append(self.embed(chunk))
            self.rows.append(len(parts[-1]))
        self.embeddings = torch.cat(parts).requires_grad_(not self._frozen())

    def embed_again(self, i: int) -> Tensor:
        """Pass 3: chunk i as in pass 1, with its graph."""
        with self.states[i].replayed():
            return self.embed(self.chunks[i])

    def batch_norms(self) -> list[nn.Module]:
        layers = (layer for module in self.modules for layer in module.modules())
        return [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training]

    def _frozen(self) -> bool:
        """Known to have nothing to learn. A partial or a closure may reach parameters that are not to be seen here."""
        parameters = [p for module in self.modules for p in module.parameters()]
        if isinstance(self.encoder, functools.partial) or not parameters or any(p.requires_grad for p in parameters):
            return False
        return not any(tensor.requires_grad for chunk in self.chunks for tensor in tensors(chunk))

    def _cuda_devices(self) -> set[torch.device]:
        if not torch.cuda.is_initialized():
            return set()
        parameters = (p for module in self.modules for p in module.parameters())
        devices = {t.device for t in itertools.chain(parameters, tensors(self.chunks[0])) if t.is_cuda}
        return devices | {torch.device("cuda", torch.cuda.current_device())}


@dataclass(frozen=True)
class _RandomState:
    """PyTorch's default generators: the CPU's and those of the CUDA devices in play."""

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @staticmethod
    def now(devices: set[torch.device]) -> _RandomState:
        return _RandomState(torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices})

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators go on from this state; afterwards they stand as if nothing had been drawn."""
        after = _RandomState.now(set(self.cuda))
        self.restore()
        try:
            yield
        finally:
            after.restore()


def _backward_from_cache(group: list[_Tower], loss_leaves: list[Tensor]) -> None:
    """Pass 3 for the encoders of one DDP wrapper, or for one encoder alone.

    A reducer finishes in the one backward that reaches every parameter of its wrapper. So that backward has the last
    chunk of each encoder, and a zero for the parameters whose gradient came from the loss and is already in place.
    """
    towers = [
        tower for tower in group if tower.embeddings.grad is not None
    ]  # else frozen, or the loss has no use for it
    caches = [tower.embeddings.grad.split(tower.rows) for tower in towers if tower.embeddings.grad is not None]
    with _kept_batch_norm_statistics(towers):
        with _no_sync(towers):
            for tower, cache in zip(towers, caches, strict=True):
                for i in range(len(tower.chunks) - 1):
                    if not _backward([tower.embed_again(i)], [cache[i]]):
                        break
        wrapped = {id(p) for tower in towers if tower.wrapper is not None for p in tower.wrapper.parameters()}
        from_loss = [leaf for leaf in loss_leaves if id(leaf) in wrapped]
        _backward(
            [*(tower.embed_again(len(tower.chunks) - 1) for tower in towers), *from_loss],
            [*(cache[-1] for cache in caches), *map(torch.zeros_like, from_loss)],
        )


def _backward(outputs: list[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """Backward from those outputs that have a graph; False if none has."""
    live = [i for i, out in enumerate(outputs) if out.requires_grad]
    with _autocast_off():
        if live:
            torch.autograd.backward([outputs[i] for i in live], [gradients[i] for i in live])
    return bool(live)


def _groups(towers: list[_Tower]) -> list[list[_Tower]]:
    """Encoders that share one DDP wrapper together, every other one alone."""
    groups: dict[int, list[_Tower]] = {}
    for tower in towers:
        groups.setdefault(id(tower if tower.wrapper is None else tower.wrapper), []).append(tower)
    return list(groups.values())


@contextmanager
def _no_sync(towers: list[_Tower]) -> Iterator[None]:
    with ExitStack() as stack:
        for wrapper in {id(tower.wrapper): tower.wrapper for tower in towers}.values():
            if wrapper is not None:
                stack.enter_context(wrapper.no_sync())
        yield


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Backward runs in the dtypes that forward chose, not under autocast once more."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def _kept_batch_norm_statistics(towers: list[_Tower]) -> Iterator[None]:
    """The second forward leaves running statistics alone: they moved in the first."""
    buffers = [b for tower in towers for layer in tower.batch_norms() for b in layer.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.copy_(value)


def _loss_of(output: Any) -> Tensor:
    loss = output[0] if isinstance(output, tuple) and output else output
    expected = "a scalar tensor, or a tuple that begins with one"
    if not isinstance(loss, Tensor):
        wrong_type("loss_fn: output", expected, output)
    if loss.numel() != 1:
        wrong_value("loss_fn: output", expected, loss)
    return loss


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that a loss will send gradients to."""
    leaves: list[Tensor] = []
    seen: set[Any] = {None}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            stack.extend(following for following, _ in node.next_functions)
    return leaves


def _modules_behind(encoder: Any) -> list[nn.Module]:
    """The modules behind an encoder: itself, the owner of a bound method, a partial's function and arguments."""
    if isinstance(encoder, nn.Module):
        return [encoder]
    if isinstance(encoder, functools.partial):
        parts = (encoder.func, *encoder.args, *encoder.keywords.values())
        return [module for part in parts for module in _modules_behind(part)]
    owner = getattr(encoder, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def _chunk_sizes(chunk_size: Any, encoders: int) -> list[int]:
    sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * encoders
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            wrong_type("chunk_size", "an int, or one int per encoder", chunk_size)
        if size < 1:
            wrong_value("chunk_size", "at least 1", chunk_size)
    if len(sizes) != encoders:
        wrong_value("chunk_size", f"an int, or one for each of the {encoders} encoders", chunk_size)
    return sizes

"""Gradient caching: the gradient of a large batch with the activations of one chunk in memory.

    1. embed      every chunk through its encoder without gradients; the random state before each chunk is kept
    2. loss       on the detached embeddings of the whole batch; its backward gives dloss/dembedding, the cache
    3. re-embed   chunk by chunk with gradients and the random state replayed, backward from the cache

The chain rule makes this exact: `.grad` afterwards equals that of one graph over the whole batch. The cost is a second
forward; only one chunk's activations are in memory.

Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021
(arXiv:2101.06983).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels.gradcache.auto import AutoSize, split_together
from mmkernels.gradcache.backward import Undo, out_of_memory
from mmkernels.gradcache.chunks import split
from mmkernels.gradcache.passes import Passes
from mmkernels.gradcache.replay import batch_norms
from mmkernels.gradcache.shards import Shards
from mmkernels.gradcache.step import RanOut, Step
from mmkernels.gradcache.sync import Sync, anywhere
from mmkernels.gradcache.tokens import TokenLoss
from mmkernels.gradcache.tower import Encoder, Tower, modules_behind
from mmkernels.ops.checks import integer, wrong_type, wrong_value

__all__ = ["GradCache"]


class GradCache:
    """Forward and backward of a loss over embeddings, chunk by chunk.

    `p.grad += d loss_fn(encoder_0(input_0), encoder_1(input_1), ...) / dp` for every parameter of the encoders and of
    the loss.

    Each call takes one input per encoder. An input is split into chunks along its samples:

    - a tensor or NumPy array along dim 0;
    - a list by its entries, one per sample (ragged images, strings);
    - `Ragged(values, counts)` by its counts (patches of a varying number of images per sample);
    - a dict, tuple or `Args` member by member, all with the same number of samples;
    - any other object by its own `split(chunk_size)`, which returns a sequence of chunks (`PackedBatch`);
    - None, numbers, strings and 0-dim tensors go to every chunk whole.

    A chunk goes to its encoder as one argument, or as several when the input is `Args`. The encoder returns a tensor
    whose rows are embeddings; the rows of all chunks, concatenated, go to the loss.

    Both forward passes run under the caller's autocast, both backward passes outside it. Dropout and anything else that
    draws from PyTorch's CPU and CUDA generators, `numpy.random`'s global one and Python's `random` draws the same
    numbers in both passes; afterwards the generators are as after one forward. Other state that changes between the
    passes (the encoder's own generator, a counter, a clock) would make the gradients wrong: the embeddings of both
    passes are compared, and a difference beyond rounding raises. An encoder whose parameters are all frozen does not
    run a second time. When every input is a single chunk there is nothing to cache and one plain step is taken.

    **Token losses.** With `token_loss_fn` an encoder may return a tuple that begins with the embeddings, and each chunk
    of samples also has losses over its tokens (masked words, captions), computed in the second pass, which has the
    graph::

        def token_loss(outputs, inputs):                   # of one chunk: an entry for each encoder
            logits, labels = outputs[1][1], inputs[1]["labels"]
            return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()

    It returns (sum, count), or a dict of such pairs, one per objective; a weight is a factor of the sum. An objective
    is its sum over the whole batch divided by its count over the whole batch, whatever the chunks; an objective without
    tokens is 0. The function is also run in the first pass, without gradients, for the counts. All encoders then have
    chunks of the same samples, and frozen ones are run in both passes.

    **Several ranks.** DistributedDataParallel encoders reduce their gradients once, in the last backward that reaches
    them, and so do `fully_shard` modules, which hold unsharded gradients until then. Encoders that share a wrapper run
    their last chunks in one backward. Parameters of the loss that belong to a wrapper are reduced with it. Wrappers are
    found in modules, compiled modules, bound methods, partials, and functions that close over them. A wrapper with
    `static_graph=True` raises: it allows one forward per step. Parameters that a rank does not use do not stop the
    others: their gradient counts as zeros. `fully_shard` modules whose gradient sync is off stay so.

    With `group`, token counts are summed over it: an objective is then the mean over the tokens of all ranks, under
    DDP's averaging. A wrapped parameter that no rank used keeps no gradient. And when every encoder has a single chunk
    on every rank, a step of DistributedDataParallel encoders is a plain one.

    **Automatic sizes.** With `chunk_size="auto"` the first call measures a forward and backward of two small chunks,
    fits `peak = a + b·amount` (tokens of packed batches, elements of tensors), and takes the largest chunks that fit
    `memory_budget`. If memory still runs out, the step is undone, the chunks of the encoder that ran out are halved,
    and the step restarts; no gradient is added twice. Ranks restart together, except in the very last backward of a
    wrapper, where the error is raised. `chunk_sizes` has the sizes of the last call.

    Sizes may differ between ranks. `fully_shard` modules are therefore gathered once per step, before any chunk, and
    stay unsharded until the backward that reduces them: peers that wait in an all-gather cannot be interrupted. Besides
    the chunk, memory must hold the unsharded parameters and, as with any size, the unsharded gradients.

    BatchNorm in training mode normalises over the chunk, so its gradient differs from the whole batch's; this warns
    once. Its running statistics are updated once per chunk, in the first pass.

    Args:
        encoders: callables, each `chunk -> [rows, ...]` floating point; the same one may occur twice (tied towers).
        loss_fn: `(*embeddings) -> scalar loss`, or a tuple that begins with the loss. May have its own parameters.
        chunk_size: samples in a chunk, or "auto"; for all encoders or one per encoder.
        memory_budget: for "auto": bytes that the forward and backward of one chunk may take. On a CUDA device this is
            the peak, elsewhere what autograd saves. None for the memory that is free at the first call.
        token_loss_fn: `(outputs, inputs) -> (sum, count) or {objective: (sum, count)}` of one chunk; see above.
        group: process group of the ranks that train together, see above. With "auto" also needed when `loss_fn`
            communicates with other ranks and no encoder is wrapped.
        on_embedded: called in the first pass with each encoder's number and all its embeddings, without gradient,
            before the next encoder runs: to begin an exchange with other ranks (`gather_keys`) that goes on meanwhile.
            With automatic sizes or token losses it is called after all encoders have run.
        check_passes: compare the embeddings (and the counts of token losses) of both passes, which reads a number from
            the device at the end of a step. A relative difference above 1% (10% where anything is narrower than
            float32) raises on the rank that sees it, whose gradients are then wrong.

    Raises:
        TypeError: an argument, an input or an encoder's output of the wrong type.
        ValueError: a chunk size below 1, a wrong number of inputs, members of one input with different numbers of
            samples, DistributedDataParallel with a static graph, or, under fully_shard with fixed sizes, different
            numbers of chunks on different ranks.
        RuntimeError: the second pass of an encoder or of a token loss differs from the first; or, with automatic sizes,
            another rank ran out of memory even with single samples (and raises the allocator's error).
        NotImplementedError: automatic sizes with fully_shard over tensor parallelism.

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
        chunk_size: int | Literal["auto"] | Sequence[int | Literal["auto"]],
        memory_budget: int | None = None,
        token_loss_fn: Callable[[list[Any], list[Any]], Any] | None = None,
        group: Any = None,
        on_embedded: Callable[[int, Tensor], None] | None = None,
        check_passes: bool = True,
    ) -> None:
        if not isinstance(encoders, (Sequence, nn.ModuleList)) or not len(encoders):
            wrong_type("encoders", "a non-empty sequence of callables", encoders)
        for i, encoder in enumerate(encoders):
            if not callable(encoder):
                wrong_type(f"encoders[{i}]", "a callable", encoder)
        if not callable(loss_fn):
            wrong_type("loss_fn", "a callable", loss_fn)
        if token_loss_fn is not None and not callable(token_loss_fn):
            wrong_type("token_loss_fn", "a callable", token_loss_fn)
        if group is not None and not callable(getattr(group, "size", None)):
            wrong_type("group", "a process group of torch.distributed", group)
        if on_embedded is not None and not callable(on_embedded):
            wrong_type("on_embedded", "None or a callable", on_embedded)
        if not isinstance(check_passes, bool):
            wrong_type("check_passes", "True or False", check_passes)
        self.encoders: list[Encoder] = list(encoders)
        self.loss_fn = loss_fn
        self.token_loss_fn = token_loss_fn
        self.on_embedded = on_embedded
        self.group, self.check_passes = group, check_passes
        asked = _chunk_sizes(chunk_size, len(self.encoders))
        if token_loss_fn is not None and len(set(asked)) > 1:
            wrong_value("chunk_size", "the same for every encoder, because of token_loss_fn", chunk_size)
        if memory_budget is not None:
            memory_budget = _budget(memory_budget, asked)
        auto = AutoSize(self.encoders, token_loss_fn, asked, memory_budget)
        self._auto = auto if "auto" in asked else None
        self.chunk_sizes: list[Any] = asked
        self._warned_of_batch_norm = False

    def __call__(self, *inputs: Any, scale_loss: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Run forward and backward; gradients are added to `.grad`.

        Args:
            inputs: one per encoder, see the class.
            scale_loss: applied to the loss, part by part, before its backward, and so to every gradient: a
                multiplication such as `scaler.scale` of a `torch.amp.GradScaler`, or a division by the number of
                accumulated batches.

        Returns:
            what `loss_fn` returned, the loss detached and not scaled. With `token_loss_fn` a tuple: the loss with all
            objectives added, what else `loss_fn` returned, and a dict of the objectives ("token_loss" for a bare pair).
        """
        if len(inputs) != len(self.encoders):
            wrong_value("inputs", f"{len(self.encoders)}, one per encoder", len(inputs))
        if scale_loss is not None and not callable(scale_loss):
            wrong_type("scale_loss", "a callable", scale_loss)
        scale_loss = scale_loss or _as_it_is
        modules = list({id(m): m for f in (*self.encoders, self.token_loss_fn) for m in modules_behind(f)}.values())
        if self._auto is not None:
            return self._run_auto(self._auto, inputs, scale_loss, modules)
        if self.token_loss_fn is not None:
            chunks = split_together(inputs, self.chunk_sizes[0])
        else:
            chunks = [
                split(x, n, f"inputs[{i}]") for i, (x, n) in enumerate(zip(inputs, self.chunk_sizes, strict=True))
            ]
        return self._step(chunks, scale_loss, modules).run()

    def _run_auto(
        self, auto: AutoSize, inputs: Sequence[Any], scale_loss: Callable[[Tensor], Tensor], modules: list[nn.Module]
    ) -> Any:
        sync = Sync(modules)
        if sync.ddp_over_ranks():
            sync.expect_no_static_graph()  # measuring is a step too
        peers, shards = sync.groups() if self.group is None else [self.group], Shards(sync.fsdp)
        with shards.kept():
            shards.gather()
            if not auto.measured:
                failed: Exception | None = None
                try:
                    auto.fit(inputs, modules, sync)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    failed = error
                _raise_together(failed, peers)
                auto.measured = True
            while True:
                self.chunk_sizes, chunks = auto.cut(inputs)
                step = self._step(chunks, scale_loss, modules)
                step.peers = peers
                step.undo = undo = Undo(modules, {device for tower in step.towers for device in tower.devices})
                try:
                    return step.run()
                except RanOut as error:
                    undo.restore()
                    short = [i for i, tower in enumerate(step.towers) if tower in error.towers]
                    halved = auto.back_off(self.chunk_sizes, chunks, short)
                    _raise_together(None if halved else error.cause, peers)
                del step
                gc.collect()  # the error's frames hold activations
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                shards.gather()  # those already reduced, the same on every rank

    def _step(self, chunks: list[list[Any]], scale_loss: Callable[[Tensor], Tensor], modules: list[nn.Module]) -> Step:
        more = self.token_loss_fn is not None
        towers = [
            Tower(encoder, parts, f"encoders[{i}]", more, self.check_passes)
            for i, (encoder, parts) in enumerate(zip(self.encoders, chunks, strict=True))
        ]
        self._warn_of_batch_norm(towers)
        passes = Passes("token_loss_fn", modules) if self.check_passes else None
        token = None if self.token_loss_fn is None else TokenLoss(self.token_loss_fn, self.group, passes)
        return Step(towers, self.loss_fn, token, scale_loss, modules, group=self.group, on_embedded=self.on_embedded)

    def _warn_of_batch_norm(self, towers: list[Tower]) -> None:
        for tower in towers:
            if not self._warned_of_batch_norm and len(tower.chunks) > 1 and batch_norms(tower.modules):
                self._warned_of_batch_norm = True
                warnings.warn(
                    f"{tower.name}: BatchNorm in training mode normalises by the chunk, not by the batch, so gradients "
                    "differ from the full batch's. Use LayerNorm or GroupNorm, or set those layers to eval().",
                    stacklevel=4,
                )


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _raise_together(error: BaseException | None, peers: Sequence[Any]) -> None:
    """Raise one rank's error on all: the others would wait for it."""
    if anywhere(error is not None, peers):
        raise error or RuntimeError(
            "chunk_size: memory ran out on another rank, with a single sample in each chunk"
        ) from None


def _budget(budget: Any, asked: list[Any]) -> int:
    number = integer("memory_budget", budget, "None or bytes, an int")
    if number < 1:
        wrong_value("memory_budget", "at least 1 byte", budget)
    if "auto" not in asked:
        wrong_value("memory_budget", "None, unless a chunk_size is 'auto'", budget)
    return number


def _chunk_sizes(chunk_size: Any, encoders: int) -> list[Any]:
    is_list = isinstance(chunk_size, Sequence) and not isinstance(chunk_size, str)
    sizes = []
    for size in chunk_size if is_list else [chunk_size] * encoders:
        if not (isinstance(size, str) and size == "auto"):
            size = integer("chunk_size", size, 'an int or "auto", or one per encoder')
            if size < 1:
                wrong_value("chunk_size", "at least 1", chunk_size)
        sizes.append(size)
    if len(sizes) != encoders:
        wrong_value("chunk_size", f"one for all, or one for each of the {encoders} encoders", chunk_size)
    return sizes

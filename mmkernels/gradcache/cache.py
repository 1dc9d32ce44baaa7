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

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels.gradcache.attempts import Attempts
from mmkernels.gradcache.auto import AutoSize, split_together
from mmkernels.gradcache.chunks import split
from mmkernels.gradcache.deferred import Deferred
from mmkernels.gradcache.passes import Passes
from mmkernels.gradcache.receivers import ByTrainer, IntoGrad, Receiver
from mmkernels.gradcache.replay import batch_norms
from mmkernels.gradcache.step import Step
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
    whose rows are embeddings, or an output in which `get_rep` finds them (a dict, a dataclass, a tuple); the rows of
    all chunks, concatenated, go to the loss.

    Both forward passes run under the caller's autocast, both backward passes outside it. Dropout and anything else that
    draws from PyTorch's CPU and CUDA generators, `numpy.random`'s global one and Python's `random` draws the same
    numbers in both passes; afterwards the generators are as after one forward. Other state that changes between the
    passes (the encoder's own generator, a counter, a clock) would make the gradients wrong: the embeddings of both
    passes are compared, and a difference beyond rounding raises. An encoder whose parameters are all frozen does not
    run a second time. When every input is a single chunk there is nothing to cache and one plain step is taken.

    **Token losses.** With `token_loss_fn` an encoder may return a tuple that begins with the embeddings, and each chunk
    of samples also has losses over its tokens (masked words, captions), computed in the second pass, which has the
    graph:

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

    **Accumulated batches.** Calls add to `.grad`, so the mean over K batches takes `scale_loss=lambda loss: loss / K`
    and one optimizer step after K calls; all but the last under each wrapper's `no_sync()`.

    **In a trainer** that runs the backward itself, `as_loss` gives a loss that it can run it on. A trainer that wants
    to be called instead of torch's backward (Lightning's `manual_backward`, Accelerate's `backward`) is `backward`.

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
        get_rep: `output of an encoder -> embeddings [rows, ...]`, for all encoders or one per encoder, None for those
            that return embeddings. With `token_loss_fn` it replaces the rule that a tuple begins with them; that
            function still gets whole outputs.
        backward: `scalar -> anything`: runs the backward of a scalar, and may multiply it by the same factor every time
            (a loss scale, 1 / accumulated batches). It is called once for each chunk with `sum <embeddings, their
            gradient>` and the chunk's token loss, before that with `sum <parameter, its gradient>` for the loss's own
            parameters, if any. Gradients are those of the call without it, times that factor. The gradient of the
            embeddings themselves is computed by torch, without the factor: where that scales float16, encoders should
            return float32, or `as_loss` be used.

    Raises:
        TypeError: an argument, an input or an encoder's output of the wrong type.
        ValueError: a chunk size below 1, a wrong number of inputs, members of one input with different numbers of
            samples, DistributedDataParallel with a static graph, or, under fully_shard with fixed sizes, different
            numbers of chunks on different ranks.
        RuntimeError: the second pass of an encoder or of a token loss differs from the first; `backward` did not run
            one; or, with automatic sizes, another rank ran out of memory even with single samples (and raises the
            allocator's error).
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
        get_rep: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
        backward: Callable[[Tensor], Any] | None = None,
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
        if backward is not None and not callable(backward):
            wrong_type("backward", "None or a callable", backward)
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
        self._reps, self._backward = _reps(get_rep, len(self.encoders)), backward
        auto = AutoSize(self._tower, len(self.encoders), token_loss_fn, asked, memory_budget)
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
        self._expect_inputs(inputs)
        if scale_loss is not None and not callable(scale_loss):
            wrong_type("scale_loss", "a callable", scale_loss)
        scale_loss, modules = scale_loss or _as_it_is, self._modules()
        receiver = IntoGrad() if self._backward is None else ByTrainer(self._backward)

        def make(chunks: list[list[Any]]) -> Step:
            return self._step(chunks, modules, scale_loss, receiver)

        if self._auto is not None:
            return self._attempts(self._auto, inputs, modules, make).run(Step.run)[1]
        return make(self._split(inputs)).run()

    def as_loss(self) -> Callable[..., Any]:
        """A loss for a trainer that runs the backward itself.

        The function that this returns takes what `__call__` takes, except `scale_loss`, and returns the same, but the
        loss has a graph: it runs the first pass and the loss, and the loss's backward runs the rest. Then parameters
        get what `__call__` would have given them, times the gradient that the loss itself gets: a loss scale, one over
        the number of accumulated batches, another factor of a sum of losses:

            loss = cache.as_loss()(images, texts)
            (loss / 4 + other).backward()                  # or trainer.backward(loss), scaler.scale(loss).backward()

        The backward may come any time later, after that of other losses too, and once; a loss without one leaves
        nothing behind. Random numbers, autocast and DistributedDataParallel's `no_sync` are as they were in the
        forward. Under `torch.no_grad()` the loss has no graph, and neither has it if it depends on nothing trainable.

        Each parameter's gradient is accumulated once, in the trainer's backward, where hooks expect it. So the whole
        model may be in one DistributedDataParallel whose forward returns the loss, and `torch.autograd.grad` works.
        This needs memory for one more gradient of each parameter while gradients of an earlier batch are there. The
        same holds for tensors of the inputs that other modules have made. Checkpoints in an encoder need
        `use_reentrant=False`. If instead encoders are wrapped themselves (DistributedDataParallel, fully_shard), their
        parameters get their gradient chunk by chunk within that backward, as in `__call__`.

        With automatic sizes, if memory runs out in the backward, the step restarts from the random state of its
        forward: `loss_fn` runs again, and gradients are those of chunks of the new sizes, the loss that of the old.

        Raises:
            ValueError: the GradCache has a `backward`.
            RuntimeError: in the backward: a second one of the same loss, or `create_graph=True`.
            NotImplementedError: automatic sizes with a loss whose parameters are under fully_shard.
        """
        if self._backward is not None:
            wrong_value("backward", "None for as_loss, whose backward is the trainer's", self._backward)
        return self._deferred

    def _deferred(self, *inputs: Any) -> Any:
        # A model that is compiled whole breaks here; encoders that are compiled themselves stay so. Not a decorator: it
        # would import torch._dynamo, which takes 1.4 s.
        return torch.compiler.disable(self._loss_of)(*inputs)

    def _loss_of(self, *inputs: Any) -> Any:
        self._expect_inputs(inputs)
        modules = self._modules()

        def make(chunks: list[list[Any]]) -> Step:
            return self._step(chunks, modules, _as_it_is, IntoGrad())

        if self._auto is not None:
            return Deferred(inputs, modules, None, self._attempts(self._auto, inputs, modules, make)).forward()
        return Deferred(inputs, modules, make(self._split(inputs)), None).forward()

    def _expect_inputs(self, inputs: Sequence[Any]) -> None:
        if len(inputs) != len(self.encoders):
            wrong_value("inputs", f"{len(self.encoders)}, one per encoder", len(inputs))

    def _modules(self) -> list[nn.Module]:
        return list({id(m): m for f in (*self.encoders, self.token_loss_fn) for m in modules_behind(f)}.values())

    def _split(self, inputs: Sequence[Any]) -> list[list[Any]]:
        if self.token_loss_fn is not None:
            return split_together(inputs, self.chunk_sizes[0])
        return [split(x, n, f"inputs[{i}]") for i, (x, n) in enumerate(zip(inputs, self.chunk_sizes, strict=True))]

    def _attempts(
        self, auto: AutoSize, inputs: Sequence[Any], modules: list[nn.Module], make: Callable[[list[list[Any]]], Step]
    ) -> Attempts:
        def told(sizes: list[int]) -> None:
            self.chunk_sizes = sizes

        return Attempts(auto, inputs, modules, self.group, make, told)

    def _tower(self, i: int, chunks: list[Any]) -> Tower:
        rep, name = self._reps[i]
        more = self.token_loss_fn is not None
        return Tower(self.encoders[i], chunks, f"encoders[{i}]", more, self.check_passes, rep, name)

    def _step(
        self,
        chunks: list[list[Any]],
        modules: list[nn.Module],
        scale_loss: Callable[[Tensor], Tensor],
        receiver: Receiver,
    ) -> Step:
        towers = [self._tower(i, parts) for i, parts in enumerate(chunks)]
        self._warn_of_batch_norm(towers)
        passes = Passes("token_loss_fn", modules) if self.check_passes else None
        token = None if self.token_loss_fn is None else TokenLoss(self.token_loss_fn, self.group, passes)
        step = Step(towers, self.loss_fn, token, scale_loss, modules, group=self.group, on_embedded=self.on_embedded)
        step.receiver = receiver
        return step

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


def _reps(get_rep: Any, encoders: int) -> list[tuple[Callable[[Any], Any] | None, str]]:
    """Of each encoder: what finds its embeddings, and its name in messages."""
    if get_rep is None or callable(get_rep):
        return [(get_rep, "get_rep")] * encoders
    if not isinstance(get_rep, Sequence) or isinstance(get_rep, str):
        wrong_type("get_rep", "None, a callable, or one per encoder", get_rep)
    if len(get_rep) != encoders:
        wrong_value("get_rep", f"one for all, or one for each of the {encoders} encoders", get_rep)
    for i, each in enumerate(get_rep):
        if each is not None and not callable(each):
            wrong_type(f"get_rep[{i}]", "None or a callable", each)
    return [(each, f"get_rep[{i}]") for i, each in enumerate(get_rep)]

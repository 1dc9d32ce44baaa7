"""One step of gradient caching in three passes, and how it aborts when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.gradcache.backward import Undo, backward, leaves, out_of_memory
from mmkernels.gradcache.receivers import IntoGrad, Receiver
from mmkernels.gradcache.replay import kept
from mmkernels.gradcache.sync import Sync, anywhere, reduced
from mmkernels.gradcache.tokens import TokenLoss
from mmkernels.gradcache.tower import Tower
from mmkernels.ops.checks import wrong_type, wrong_value

__all__ = ["RanOut", "Step"]

# Chunks that share one backward: (tower, index of its chunk).
Bundle = list[tuple[Tower, int]]


class RanOut(Exception):  # noqa: N818  an event, not an error
    """Memory ran out, and the step can be undone. No towers: it ran out on another rank."""

    def __init__(self, towers: Sequence[Tower], cause: BaseException | None) -> None:
        super().__init__()
        self.towers, self.cause = towers, cause


@dataclass
class _Made:
    """The results of a bundle's forward: outputs of its encoders, sums of the token objectives."""

    outputs: list[Any]
    sums: dict[str, Tensor]


@dataclass
class Step:
    """Forward and backward of one batch.

    Args:
        towers: the encoders with their chunks.
        loss_fn: of the embeddings.
        token: the loss per token, if any; then all towers have the same number of chunks.
        scale_loss: applied to every part of the loss before its backward.
        modules: all that may run: those of the encoders and of the token loss.
        undo: under automatic sizes, when shards are gathered: raise `RanOut` instead of the allocator's error.
        peers: under automatic sizes: process groups whose ranks must restart together.
        group: the ranks that train together, if known: they agree on what no rank uses and on plain steps.
        on_embedded: told each encoder's number and embeddings.
        receiver: where gradients go.
        graph: whether there will be a backward.
        later: whether other steps may come between `begin` and `finish`.
    """

    towers: list[Tower]
    loss_fn: Callable[..., Any]
    token: TokenLoss | None
    scale_loss: Callable[[Tensor], Tensor]
    modules: list[nn.Module]
    undo: Undo | None = None
    peers: Sequence[Any] = ()
    group: Any = None
    on_embedded: Callable[[int, Tensor], None] | None = None
    receiver: Receiver = field(default_factory=IntoGrad)
    graph: bool = True
    later: bool = False

    def __post_init__(self) -> None:
        self._at_once = self._plain = False
        self._made: list[_Made] = []
        self._output: Any = None

    def trainable(self) -> bool:
        """After `begin`: whether a backward has anything to do, as far as can be seen."""
        return _loss_of(self._output).requires_grad or self.token is not None

    def own_leaves(self) -> list[Tensor]:
        """After `begin`: what the loss sends gradients to besides the embeddings."""
        embeddings = {id(tower.embeddings) for tower in self.towers}
        return [leaf for leaf in leaves(_loss_of(self._output)) if id(leaf) not in embeddings]

    def run(self) -> Any:
        """All three passes; returns what `begin` does."""
        result = self.begin()
        self.finish()
        return result

    def begin(self) -> Any:
        """Pass 1 and the forward of pass 2.

        When every encoder has one chunk there is nothing to cache: pass 3 reuses the graph of pass 1. Several ranks can
        do this if they know that none has more chunks, since all must communicate in the same order.

        Returns:
            what `loss_fn` returned, the loss detached; with a token loss, the whole loss first and its parts last.
        """
        sync, bundles = Sync(self.modules), self._bundles()
        sync.expect_equal([len(tower.chunks) for tower in self.towers], gathered=self.undo is not None)
        # A wrapper reduces in the backward after its last forward only, which may be that of another loss.
        later = self.later and bool(sync.ddp)
        self._at_once = not self.peers and not later and self._single(sync)
        self._plain = self._at_once and bool(sync.ddp)
        if self._plain:
            # One graph from the inputs to the loss: a wrapper reduces in the one backward that reaches all of it.
            self._made = self._embed_all(bundles, keep=True, join=self.on_embedded is not None)
            outputs = [out for each in self._made for out in each.outputs]
            self._output = self.loss_fn(*(t.embedding(out) for t, out in zip(self.towers, outputs, strict=True)))
        else:
            self._cached(sync, bundles)
        if self.token is not None:
            self.token.settle()
        return self._result(self._output)

    def _cached(self, sync: Sync, bundles: list[Bundle]) -> None:
        if self.graph and not self._at_once:
            sync.expect_no_static_graph()
        with nullcontext() if self._at_once else sync.held():
            # 1. Embed without gradients. Clear autocast's weight cache: filled under no_grad, it would cut off pass 3.
            with torch.set_grad_enabled(self._at_once and torch.is_grad_enabled()):
                self._made = self._embed_all(bundles, self._at_once)
            if not self._at_once:
                torch.clear_autocast_cache()

            # 2. Loss on the detached embeddings of the whole batch; `.grad` of these is the cache.
            self._output = self.loss_fn(*(tower.embeddings for tower in self.towers))

    def finish(self) -> None:
        """The backward of pass 2, and pass 3: once, after `begin`."""
        sync, made = Sync(self.modules), self._made
        if self._plain:
            parts = [self.scale_loss(_loss_of(self._output))]
            if self.token is not None:
                parts.append(self.scale_loss(self.token.part(made[-1].sums)))
            self._reduce(self.modules, parts, [None] * len(parts))
            return
        with nullcontext() if self._at_once else sync.held():
            from_loss = leaves(_loss_of(self._output))
            self._backward_loss(self._output)

        # 3. Re-embed with gradients, backward from the cache. Only the last backward reduces gradients.
        if self._at_once:
            joined = _Made([out for each in made for out in each.outputs], made[-1].sums)
            with self._may_run_out(self.towers):
                self._backward([pair for bundle in self._bundles() for pair in bundle], joined)
            return
        for first, last in self._order():
            with kept(self.modules):
                with sync.held(), self._all_or_none():
                    self._embed_again_and_backward(first)
                with self._may_run_out(self.towers, reducing=True):
                    self._backward(last, self._embed_again(last), from_loss)
        for passes in (*(tower.passes for tower in self.towers), self.token and self.token.passes):
            if passes is not None:
                passes.settle()

    def _single(self, sync: Sync) -> bool:
        """Whether every encoder has one chunk; with gradients to reduce, on every rank."""
        single = all(len(tower.chunks) == 1 for tower in self.towers)
        if not sync.ddp_over_ranks():
            return single
        return self.group is not None and not anywhere(not single, [self.group])

    def _reduce(
        self,
        modules: list[nn.Module],
        outputs: list[Tensor],
        gradients: list[Tensor | None],
        from_loss: Sequence[Tensor] = (),
    ) -> bool:
        """The backward in which the wrappers among some modules reduce; False if nothing in it needs gradients.

        A reducer waits for every parameter of its wrapper, so those that the outputs do not depend on get zeros. What
        no rank has used is left without a gradient, as on one rank, if the ranks are known.
        """
        sync = Sync(modules)
        wrapped, known = sync.awaited(from_loss), {id(leaf) for leaf in from_loss}
        reached = {id(leaf) for out in outputs for leaf in leaves(out)} if wrapped else set()
        missing = [p for p in wrapped if id(p) not in reached]
        used = [id(p) in reached or id(p) in known or p.grad is not None for p in wrapped]
        live = self.receiver(outputs, gradients, self.undo)
        # After it: buckets are reduced once they are complete, and what the loss sends backward must come in the same
        # order on every rank.
        backward(missing, [*map(torch.zeros_like, missing)], self.undo)
        if wrapped and self.group is not None:
            anyone = reduced(used, self.group, "max").tolist()
            for parameter in (p for p, so in zip(wrapped, anyone, strict=True) if not so):
                parameter.grad = None
        return live

    def _bundles(self) -> list[Bundle]:
        """The order of pass 1: encoder by encoder; with a token loss, all encoders chunk by chunk."""
        if self.token is not None:
            return [[(tower, i) for tower in self.towers] for i in range(len(self.towers[0].chunks))]
        return [[(tower, i)] for tower in self.towers for i in range(len(tower.chunks))]

    def _embed_all(self, bundles: list[Bundle], keep: bool, join: bool = True) -> list[_Made]:
        """Pass 1. What is told of an encoder may be sent to other ranks, so that under automatic sizes nothing is until
        all ranks have had enough memory."""
        made, told = [], 0
        with self._all_or_none():
            for bundle in bundles:
                made.append(self._embed(bundle, keep))
                for tower, i in bundle:
                    if join and i == len(tower.chunks) - 1:
                        tower.join(self.graph)
                if not self.peers:
                    told = self._tell(told)
        self._tell(told)
        return made

    def _tell(self, told: int) -> int:
        """Tell of the encoders that are through, in their order, from one on; returns how many have been told of."""
        while told < len(self.towers) and self.towers[told].through:
            if self.on_embedded is not None:
                self.on_embedded(told, self.towers[told].embeddings.detach())
            told += 1
        return told

    def _embed(self, bundle: Bundle, keep: bool) -> _Made:
        """Pass 1 of a bundle. Its results are kept only if they have a graph."""
        with self._may_run_out([tower for tower, _ in bundle]):
            outputs = [tower.first(i) for tower, i in bundle]
            sums = {} if self.token is None else self.token.first(outputs, _inputs(bundle), self._devices())
        return _Made(outputs if keep else [], sums if keep else {})

    def _backward_loss(self, output: Any) -> None:
        loss = _loss_of(output)
        embeddings = [tower.embeddings for tower in self.towers]
        if not self.receiver.of_loss(self.scale_loss(loss), embeddings, self.undo) and self.token is None:
            wrong_value("loss_fn: output", "a loss that depends on something trainable", loss)

    def _order(self) -> list[tuple[list[Bundle], Bundle]]:
        """The bundles of pass 3, wrapper by wrapper, and the one in which each wrapper reduces.

        A DDP reducer finishes in the one backward that reaches every parameter of its wrapper, so encoders that share
        a wrapper run their last chunks in one backward. On a rank whose loss needs none of them, the first runs its
        last chunk all the same, since the others wait.
        """
        if self.token is not None:
            bundles = self._bundles()
            return [(bundles[:-1], bundles[-1])]
        return [
            (
                [[(tower, i)] for tower in group if tower.cache for i in range(len(tower.chunks) - 1)],
                [(tower, len(tower.chunks) - 1) for tower in group],
            )
            for group in _sharing(self.towers)
        ]

    def _embed_again_and_backward(self, bundles: list[Bundle]) -> None:
        idle: set[int] = set()  # towers found to need no gradients
        for bundle in bundles:
            if id(bundle[0][0]) not in idle and not self._backward(bundle, self._embed_again(bundle)):
                idle.add(id(bundle[0][0]))

    def _embed_again(self, bundle: Bundle) -> _Made:
        """Pass 3 of a bundle: the results of pass 1, with their graph."""
        with self._may_run_out([tower for tower, _ in bundle]):
            outputs = [tower.again(i) for tower, i in bundle]
            sums = {} if self.token is None else self.token.again(bundle[0][1], outputs, _inputs(bundle))
        return _Made(outputs, sums)

    def _backward(self, bundle: Bundle, made: _Made, from_loss: Sequence[Tensor] | None = None) -> bool:
        """Backward of a bundle from the cache; False if nothing in it needs gradients. Wrappers reduce in one with the
        leaves `from_loss`, which have their gradients from the loss already."""
        outputs: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for (tower, i), out in zip(bundle, made.outputs, strict=True):
            if tower.cache:
                outputs.append(tower.embedding(out))
                gradients.append(tower.cache[i])
        if self.token is not None:
            outputs.append(self.scale_loss(self.token.part(made.sums)))
            gradients.append(None)
        with self._may_run_out([tower for tower, _ in bundle]):
            if from_loss is None:
                return self.receiver(outputs, gradients, self.undo)
            modules = self.modules if self.token is not None else [m for tower, _ in bundle for m in tower.modules]
            return self._reduce(modules, outputs, gradients, from_loss)

    def _result(self, output: Any) -> Any:
        loss, rest = _loss_of(output).detach(), []
        if isinstance(output, tuple):
            rest = [x.detach() if isinstance(x, Tensor) else x for x in output[1:]]
        if self.token is not None:
            return (self.token.total(loss), *rest, self.token.values)
        if not isinstance(output, tuple):
            return loss
        return type(output)._make([loss, *rest]) if hasattr(output, "_make") else (loss, *rest)

    def _devices(self) -> set[torch.device]:
        return {device for tower in self.towers for device in tower.devices}

    @contextmanager
    def _may_run_out(self, towers: Sequence[Tower], reducing: bool = False) -> Iterator[None]:
        """Turn the allocator's error into `RanOut`, except while peers wait in a collective."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RanOut):
                if reducing and self.peers and error.cause is not None:
                    raise error.cause from None
                raise
            if self.undo is None or not out_of_memory(error):
                raise
            raise RanOut(towers, error) from None

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """If one rank ran out inside, all restart: its embeddings will change, and with them every gradient."""
        short: RanOut | None = None
        try:
            yield
        except RanOut as error:
            short = error
        if anywhere(short is not None, self.peers):
            raise short or RanOut([], None)


def _inputs(bundle: Bundle) -> list[Any]:
    return [tower.chunks[i] for tower, i in bundle]


def _sharing(towers: list[Tower]) -> list[list[Tower]]:
    """The towers to run again, grouped by shared wrapper, in an order that is the same on every rank."""
    groups: list[tuple[set[int], list[Tower]]] = []
    for tower in towers:
        wrappers, members = tower.sync.ids(), [tower]
        for other in [group for group in groups if group[0] & wrappers]:
            groups.remove(other)
            wrappers, members = wrappers | other[0], other[1] + members
        groups.append((wrappers, members))
    needed = [
        [t for t in members if t.cache] or [t for t in members[:1] if t.sync.ddp_over_ranks()] for _, members in groups
    ]
    return [members for members in needed if members]


def _loss_of(output: Any) -> Tensor:
    loss = output[0] if isinstance(output, tuple) and output else output
    expected = "a scalar tensor, or a tuple that begins with one"
    if not isinstance(loss, Tensor):
        wrong_type("loss_fn: output", expected, output)
    if loss.numel() != 1:
        wrong_value("loss_fn: output", expected, loss)
    return loss

"""One encoder's part of a step, and the modules behind an encoder."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.gradcache.chunks import Args, tensors
from mmkernels.gradcache.passes import Passes
from mmkernels.gradcache.replay import RandomState, cuda_devices
from mmkernels.gradcache.sync import Sync
from mmkernels.ops.checks import describe, wrong_type, wrong_value

__all__ = ["Encoder", "Tower", "modules_behind"]

Encoder = Callable[..., Any]


@dataclass
class Tower:
    """One encoder and the chunks of its input.

    Args:
        encoder: the callable.
        chunks: at least one.
        name: its name in messages.
        more: whether its output may be a tuple that begins with the embeddings.
        compared: whether pass 3 is compared with pass 1.
        get_rep: finds the embeddings in its output; None: they are the output, or what it begins with.
        rep_name: its name in messages.
    """

    encoder: Encoder
    chunks: list[Any]
    name: str
    more: bool = False
    compared: bool = False
    get_rep: Callable[[Any], Any] | None = None
    rep_name: str = "get_rep"
    states: list[RandomState] = field(default_factory=list)  # before each chunk of pass 1
    parts: list[Tensor] = field(default_factory=list)  # embeddings of each chunk, detached
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))  # [all rows, ...], detached

    def __post_init__(self) -> None:
        self.modules = modules_behind(self.encoder)
        self.sync = Sync(self.modules)
        parameters = (p for module in self.modules for p in module.parameters())
        self.passes = Passes(self.name, self.modules) if self.compared else None
        self.devices = cuda_devices(itertools.chain(parameters, tensors(self.chunks[0])))

    def run(self, chunk: Any) -> Any:
        """The encoder's output, checked."""
        given = chunk if isinstance(chunk, Args) else Args(chunk)
        # Some encoders write their results into the dict that they are given: activations that would stay.
        out = self.encoder(*(dict(x) if type(x) is dict else x for x in given.args), **given.kwargs)
        rows, name, expected = self.embedding(out), f"{self.name}: output", "a floating-point tensor [rows, ...]"
        if self.get_rep is not None:
            name = f"{self.rep_name}: output"
        elif self.more:
            expected += " or a tuple that begins with one"
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            if self.get_rep is None and not isinstance(out, Tensor):
                expected += " (get_rep finds it in an output of another kind)"
            wrong_type(name, expected, _brief(rows if self.get_rep is not None else out))
        if rows.ndim == 0:
            wrong_value(name, expected, rows)
        return out

    def embedding(self, output: Any) -> Any:
        """The part of the encoder's output that goes to the loss."""
        if self.get_rep is not None:
            return self.get_rep(output)
        return output[0] if self.more and isinstance(output, tuple) and output else output

    def first(self, i: int) -> Any:
        """Pass 1 of chunk i, without gradients."""
        self.states.append(RandomState.now(self.devices))
        out = self.run(self.chunks[i])
        self.parts.append(self.embedding(out).detach())
        return out

    def again(self, i: int) -> Any:
        """Pass 3: chunk i as in pass 1, with its graph."""
        with self.states[i].replayed():
            out = self.run(self.chunks[i])
        if self.passes is not None:
            self.passes.compare(f"chunk {i + 1} of {len(self.chunks)}", self.parts[i], self.embedding(out))
        return out

    def join(self, graph: bool = True) -> None:
        """The embeddings of the whole batch, with a graph ready to receive their gradient."""
        self.embeddings = torch.cat(self.parts).requires_grad_(graph and not self.frozen())

    @property
    def through(self) -> bool:
        """Whether all chunks have been embedded."""
        return len(self.parts) == len(self.chunks)

    @property
    def cache(self) -> list[Tensor]:
        """The gradient of each chunk's embeddings; empty if frozen, or if the loss does not use them."""
        grad = self.embeddings.grad
        return [] if grad is None else list(grad.split([len(part) for part in self.parts]))

    def frozen(self) -> bool:
        """Whether it certainly has no trainable parameters. A partial or closure may reach some that we cannot see."""
        known = isinstance(self.encoder, nn.Module) or isinstance(getattr(self.encoder, "__self__", None), nn.Module)
        parameters = [p for module in self.modules for p in module.parameters()]
        if not known or not parameters or any(p.requires_grad for p in parameters):
            return False
        return not any(tensor.requires_grad for chunk in self.chunks for tensor in tensors(chunk))


def _brief(output: Any) -> Any:
    """For a message: without the values of tensors."""
    if isinstance(output, Mapping):
        return {key: describe(value) if isinstance(value, Tensor) else type(value) for key, value in output.items()}
    return output


def modules_behind(function: Any) -> list[nn.Module]:
    """The modules that a callable reaches: itself, the owner of a bound method, the parts of a partial, an object's
    attributes, a function's closure and the globals it names."""
    return list({id(m): m for m in _reach(function)}.values())


def _reach(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
        return
    parts: list[Any] = []
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__self__]
    elif inspect.isfunction(value):
        closed = [cell for cell in map(_contents, value.__closure__ or ()) if _may_reach(cell, functions=True)]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        parts = closed + [part for part in named if _may_reach(part, functions=False)]
    elif isinstance(value, (list, tuple, dict)):
        parts = [part for part in (value.values() if isinstance(value, dict) else value) if isinstance(part, nn.Module)]
    elif callable(value) and not isinstance(value, type):
        parts = [part for part in getattr(value, "__dict__", {}).values() if _may_reach(part, functions=True)]
    for part in parts if depth else ():
        yield from _reach(part, depth - 1)


def _may_reach(value: Any, functions: bool) -> bool:
    """Global functions that a function names are not followed: they lead all over a program."""
    kinds = (nn.Module, functools.partial, list, tuple, dict)
    return isinstance(value, kinds) or inspect.ismethod(value) or (functions and inspect.isfunction(value))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None

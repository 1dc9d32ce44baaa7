"""One helper: schema + fake + implementations + autograd -> torch op.

An op here has one schema whose last argument names the backend, and one implementation per backend with the same
arguments less that one. `Op.__call__` takes the cheapest road that differentiates:

    being compiled          the bare op (AOTAutograd uses its registered formula)
    functorch transform     an autograd.Function with setup_context (registered formulas fail under torch.func.grad)
    gradient needed         an autograd.Function whose forward takes ctx
    otherwise               the op below autograd

`torch.ops.mmkernels.*` differentiates too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Op"]

_library = torch.library.Library("mmkernels", "FRAGMENT")


class Op:
    """A torch op `mmkernels::<name>` that differentiates.

    Args:
        name: `<family>_<what>_fwd` or `_bwd`.
        schema: `(Tensor x, ..., str backend) -> ...`; the backend comes last.
        impls: backend -> function of the arguments without `backend`.
        fake: function of all arguments that gives outputs of the right shape, stride and dtype.
        setup_context: `(ctx, inputs, output)`; saves what backward needs.
        backward: `(ctx, *grad_outputs)` -> one gradient per input, `backend` included. Without it the op has no
            gradient, and asking for one raises.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        impls: Mapping[str, Callable[..., Any]],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.impls = dict(impls)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Explicit device keys: a CompositeExplicitAutograd kernel would be traced instead of the fake.
        for key in ("CPU", "CUDA"):
            _library.impl(name, self._run, key)
        torch.library.register_fake(f"mmkernels::{name}", fake, lib=_library)
        self._op = getattr(torch.ops.mmkernels, name).default
        setup_context = setup_context or _save_nothing
        backward = backward or _no_gradient(name)
        torch.library.register_autograd(f"mmkernels::{name}", backward, setup_context=setup_context, lib=_library)
        self._fast, self._functorch = _functions(name, self._below_autograd, setup_context, backward)

    def _run(self, *args: Any) -> Any:
        return self.impls[args[-1]](*args[:-1])

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(*args)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._op(*args)
        if torch._C._are_functorch_transforms_active():
            return self._functorch.apply(*args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return self._fast.apply(*args)
        if type(args[0]) is torch.Tensor:
            return self._below_autograd(*args)
        return self._op(*args)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(f"mmkernels::{name} has no gradient formula (double backward is not supported)")

    return backward


def _functions(
    name: str, run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The two autograd.Functions of an op: the quick one, and the one that functorch can see through."""

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return backward(ctx, *grads)

    class Functorch(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return run(*args)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return backward(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _loop_over_batch(Functorch.apply, info.batch_size, in_dims, args)

    Functorch.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    Fast.__name__, Functorch.__name__ = name, f"{name}_functorch"
    return Fast, Functorch


def _loop_over_batch(
    call: Callable[..., Any], batch_size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap by a loop: these kernels fill the machine with one sample, so there is nothing to gain from batching."""
    rows = []
    for i in range(batch_size):
        sliced = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
        rows.append(call(*sliced))
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows), 0
    outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)

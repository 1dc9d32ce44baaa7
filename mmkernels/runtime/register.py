"""Build a torch op from a typed fake, implementations and derivatives.

The fake's annotated signature is the op's schema; one more argument, the last, names the backend. Implementations,
checks and FLOP formulas take the fake's arguments. `Op.__call__` takes the cheapest path that differentiates:

    being compiled          the bare op (AOTAutograd uses its registered formula)
    functorch transform     an autograd.Function with setup_context (registered formulas fail under torch.func.grad)
    gradient needed         an autograd.Function whose forward takes ctx
    otherwise               the op below autograd

`torch.ops.mmkernels.*` is differentiable too, in reverse mode. A derivative consists of ops, never of plain code over
detached tensors, so it is differentiable itself:

    f_fwd       y = f(x)
    f_bwd       (g, x) -> the gradient of <g, f(x)> by x
    f_second    (t, g, x) -> along the tangents t of x, the tangents of y and of that gradient

The tangent of y is forward mode; it is also the gradient of <t, f_bwd> by g. The Hessian of <g, f(x)> is symmetric: its
product with t is the tangent of f_bwd, and also the gradient of <t, f_bwd> by x. In reverse over forward mode, g is the
incoming gradient of the tangent of y, whose gradients are f_bwd by t and f_second by x. Third derivatives raise.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mmkernels.runtime import second as twice
from mmkernels.runtime.autograd import Context, Formulas
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.second import Second
from mmkernels.runtime.signature import Signature
from mmkernels.runtime.torch_op import TorchOp

__all__ = ["Context", "Op", "Second", "on_triton"]


def on_triton(module: str, name: str) -> Callable[..., Any]:
    """A Triton launcher, imported on its first call, because triton is optional."""

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    return lambda *args: launcher()(*args)


class Op(TorchOp):
    """A differentiable torch op, `mmkernels::<name>`.

    Args:
        name: `<family>_<what>_fwd` or `_bwd`.
        fake: returns outputs of the right shape, stride and dtype. Its arguments are tensors, numbers, bools, strings,
            and NamedTuples of those, whose fields become arguments of the torch op; their names must be unique.
        impls: backend -> function of the same arguments.
        check: function of the same arguments that raises on wrong values; runs before any backend.
        save: `(inputs, outputs)`, a NamedTuple of the arguments and a tuple -> what the derivatives need, a tuple of
            tensors, None, numbers and tuples.
        backward: `(ctx, *grads)`, where grads are None for outputs without one -> gradients by the name of the argument
            (or of a group's field). Without it, asking for a gradient raises.
        jvp: `(ctx, *tangents)`, one for each argument, None if it has none -> one tangent per output. Without it,
            forward mode raises.
        constant_outputs: how many of the last outputs have no derivative; `backward` and `jvp` do not see them.
        second: for a backward op; replaces `save`, `backward` and `jvp`.
        flops: function of the same arguments, what FlopCounterMode counts: 2 FLOP for each multiply-add of the products
            over visible pairs. Without it, nothing is counted.

    Attributes:
        second: the op of the second derivatives, if the op has one.
    """

    second: TorchOp

    def __init__(
        self,
        name: str,
        *,
        fake: Callable[..., Any],
        impls: Mapping[str, Callable[..., Any]],
        check: Callable[..., None] | None = None,
        save: Callable[..., tuple[Any, ...]] | None = None,
        backward: Callable[..., Mapping[str, Tensor | None]] | None = None,
        jvp: Callable[..., Any] | None = None,
        constant_outputs: int = 0,
        second: Second | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        super().__init__(name, Signature.of(fake), fake=fake, impls=impls, check=check, flops=flops)
        if second is None:
            self.differentiate(Formulas(name, self.signature, save, backward, jvp, constant_outputs).derivatives())
            return
        grads, wrt = len(second.grads), second.wrt
        assert self.signature.names[:grads] == second.grads, f"{name}: {second.grads} are not its first arguments"
        self.second = TorchOp(
            f"{name.removesuffix('_bwd')}_second",
            self.signature.along(wrt, second.grads),
            fake=second.fake,
            impls=dict.fromkeys(BACKENDS, second.run),
            flops=second.flops,
        )
        self.second.differentiate(twice.of_second(self, self.second, grads, wrt))
        self.differentiate(twice.of_backward(self, self.second, grads, wrt))

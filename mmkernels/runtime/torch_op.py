"""A torch op with several backends: its definition, and the path each call takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.runtime.autograd import Derivatives, functions
from mmkernels.runtime.flops import register_flops
from mmkernels.runtime.signature import Signature

__all__ = ["TorchOp"]

_library = torch.library.Library("mmkernels", "FRAGMENT")


class _Below(threading.local):
    """Whether this thread is inside an op that one of our autograd.Functions called."""

    autograd = False


_below = _Below()


class TorchOp:
    """`mmkernels::<name>`, differentiable once `differentiate` has been called; register.Op documents the arguments."""

    def __init__(
        self,
        name: str,
        signature: Signature,
        *,
        fake: Callable[..., Any],
        impls: Mapping[str, Callable[..., Any]],
        check: Callable[..., None] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.signature, self.impls, self._check = name, signature, dict(impls), check
        # A bare op would silently drop a tangent.
        self._no_forward_mode = (
            f"torch.ops.mmkernels.{name} has no forward mode (torch.func.jvp, jacfwd, forward_ad), "
            "called directly or under torch.compile; outside torch.compile, the functions of mmkernels support it"
        )
        _library.define(name + signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Explicit device keys: a CompositeExplicitAutograd kernel would be traced instead of the fake.
        for key in ("CPU", "CUDA"):
            _library.impl(name, self._run, key)
        torch.library.register_fake(f"mmkernels::{name}", lambda *flat: fake(*signature.group(*flat)), lib=_library)
        self._op = getattr(torch.ops.mmkernels, name).default
        if flops is not None:
            register_flops(getattr(torch.ops.mmkernels, name), lambda *flat: flops(*signature.group(*flat)))

    def differentiate(self, derivatives: Derivatives) -> None:
        torch.library.register_autograd(
            f"mmkernels::{self.name}", derivatives.backward, setup_context=derivatives.setup_context, lib=_library
        )
        self._fast, self._functorch = functions(self.name, self._below_autograd, derivatives)

    def _run(self, *flat: Any) -> Any:
        """What torch dispatches to: the backend's implementation, with the tensors' device current."""
        if forward_ad._current_level >= 0 and not _below.autograd:
            raise NotImplementedError(self._no_forward_mode)
        args = self.signature.group(*flat)
        if self._check is not None:
            self._check(*args)
        device = _device(flat)
        if device.type != "cuda":
            return self.impls[flat[-1]](*args)
        with torch.cuda.device(device):
            return self.impls[flat[-1]](*args)

    def _below_autograd(self, *flat: Any) -> Any:
        outer, _below.autograd = _below.autograd, True
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return self._op(*flat)
        finally:
            _below.autograd = outer

    def __call__(self, *args: Any) -> Any:
        """Call with the arguments of the op's functions, groups included, and the backend."""
        return self.flat(*self.signature.flatten(*args))

    def flat(self, *flat: Any) -> Any:
        """Call with the flat arguments of the torch op."""
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                raise NotImplementedError(self._no_forward_mode)
            return self._op(*flat)
        if torch._C._are_functorch_transforms_active():
            return self._functorch.apply(*flat)
        if forward_ad._current_level >= 0:
            return self._fast.apply(*flat)
        if torch.is_grad_enabled():
            for arg in flat:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return self._fast.apply(*flat)
        if type(flat[0]) is Tensor:
            return self._below_autograd(*flat)
        return self._op(*flat)


def _device(flat: Sequence[Any]) -> torch.device:
    for arg in flat:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, list):
            return _device(arg)
    raise AssertionError("an op without a tensor")

"""Check that the second pass computes what the first did; otherwise the gradients are wrong.

The global generators are replayed. An encoder's own generator, a counter in a module or a clock is not, and makes the
gradients wrong. So the embeddings of both passes are compared on the device, and the differences are read once per
step:

    difference = max over rows |second - first| / root mean square over rows |first|

Without a graph PyTorch may choose other kernels than with one, and some sum in another order. That costs a few
roundings; a redrawn dropout mask changes tens of percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from mmkernels.ops.checks import describe

__all__ = ["Passes"]

_ROUNDING = 1e-2
_ROUNDING_IN_HALF = 0.1  # where weights, embeddings or autocast are narrower than float32
_EXACT = 1e-5
_HINT = (
    "The gradients of this step are wrong. Both passes must compute the same values: the generators of torch, "
    "numpy.random and random are replayed, but a module's own generator, a counter in a module or a clock is not. "
    "GradCache(..., check_passes=False) skips the comparison."
)


class Passes:
    """The differences of an encoder's embeddings, or of the counts of a token loss, in one step.

    Args:
        name: their owner's name in messages.
        modules: the modules behind it, whose dtypes set the tolerance.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self._name, self._modules = name, modules
        self._found: list[tuple[str, Tensor, bool]] = []
        self._half = False

    @torch.no_grad()
    def compare(self, what: str, first: Tensor, second: Tensor, *, exact: bool = False) -> None:
        """Record how far the rows of `second` are from those of `first`.

        Raises:
            RuntimeError: they differ in shape.
        """
        if first.shape != second.shape:
            got = f"expected {describe(first)} as in the first pass, got {describe(second)}"
            raise RuntimeError(f"{self._name}: {what}: {got} in the second. {_HINT}")
        if first.numel():
            self._half = self._half or (first.is_floating_point() and torch.finfo(first.dtype).bits < 32)
            a = first.reshape(len(first), -1).double()  # in float64, squares do not overflow
            scale = torch.linalg.vector_norm(a) / len(a) ** 0.5
            distance = torch.linalg.vector_norm(second.reshape(a.shape).double() - a, dim=1).amax()
            self._found.append((what, distance / scale, exact))

    def settle(self) -> None:
        """Read the differences. Waits for the device.

        Raises:
            RuntimeError: one is too large. Values that are non-finite in both passes pass: they show by themselves.
        """
        if not self._found:
            return
        distances = torch.stack([distance for _, distance, _ in self._found]).tolist()
        for (what, _, exact), distance in zip(self._found, distances, strict=True):
            most = _EXACT if exact else _ROUNDING
            if distance > most and (exact or distance > _ROUNDING_IN_HALF or not self._in_half()):
                raise RuntimeError(
                    f"{self._name}: {what}: expected the second pass to match the first, got a relative difference of "
                    f"{distance:.1e}. {_HINT}"
                )

    def _in_half(self) -> bool:
        if self._half or any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            return True
        held = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in self._modules)
        return any(t.is_floating_point() and torch.finfo(t.dtype).bits < 32 for t in held)

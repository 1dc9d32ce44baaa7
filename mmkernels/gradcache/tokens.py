"""Token losses of the second pass: sums over a chunk, divided by counts over the whole batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmkernels.gradcache.passes import Passes
from mmkernels.gradcache.replay import RandomState
from mmkernels.gradcache.sync import reduced
from mmkernels.ops.checks import real, wrong_type, wrong_value

__all__ = ["TokenLoss"]

_EXPECTED = "(sum, count), or a dict of such pairs"


class TokenLoss:
    """`token_loss_fn` in one step: the first pass counts every chunk, then each chunk is a part of the loss.

    With W ranks in the group, an objective is `sum over ranks and chunks / count over ranks and chunks`; a rank's part
    is W times its share, which DDP's mean over the ranks undoes.

    Args:
        function: `(outputs, inputs)` of one chunk -> (sum, count) or {objective: (sum, count)}.
        group: process group that counts are summed over, or None.
        passes: compares the counts of both passes, or None.
    """

    def __init__(self, function: Callable[..., Any], group: Any, passes: Passes | None = None) -> None:
        self._function, self._group, self.passes = function, group, passes
        self._seen: list[dict[str, Tensor]] = []  # counts of each chunk
        self._states: list[RandomState] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._factors: dict[str, float] = {}
        self.values: dict[str, Tensor] = {}  # after `settle`: each objective over the whole batch

    def first(self, outputs: list[Any], inputs: list[Any], devices: Iterable[torch.device]) -> dict[str, Tensor]:
        """Count one chunk, and return its sums."""
        self._states.append(RandomState.now(devices))
        terms = self._terms(outputs, inputs)
        if self._sums and terms.keys() != self._sums.keys():
            wrong_value("token_loss_fn: output", f"the objectives of the first chunk, {list(self._sums)}", list(terms))
        self._seen.append({name: torch.as_tensor(count).detach() for name, (_, count) in terms.items()})
        for name, (total, _) in terms.items():
            self._sums[name] = self._sums.get(name, 0) + total.detach().double()
            self._counts[name] = self._counts.get(name, 0) + self._seen[-1][name].double().cpu()
        return {name: total for name, (total, _) in terms.items()}

    def settle(self) -> None:
        """After the first pass over every chunk: the counts are now known."""
        names = list(self._sums)
        sums = torch.stack([self._sums[name].cpu() for name in names])
        counts = torch.stack([self._counts[name] for name in names])
        ranks = 1
        if self._group is not None:
            ranks = self._group.size()
            mark = zlib.crc32(repr(names).encode())
            if reduced([mark, -mark], self._group, "max").tolist() != [mark, -mark]:
                wrong_value("token_loss_fn: output", "the same objectives on every rank", names)
            sums, counts = reduced(torch.stack([sums, counts]), self._group)
        safe = counts.where(counts != 0, 1.0)
        self._factors = {name: ranks / n for name, n in zip(names, safe.tolist(), strict=True)}
        self.values = {
            name: (total / n).float().to(self._sums[name].device)
            for name, total, n in zip(names, sums, safe, strict=True)
        }

    def again(self, i: int, outputs: list[Any], inputs: list[Any]) -> dict[str, Tensor]:
        """The sums of chunk i in the second pass, with the random numbers of the first."""
        with self._states[i].replayed():
            terms = self._terms(outputs, inputs)
        seen = self._seen[i]
        if terms.keys() != seen.keys():
            wrong_value("token_loss_fn: output", f"the objectives of the first pass, {list(seen)}", list(terms))
        if self.passes is not None:
            # Sums may differ: their gradient is right for the numbers drawn here, as long as the count is.
            for name, (total, count) in terms.items():
                counts = (torch.as_tensor(n).detach().to(total.device).reshape(1, 1) for n in (seen[name], count))
                self.passes.compare(f"count of {name} in chunk {i + 1} of {len(self._seen)}", *counts, exact=True)
        return {name: total for name, (total, _) in terms.items()}

    def part(self, sums: dict[str, Tensor]) -> Tensor:
        """A chunk's share of the loss."""
        return torch.stack([factor * sums[name].float() for name, factor in self._factors.items()]).sum()

    def total(self, loss: Tensor) -> Tensor:
        """The embedding loss with every objective added."""
        return loss.detach() + sum(value.to(loss.device, loss.dtype) for value in self.values.values())

    def _terms(self, outputs: list[Any], inputs: list[Any]) -> dict[str, Any]:
        out = self._function(outputs, inputs)
        terms = out if isinstance(out, dict) else {"token_loss": out}
        if not terms:
            wrong_value("token_loss_fn: output", _EXPECTED, out)
        checked = {}
        for name, pair in terms.items():
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Tensor):
                wrong_type(f"token_loss_fn: {name}", _EXPECTED, pair)
            total, count = pair
            if total.numel() != 1 or not total.is_floating_point():
                wrong_value(f"token_loss_fn: {name}", "a sum, a floating-point scalar tensor", total)
            if isinstance(count, Tensor) and count.numel() == 1:
                count = count.reshape(())
            else:
                count = real(f"token_loss_fn: {name}", count, "a count, a number or a scalar tensor")
            checked[name] = total.reshape(()), count
        return checked

"""Keys of all ranks that are on their way before the loss which needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.ops.checks import expect_tensor, expect_true, integer, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.gather import gather_into
from mmkernels.runtime.groups import device_of_numbers

__all__ = ["GatheredKeys", "check_gathered", "gather_keys"]


class GatheredKeys:
    """What `gather_keys` returns, for one call of `infonce` or `siglip`.

    Attributes:
        keys: [M, E] of this rank as they were sent, without gradient.
        counts: rows of every rank.
        group: whose ranks.
    """

    def __init__(self, keys: Tensor, counts: Sequence[int], group: Any) -> None:
        self.counts, self.group = list(counts), group
        longest = max(self.counts)
        padded = keys.new_zeros(longest, keys.shape[1])  # a copy, kept until it is sent, and to compare with
        padded[: len(keys)] = keys
        self.keys = self._everything = padded[: len(keys)]
        self._work: Any = None
        if len(self.counts) > 1 and longest:
            self._everything = keys.new_empty(len(self.counts) * longest, keys.shape[1])
            whole, mine = (x.view(-1).view(torch.uint8) for x in (self._everything, padded))
            self._work = gather_into(whole, mine, group, wait=False)

    def wait(self) -> Tensor:
        """[sum(counts), E]: the keys of all ranks, one rank after another, once they have arrived."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if min(self.counts) != max(self.counts):
                parts = self._everything.split(max(self.counts))
                self._everything = torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])
        return self._everything


@torch.no_grad()
def gather_keys(keys: Tensor, group: Any, *, counts: Sequence[int] | None = None) -> GatheredKeys:
    """Begin to gather the keys of all ranks, while other things run, such as the encoder of the queries. All ranks call
    it in the same order as their other exchanges.

    Args:
        keys: [M, E] float32, bfloat16, float16 or float64 of this rank, as `infonce` or `siglip` will get them.
        group: a process group of torch.distributed.
        counts: M of every rank, if they are known, which saves a small exchange that waits for the device. In it ranks
            also find out that their keys differ in width or dtype; with counts, which all must give, they do not.

    Returns:
        what to give to `infonce` or `siglip` as `gathered`. It holds the keys of all ranks: O(N·E) memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; without counts on every rank.

    Example:
        >>> texts = text_tower(tokens)
        >>> gathered = gather_keys(texts, group)      # on their way while images are encoded
        >>> images = image_tower(pixels)
        >>> loss = infonce(images, texts, scale, group=group, gathered=gathered)
    """
    if not isinstance(group, dist.ProcessGroup):
        wrong_type("group", "a process group of torch.distributed that this rank is a member of", group)
    world, rank = group.size(), dist.get_rank(group)
    if counts is None:
        return GatheredKeys(keys, _agreed(keys, group), group)
    _check_keys(keys)
    if not isinstance(counts, Sequence):
        wrong_type("counts", f"None, or {world} ints", counts)
    known = [integer(f"counts[{i}]", count, "an int >= 0") for i, count in enumerate(counts)]
    if len(known) != world or min(known) < 0:
        wrong_value("counts", f"{world} numbers of rows, one for each rank", list(counts))
    if known[rank] != len(keys):
        wrong_value(f"counts[{rank}]", f"the {len(keys)} keys of this rank", known[rank])
    return GatheredKeys(keys, known, group)


def _check_keys(keys: Any) -> None:
    expect_tensor("keys", keys, "[M, E] floating point", ndim=2)
    compute_dtype(keys.dtype)


def _agreed(keys: Any, group: Any) -> list[int]:
    """Rows of every rank, once all have keys of one width and dtype."""
    wrong: Exception | None = None
    try:
        _check_keys(keys)
        mine = [*keys.shape, torch.finfo(keys.dtype).bits, keys.dtype == torch.bfloat16]
    except (TypeError, ValueError) as error:
        wrong, mine = error, [-1] * 4
    own = torch.tensor(mine, dtype=torch.int64, device=device_of_numbers(group))
    everybody = own.new_empty(group.size() * len(mine))
    gather_into(everybody, own, group)
    if wrong is not None:
        raise wrong
    lines = everybody.view(-1, len(mine)).tolist()
    for rank, line in enumerate(lines):
        if line[0] < 0:
            raise ValueError(f"group: expected every rank to call with valid arguments, rank {rank} raised an error")
        if line[1:] != lines[0][1:]:
            raise ValueError(
                f"keys: expected the same width and dtype on every rank of the group, but rank {rank} differs from "
                f"rank 0; here it is [{len(keys)}, {keys.shape[1]}] {keys.dtype}"
            )
    return [line[0] for line in lines]


def check_gathered(gathered: Any, keys: Tensor, group: Any, exchange: str) -> None:
    """Raise TypeError or ValueError unless they are the keys of this call."""
    if gathered is None:
        return
    if not isinstance(gathered, GatheredKeys):
        wrong_type("gathered", "None, or what gather_keys returned", gathered)
    if gathered.group is not group:
        wrong_value("gathered", "keys of the ranks of `group`", gathered.group)
    if exchange == "ring":
        wrong_value("exchange", "'auto' or 'all_gather' with gathered keys", exchange)
    said = "gathered: expected what gather_keys returned for these keys"
    if gathered.keys.shape != keys.shape or gathered.keys.dtype != keys.dtype or gathered.keys.device != keys.device:
        got, expected = gathered.keys, keys
        raise ValueError(
            f"{said}, [{expected.shape[0]}, {expected.shape[1]}] {expected.dtype} on {expected.device}, "
            f"got [{got.shape[0]}, {got.shape[1]}] {got.dtype} on {got.device}"
        )
    # By their bits: a NaN is itself.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]
    same = gathered.keys.contiguous().view(bits) == keys.detach().contiguous().view(bits)
    expect_true(same, f"{said}, got others (InfoNCELoss and SigLIPLoss change keys, unless normalize=False)")

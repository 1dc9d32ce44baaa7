"""The bytes that the losses send over a process group, and the largest tensor that a rank holds for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ops.contrastive.counting import counting
from ops.contrastive.shared import EXCHANGES, batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import infonce, siglip


def _bytes_received(rank: int, world: int, loss: str, exchange: str) -> tuple[int, int]:
    """Bytes of features and their gradients, and of all, in a forward and backward: a rank's statistics are smaller
    than 1000 bytes here, its features larger."""
    x, y = (t[:8].clone().requires_grad_() for t in batch(8, 256, torch.bfloat16))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    over = {"group": dist.group.WORLD, "exchange": exchange}
    losses: dict[str, Callable[[], Tensor]] = {
        "infonce": lambda: infonce(x, y, scale, **over),
        "siglip": lambda: siglip(x, y, scale, bias, **over),
        "negatives": lambda: infonce(x, y, scale, negatives=y.detach().clone().requires_grad_(), **over),
        "queue": lambda: infonce(x, y, scale, negatives=y.detach(), **over),
        "teacher": lambda: infonce(x, y, scale, teacher=(x, y, 0.5), **over),
        "return_stats": lambda: infonce(x, y, scale, return_stats=True, **over)[0],
    }
    with counting(rank, world) as counted:
        losses[loss]().backward()
    return counted.features, counted.bytes


# Beyond the keys: [all_gather, ring] in units of N·E bytes, in bfloat16.
BYTES = {
    "infonce": (0, 0),
    "siglip": (0, 0),
    "negatives": (4, 8),
    "queue": (2, 4),
    "teacher": (4, 6),
    "return_stats": (0, 0),
}


@pytest.mark.parametrize("loss", BYTES)
def test_bytes_exchanged(loss: str) -> None:
    """4·N·E in gather mode and 8·N·E in the ring, what an option adds, and O(N) statistics: as documented."""
    e = 256
    for world in (1, 2, 4):
        n = 8 * world
        for exchange, factor, more in zip(EXCHANGES, (4, 8), BYTES[loss], strict=True):
            for features, everything in ranks.run(world, _bytes_received, loss, exchange):
                assert features == (factor + more) * n * e * (world - 1) // world, (world, exchange)
                assert everything - features <= 300 * n + 200 * world, (world, exchange)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.nbytes)
        return out


def _largest(rank: int, world: int, exchange: str) -> int:
    x, y = (t.requires_grad_() for t in batch(4, 512, torch.float32))
    with LargestTensor() as largest:
        infonce(x, y, torch.tensor(10.0), group=dist.group.WORLD, exchange=exchange).backward()
    return largest.elements


def test_ring_holds_no_more_than_blocks() -> None:
    block = 4 * 512 * 4
    assert max(ranks.run(4, _largest, "ring")) == block
    assert max(ranks.run(4, _largest, "all_gather")) == 4 * block

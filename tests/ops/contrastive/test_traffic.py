"""What a call over ranks sends is what `Call` says, byte for byte and message for message, with uneven rows too."""

from __future__ import annotations

from typing import Any

import named
import pytest
import ranks
import torch
import torch.distributed as dist
from ops.contrastive.counting import counting
from ops.contrastive.shared import EXCHANGES, batch

from mmkernels import FalseNegatives, Link, infonce, received_bytes, siglip
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.runtime.collectives import Network

E, F = 24, 10
ROWS = {"even": [6, 6, 6, 6], "uneven": [5, 0, 9, 2], "none first": [0, 3, 3, 1]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one direction": {"symmetric": False},
    "statistics": {"return_stats": True},
    "one direction, statistics": {"symmetric": False, "return_stats": True},
    "ids": {"ids": True},
    "ids ignored": {"ids": True, "same_id": "ignore"},
    "weights": {"weights": True},
    "hardness, hard negatives": {"others": True, "alone": True, "gradients": (True, True, True), "negatives": True},
    "filter": {"guide": F},
    "filter, one way, ids": {"guide": F, "ids": True, "same_id": "ignore", "symmetric": False},
    "filter, decoupled": {"guide": F, "others": True, "alone": True},
    "filter, hard negatives": {"guide": F, "gradients": (True, False, True), "negatives": True},
    "filter, frozen queries": {"guide": F, "gradients": (False, True, False)},
    "decoupled": {"others": True, "alone": True},
    "decoupled, statistics": {"others": True, "return_stats": True, "symmetric": False},
    "decoupled, ids": {"others": True, "ids": True},
    "decoupled, ids ignored": {"others": True, "alone": True, "ids": True, "same_id": "ignore"},
    "decoupled, teacher": {"others": True, "teacher": F},
    "teacher": {"teacher": F},
    "teacher, ids": {"teacher": F, "ids": True, "symmetric": False},
    "hard negatives": {"gradients": (True, True, True), "negatives": True},
    "a queue": {"negatives": True},
    "frozen keys": {"gradients": (True, False, False)},
    "frozen queries": {"gradients": (False, True, False), "negatives": True},
    "frozen": {"gradients": (False, False, False)},
    "a fixed scale": {"scalars": ()},
    "float64": {"dtype": torch.float64, "scalars": (8,)},
    "sigmoid": {"sigmoid": True, "scalars": (4, 4)},
    "sigmoid, ids, statistics": {"sigmoid": True, "scalars": (4, 4), "ids": True, "return_stats": True},
}


def _call(world: int, rows: str, changes: dict[str, Any]) -> Call:
    counts = ROWS[rows][:world]
    negatives = [10 - n if n else 0 for n in counts] if changes.get("negatives") else [0] * world
    options = {"dtype": torch.bfloat16, "width": E, **changes, "negatives": negatives}
    return Call(counts, counts, **options)


def _counted(rank: int, world: int, rows: str, exchange: str, option: str) -> tuple[int, int]:
    """Bytes and messages that arrive in a forward and a backward."""
    before = received_bytes()
    call = _call(world, rows, OPTIONS[option])
    mine = call.queries[rank]
    x, y = (
        t[:mine].clone().requires_grad_(need) for t, need in zip(batch(9, E, call.dtype), call.gradients, strict=False)
    )
    scale, bias = (torch.tensor(v, requires_grad=bool(call.scalars)) for v in (10.0, -3.0))
    more: dict[str, Any] = {"group": dist.group.WORLD, "exchange": exchange, "return_stats": call.return_stats}
    if call.ids:
        more["query_ids"] = torch.arange(mine)
    with counting(rank, world) as counted:
        if call.sigmoid:
            loss = siglip(x, y, scale, bias, **more)
        else:
            more |= {"symmetric": call.symmetric, "same_id": call.same_id}
            more |= {"hardness": 2.0} if "hardness" in option else {"decoupled": call.others}
            if call.weights:
                more["weights"] = torch.ones(mine)
            if call.teacher:
                more["teacher"] = (*(t[:mine] for t in batch(9, F, call.dtype)), 0.5)
            if any(call.negatives):
                rest = batch(12, E, call.dtype)[0][: call.negatives[rank]].clone()
                more["negatives"] = rest.requires_grad_(call.gradients[2])
            if call.guide:
                of_negatives = more["negatives"].detach()[:, :F] if "negatives" in more else None
                features = (t[:mine] for t in batch(9, F, call.dtype))
                more["false_negatives"] = FalseNegatives(*features, guide_negatives=of_negatives)
            loss = infonce(x, y, scale, **more)
        loss = loss[0] if call.return_stats else loss
        if loss.requires_grad:
            loss.backward()
    assert received_bytes() - before == counted.bytes
    return counted.bytes, counted.messages


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bytes_are_those_that_the_collectives_deliver(rows: str, exchange: str) -> None:
    network = Network(Link(1e-5, 1e9), Link(1e-4, 1e8), 8)
    for world in (1, 2, 4):
        for option, changes in OPTIONS.items():
            call = _call(world, rows, changes)
            with named.case(option, world):
                found = ranks.run(world, _counted, rows, exchange, option)
                costs = [call.cost(network, rank, exchange) for rank in range(world)]
                assert found == [(cost.received, cost.messages) for cost in costs]

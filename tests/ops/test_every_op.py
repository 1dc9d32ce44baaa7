"""torch's own op checks for every registered op, as its public function calls it, in both directions and twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import (
    AttentionMask,
    FalseNegatives,
    additive_attention,
    attention,
    embed_splice,
    gated_residual,
    infonce,
    maxsim,
    mrope_position_ids,
    norm_rope,
    pack,
    patchify,
    sample_negatives,
    segment_pool,
    siglip,
    topk_similar,
)

T, H, D = 8, 2, 4
CU = torch.tensor([0, 3, 8], dtype=torch.int32)
IDS = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6])
GRID = torch.tensor([[1, 2, 2]])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def attend() -> Tensor:
    q, k, v, key_bias = leaf(T, H, D), leaf(T, H, D), leaf(T, H, D), leaf(H, D)
    mask = AttentionMask.packed(CU, causal=True)
    x = attention(q, k, v, mask) + additive_attention(q, k, v, key_bias, mask)
    return gated_residual(norm_rope(x, torch.arange(T), base=100.0), q, leaf(1)).square().sum()


def contrast() -> Tensor:
    x, y, scale = leaf(T, D), leaf(T, D), leaf()
    sample_negatives(x, y, scale)
    topk_similar(x, y, 2)
    pairs = {"query_ids": IDS, "key_ids": IDS}
    losses = [infonce(x, y, scale), infonce(x, y, scale, **pairs, same_id="ignore")]
    losses += [infonce(x, y, scale, false_negatives=FalseNegatives(x.detach(), y.detach(), 0.1))]
    losses += [siglip(x, y, scale, leaf()), siglip(x, y, scale, leaf(), **pairs)]
    return torch.stack(losses).sum()


def packed() -> Tensor:
    x = leaf(T, D)
    image, _ = patchify([leaf(3, 4, 4)], 2)
    patchify([torch.randn(3, 4, 4)], 2)  # without a gradient
    mrope_position_ids(CU, GRID, torch.tensor([1]), T)
    spliced = embed_splice(torch.arange(T) % 5, leaf(5, D), x[:2], torch.tensor([0, 4]))
    pooled = segment_pool(x, CU, "mean") + segment_pool(x, CU, "weighted", weights=leaf(T))
    scores = maxsim(x, leaf(T, D), CU, CU)
    return torch.stack(
        [part.square().sum() for part in (pack(x, torch.tensor([3, -1, 0])), spliced, pooled, image, scores)]
    ).sum()


class Recorder(TorchDispatchMode):
    """The arguments of the first call of each mmkernels op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "mmkernels":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


def leaves_of(loss: Tensor) -> list[Tensor]:
    found, waiting, seen = [], [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        waiting += [following for following, _ in node.next_functions]
    return found


def calls_of(run: Callable[[], Tensor]) -> dict[Any, tuple[Any, ...]]:
    with Recorder() as recorder:
        loss = run()
        inputs = leaves_of(loss)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    return recorder.calls


def detached(value: Any, differentiable: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [detached(item, differentiable) for item in value]
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(differentiable and value.requires_grad)
    return value


@pytest.fixture(scope="module")
def calls() -> dict[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    return {op: args for run in (attend, contrast, packed) for op, args in calls_of(run).items()}


def test_every_op_is_called(calls) -> None:
    """An op missing here has no check below: call its public function above."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmkernels::")}
    assert {op.name() for op in calls} == registered


def test_opcheck(calls) -> None:
    for op, args in calls.items():
        second = op.name().endswith("_second")  # third derivatives raise
        torch.library.opcheck(op, tuple(detached(args, not second)))

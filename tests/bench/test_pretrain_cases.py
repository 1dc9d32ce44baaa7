"""The loop's model in plain PyTorch computes the same, without our ops; the largest batch is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("pytest_benchmark", reason="mmkernels[bench] is not installed")

import mmkernels
from mmkernels.bench.cases import pretrain
from mmkernels.bench.plain_ops import plain_ops
from mmkernels.nn import attention_base


class Ops(TorchDispatchMode):
    """Names of our ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("mmkernels."):
            self.ours.add(name.split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["clip", "vlbert", "siglip", "caption"])
def test_plain_models_compute_the_same_by_other_ops(recipe: str) -> None:
    inputs = pretrain.setup({"recipe": recipe, "batch": 8}, torch.device("cpu"))
    pretrain.step(inputs)  # counts flop, which calls ops of its own
    called = {}
    runs: dict[str, Callable[..., Any]] = {"ours": pretrain.step}
    runs |= {
        name: lambda x, p=padded: pretrain.plain_step(p, x) for name, padded in (("padded", True), ("packed", False))
    }
    for name, run in runs.items():
        with Ops() as ops:
            outputs = run(inputs)
        called[name] = ops.ours
        assert all(bool(output.isfinite().all()) for output in outputs)
        assert all(bool(output.any()) for output in outputs), f"{recipe}, {name}: a gradient is zero"
        pretrain.check(name, outputs, inputs)
    assert any("attention" in op for op in called["ours"])
    for name in ("padded", "packed"):
        left = {op for op in called[name] if "attention" in op or "contrastive" in op or "pool" in op}
        assert not left, f"{recipe}, {name}: {left}"


def test_a_wrong_model_is_noticed() -> None:
    inputs = {"expected": (torch.tensor(1.0), torch.ones(3))}
    pretrain.check("x", (torch.tensor(1.0), torch.ones(3)), inputs)
    with pytest.raises(AssertionError, match=r"gradient 1 is 1\.0e-02"):
        pretrain.check("x", (torch.tensor(1.0), 1.01 * torch.ones(3)), inputs)


def test_ops_are_put_back() -> None:
    ours = attention_base.attention
    assert ours is mmkernels.attention
    with plain_ops():
        assert attention_base.attention is not ours
    assert attention_base.attention is ours


@pytest.mark.parametrize(
    ("limit", "most", "expected"), [(1000, 4096, 960), (127, 4096, 0), (5000, 4096, 4096), (128, 4096, 128)]
)
def test_largest_batch(limit: int, most: int, expected: int) -> None:
    asked = []

    def needs(batch: int) -> int:
        asked.append(batch)
        return batch

    assert pretrain.largest(needs, limit, most) == expected
    assert max(asked) <= 2 * max(limit, 64)
    assert expected <= limit
    assert len(asked) < 12

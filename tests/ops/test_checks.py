"""Checks that every family shares: numbers of any kind, values only where they may be read, deprecations."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkernels import (
    AttentionCost,
    AttentionMask,
    EncoderCost,
    GradCache,
    Media,
    PackedBatch,
    StreamPlanner,
    attention,
    balance_ranks,
    embed_splice,
    infonce,
    mrope_position_ids,
    norm_rope,
    pad,
    patchify,
    plan_packing,
    qk_norm_rope,
    rotary_cos_sin,
    sample_negatives,
    siglip,
    topk_similar,
    unpack,
    unpad,
    unpatchify,
)
from mmkernels.gradcache import Ragged
from mmkernels.integrations.torch_data import PackedSampler
from mmkernels.nn import CrossModalAttention, FusedSelfAttention, GatedCrossAttention, InfoNCELoss, Rotary, SigLIPLoss
from mmkernels.ops import checks
from mmkernels.ops.packing.checks import check_cu_seqlens, check_index

X, Y = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
HEADS = X.view(6, 2, 4)
CU, POSITIONS = torch.tensor([0, 2, 6]), torch.arange(6)
PLAN = plan_packing([3, 4, 5, 6], 8)
IMAGE = torch.randn(3, 8, 8)


def _seeded(function: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return function(*args, **options)


def _gradients(chunk_size: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    tower = torch.nn.Linear(8, 4)
    GradCache([tower, tower], lambda a, b: infonce(a, b, 5.0), chunk_size=chunk_size, **options)(X, Y)
    return tower.weight.grad


def _module(kind: type, **options: Any) -> Tensor:
    module = _seeded(kind, **({"embed_dim": 8, "num_heads": 2} | options))
    return module(X) if kind is FusedSelfAttention else module(X, X.new_ones(5, module.context_dim))


# name -> (a function of one number, such a number)
INTEGERS: dict[str, tuple[Any, int]] = {
    "window": (lambda n: AttentionMask.packed(CU, causal=True, window=n).to_dense(), 2),
    "bidirectional": (lambda n: AttentionMask.multimodal(CU, POSITIONS, POSITIONS, bidirectional=[n]).to_dense(), 1),
    "rotary_dim": (lambda n: rotary_cos_sin(POSITIONS, n), 4),
    "qk_norm_rope: rotary_dim": (lambda n: qk_norm_rope(HEADS, HEADS, POSITIONS, rotary_dim=n), 2),
    "sections": (lambda n: rotary_cos_sin(POSITIONS.expand(2, 6), 4, sections=[n, n]), 1),
    "k": (lambda n: topk_similar(X, Y, n), 2),
    "rows": (lambda n: unpack(X, POSITIONS, n), 7),
    "rows, several": (lambda n: unpack(X, POSITIONS, [n, n]), 3),
    "max_seqlen": (lambda n: pad(X, CU, n), 5),
    "total": (lambda n: unpad(X[None], torch.ones(1, 6, dtype=torch.bool), n), 7),
    "padding_idx": (lambda n: embed_splice(POSITIONS, X, Y[:1], torch.tensor([2]), padding_idx=n), 1),
    "patch_size": (lambda n: patchify([IMAGE], n), 4),
    "merge_size": (lambda n: patchify([IMAGE], 2, merge_size=n), 2),
    "temporal_patch_size": (lambda n: patchify([IMAGE.expand(2, 3, 8, 8)], 4, temporal_patch_size=n), 2),
    "grid_thw": (lambda n: unpatchify(torch.ones(4, 48), [(1, n, n)], 4), 2),
    "mrope: merge_size": (lambda n: mrope_position_ids(CU, torch.tensor([[1, 4, 4]]), CU[1:2], 8, merge_size=n), 2),
    "mrope: total": (lambda n: mrope_position_ids(CU, torch.tensor([[1, 2, 2]]), CU[1:2], n, merge_size=1), 6),
    "capacity": (lambda n: plan_packing([3, 4, 5], n).items, 8),
    "max_images": (lambda n: plan_packing([3, 4], 8, images=[1, 1], max_images=n).items, 1),
    "max_samples": (lambda n: plan_packing([3, 4], 8, max_samples=n).items, 1),
    "lookahead": (lambda n: plan_packing([3, 4], 8, strategy="subset_sum", lookahead=n).items, 4),
    "seed": (lambda n: plan_packing([3, 4, 5, 6], 8, seed=n).items, 3),
    "stream": (lambda n: StreamPlanner(n).push(n), 8),
    "world_size": (lambda n: balance_ranks(PLAN, n).packs, 2),
    "accum": (lambda n: balance_ranks(PLAN, 1, accum=n).packs, 2),
    "width": (lambda n: [EncoderCost.transformer(n).linear], 60000),
    "sampler": (lambda n: PackedSampler([3, 4, 5, 6], 8, rank=0, world_size=1, seed=n).plan().items, 3),
    "media: merge_size": (lambda n: [Media(1, torch.ones(4, 2), (1, 2, 2), merge_size=n).length], 2),
    "media: grid_thw": (lambda n: [Media(1, torch.ones(4, 2), (1, n, n)).length], 2),
    "media: tokens": (lambda n: [Media(2, torch.ones(4, 2), tokens=n).length], 3),
    "media: modality": (lambda n: [Media(n, torch.ones(4, 2)).length], 1),
    "batch: capacity": (lambda n: PackedBatch.from_samples([POSITIONS], capacity=n).tokens, 8),
    "batch: sample_ids": (lambda n: PackedBatch.from_samples([POSITIONS], sample_ids=[n]).sample_ids, 8),
    "batch: split": (lambda n: PackedBatch.from_samples([POSITIONS] * 3).split(n)[0].tokens, 2),
    "chunk_size": (_gradients, 2),
    "chunk_size, each": (lambda n: _gradients([n, 4]), 2),
    "memory_budget": (lambda n: _gradients("auto", memory_budget=n), 10**5),
    "counts": (lambda n: Ragged(X, [n, n]).chunks(1), 3),
    "embed_dim": (lambda n: _module(FusedSelfAttention, embed_dim=n), 8),
    "num_heads": (lambda n: _module(CrossModalAttention, num_heads=n), 2),
    "num_kv_heads": (lambda n: _module(FusedSelfAttention, num_kv_heads=n), 1),
    "head_dim": (lambda n: _module(FusedSelfAttention, head_dim=n), 6),
    "context_dim": (lambda n: _module(CrossModalAttention, context_dim=n), 5),
}
REALS: dict[str, tuple[Any, float]] = {
    "scale": (lambda a: attention(HEADS, HEADS, HEADS, scale=a), 0.5),
    "dropout_p": (lambda a: _seeded(attention, HEADS, HEADS, HEADS, dropout_p=a), 0.25),
    "eps": (lambda a: norm_rope(HEADS, eps=a), 0.5),
    "base": (lambda a: rotary_cos_sin(POSITIONS, 4, base=a), 128.0),
    "scaling": (lambda a: rotary_cos_sin(POSITIONS, 4, scaling=a), 1.5),
    "logit_scale": (lambda a: infonce(X, Y, a), 2.0),
    "logit_scale and logit_bias": (lambda a: siglip(X, Y, a, a), 2.0),
    "label_smoothing": (lambda a: infonce(X, Y, 2.0, label_smoothing=a), 0.25),
    "alpha": (lambda a: infonce(X, Y, 2.0, teacher=(Y, X, a)), 0.25),
    "sample_negatives": (lambda a: _seeded(sample_negatives, X, Y, a), 2.0),
    "linear": (lambda a: AttentionCost(EncoderCost(linear=a)).of_packs(PLAN), 2.5),
    "quadratic": (lambda a: AttentionCost(EncoderCost(quadratic=a)).of_packs(PLAN), 2.5),
    "init_scale": (lambda a: InfoNCELoss(init_scale=a)(X, Y), 4.0),
    "max_scale": (lambda a: InfoNCELoss(max_scale=a, init_scale=2)(X, Y), 4.0),
    "init_bias": (lambda a: SigLIPLoss(init_bias=a)(X, Y), -2.5),
    "module: scale": (lambda a: _module(FusedSelfAttention, scale=a), 0.5),
    "module: dropout": (lambda a: _module(FusedSelfAttention, dropout=a), 0.25),
    "module: norm_eps": (lambda a: _module(GatedCrossAttention, norm_eps=a), 0.5),
    "module: qk_norm_eps": (lambda a: _module(FusedSelfAttention, qk_norm_eps=a, qk_norm="rms"), 0.5),
    "module: rotary base": (lambda a: Rotary(base=a).cos_sin(POSITIONS, 4), 128.0),
}
_NUMPY_INTEGERS, _NUMPY_REALS = (np.int64, np.int32, np.uint16), (np.float64, np.float32, np.float16)


def _flat(value: Any) -> list[Any]:
    return list(itertools.chain(*map(_flat, value))) if isinstance(value, (tuple, list)) else [value]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(_flat(got), _flat(expected), strict=True):
        np.testing.assert_array_equal(*(x.detach() if isinstance(x, Tensor) else x for x in (a, b)))


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_may_be_numpys_and_nothing_else(name: str) -> None:
    call, number = INTEGERS[name]
    expected = call(number)
    for kind in _NUMPY_INTEGERS:
        if number <= np.iinfo(kind).max:
            assert_same(call(kind(number)), expected)
    for wrong in (True, np.True_, number + 0.5, np.float64(number), str(number)):
        with pytest.raises((TypeError, ValueError), match=r"expected|integer"):
            call(wrong)


@pytest.mark.parametrize("name", REALS)
def test_a_number_may_be_numpys_and_nothing_else(name: str) -> None:
    call, number = REALS[name]
    expected = call(number)
    for kind in (*_NUMPY_REALS, *((np.int64,) if number == int(number) else ())):
        assert_same(call(kind(number)), expected)
    for wrong in (True, np.True_, str(number), 1j):
        with pytest.raises((TypeError, ValueError), match="expected"):
            call(wrong)


def test_numbers_beyond_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="logit_scale: expected a number"):
        infonce(X, Y, 10**400)


class OnAGpu(Tensor):
    """CPU tensors that claim to be on a GPU."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


def on_a_gpu(*values: Any) -> Tensor:
    return torch.tensor(values).as_subclass(OnAGpu)


# Checks of each family, with a wrong value.
WRONG_VALUES = {
    "a mask": lambda: AttentionMask.packed(on_a_gpu(0, 5, 3)),
    "a mask that does not fit": lambda: AttentionMask.packed(on_a_gpu(0, 2**32)),
    "packing: index": lambda: check_index("index", on_a_gpu(7), 4),
    "packing: cu_seqlens": lambda: check_cu_seqlens(on_a_gpu(0, 5, 3), 9),
    "a condition": lambda: checks.expect_true(on_a_gpu(False), "targets: expected indices of keys", 9),
}


@pytest.mark.parametrize("check", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_values_on_a_gpu_are_read_when_asked_for(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable, read at each check, in every family; without it nothing waits for the device."""
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: None)  # on a GPU it does not wait
    monkeypatch.delenv("MMKERNELS_VALIDATE", raising=False)
    check()
    for variable in ("", "0"):
        monkeypatch.setenv("MMKERNELS_VALIDATE", variable)
        check()
    monkeypatch.setenv("MMKERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match="expected"):
        check()


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKERNELS_VALIDATE", "yes")
    with pytest.raises(ValueError, match="MMKERNELS_VALIDATE: expected 0 or 1, got 'yes'"):
        check_index("index", on_a_gpu(7), 4)
    check_index("index", torch.tensor([3]), 4)  # CPU values are always read


def test_values_are_read_under_a_gradient_but_not_under_vmap() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(checks.readable(x))
        return x.sum()

    torch.func.grad(look)(X)
    torch.func.vmap(look)(X)
    torch.func.vmap(torch.func.grad(look))(X)
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(X)
    assert seen == [True, False, False, False]


DEPRECATED = {
    "attention": lambda value: attention(HEADS, HEADS, HEADS, deterministic=value),
    "infonce": lambda value: infonce(X, Y, 5.0, deterministic=value),
    "siglip": lambda value: siglip(X, Y, 5.0, -1.0, deterministic=value),
}


@pytest.mark.parametrize("call", DEPRECATED.values(), ids=DEPRECATED)
def test_deterministic_is_deprecated(call: Any) -> None:
    """Results are always deterministic: the argument has no effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(None)
    for value in (True, False):
        with pytest.warns(DeprecationWarning, match="deterministic is deprecated: results are always") as warned:
            assert torch.equal(call(value), expected)
        assert [w.filename for w in warned] == [__file__]
        assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(value), expected)
    with pytest.raises(TypeError, match="deterministic: expected None, True or False, got 1"):
        call(1)

"""Mistakes with the options of InfoNCE: each error names the argument and what was expected."""

from functools import partial
from types import SimpleNamespace

import named
import pytest
import torch

from mmkernels import BackendError, infonce
from mmkernels.ops.contrastive.checks import limits_of
from mmkernels.runtime.backends import resolve

X, Y = torch.randn(2, 4, 8).unbind()
FOUR = torch.arange(4)
MISTAKES = [
    (
        dict(targets=torch.zeros(4)),
        TypeError,
        r"targets: expected \[4\] int64 or int32, one per query, got .*float32",
    ),
    (dict(targets=torch.arange(3)), ValueError, r"targets: expected \[4\] int64"),
    (dict(targets=FOUR + 1), ValueError, "targets: expected indices of keys, 0 to 3"),
    (dict(targets=FOUR - 1), ValueError, "targets: expected indices of keys, 0 to 3"),
    (dict(targets=FOUR * 0), ValueError, "targets: expected each key once"),
    (dict(query_ids=FOUR[:3]), ValueError, r"query_ids: expected \[4\] int64"),
    (dict(query_ids=FOUR, key_ids=FOUR[:3]), ValueError, r"key_ids: expected \[4\] int64 or int32, one per key"),
    (dict(key_ids=FOUR), ValueError, "query_ids: expected query ids, required"),
    (dict(query_ids=FOUR, key_ids=FOUR * 0), ValueError, "query_ids: expected each to occur among key_ids"),
    (dict(query_ids=FOUR * 0, key_ids=FOUR), ValueError, "key_ids: expected each to occur among query_ids"),
    (dict(query_ids=FOUR, targets=FOUR), ValueError, "targets: expected None with query_ids"),
    (dict(same_id="ignore"), ValueError, r"query_ids: expected \[N\] ids, required when same_id='ignore'"),
    (dict(same_id="both"), ValueError, "same_id: expected 'positive' or 'ignore', got 'both'"),
    (dict(negatives=Y[:, :7]), ValueError, r"negatives: expected \[K, 8\] .* or \[4, K, 8\]"),
    (dict(negatives=Y[0]), ValueError, r"negatives: expected \[K, 8\] .*, got \[8\]"),
    (dict(negatives=Y[:3, None]), ValueError, r"negatives: expected .* \[4, K, 8\] .*, got \[3, 1, 8\]"),
    (dict(negatives=Y[:, None, :7]), ValueError, r"negatives: expected .*, got \[4, 1, 7\]"),
    (dict(negatives=Y.double()), TypeError, "negatives: expected float32 like queries"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    (dict(label_smoothing=torch.tensor(0.1)), TypeError, r"label_smoothing: expected a number in \[0, 1\]"),
    (dict(label_smoothing=float("nan")), ValueError, "label_smoothing: expected a number"),
    (dict(symmetric=1), TypeError, "symmetric: expected True or False"),
    (dict(weights=FOUR), TypeError, r"weights: expected \[4\] floating point"),
    (dict(weights=torch.ones(3)), ValueError, r"weights: expected \[4\] floating point"),
    (dict(weights=torch.zeros(4)), ValueError, "weights: expected finite non-negative numbers, not all zero"),
    (dict(weights=torch.tensor([1, 1, -1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.tensor([1, torch.nan, 1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.tensor([1, torch.inf, 1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.ones(4, requires_grad=True)), ValueError, "weights: expected a tensor that requires no"),
    (dict(teacher=(X, Y)), TypeError, r"teacher: expected \(queries_m, keys_m, alpha\)"),
    (dict(teacher=(X[:3], Y, 0.1)), ValueError, r"teacher\[0\]: expected \[4, F\] float32"),
    (dict(teacher=(X, Y[:, :3], 0.1)), ValueError, r"teacher\[1\]: expected \[4, 8\], as wide as teacher\[0\]"),
    (dict(teacher=(X, Y, 1.1)), ValueError, r"teacher\[2\]: expected a number in \[0, 1\], got 1.1"),
    (dict(teacher=(X, Y.half(), 0.1)), TypeError, r"teacher\[1\]: expected \[4, F\] float32"),
    (dict(keys=Y[:3]), ValueError, r"keys: expected \[4, E\], one per query"),
    (dict(keys=Y[:3], symmetric=False), ValueError, r"keys: expected at least \[4, E\]"),
    (
        dict(keys=torch.cat([Y, Y]), query_ids=FOUR, key_ids=torch.arange(8) % 4, weights=torch.ones(4)),
        ValueError,
        "weights: expected None, because the 8 keys have no weights",
    ),
    (dict(keys=torch.cat([Y, Y]), query_ids=FOUR), ValueError, r"key_ids: expected \[8\]"),
    (dict(decoupled=1), TypeError, "decoupled: expected True or False"),
    (
        dict(decoupled=True, query_ids=FOUR, key_ids=FOUR.flip(0), same_id="ignore"),
        ValueError,
        "key_ids: expected the id of each query at its target, with decoupled",
    ),
    (dict(hardness="9"), TypeError, "hardness: expected a finite number, at least 0"),
    (dict(hardness=-1), ValueError, "hardness: expected a finite number, at least 0"),
    (dict(hardness=float("inf")), ValueError, "hardness: expected a finite number, at least 0"),
    (dict(hardness=1.0, logit_scale=-1.0), ValueError, "logit_scale: expected at least 0 with hardness"),
    (dict(hardness=1.0, query_ids=FOUR), ValueError, "same_id: expected 'ignore' with hardness and ids"),
    (dict(return_stats=1), TypeError, "return_stats: expected True or False"),
    (dict(exchange="ring"), ValueError, "exchange: expected 'auto' without a group"),
    (dict(group=object()), ValueError, "group: expected None, or a process group .call init_process_group"),
]


def test_a_mistake_is_named():
    right = dict(queries=X, keys=Y, logit_scale=1.0)
    named.mistakes(*((partial(infonce, **(right | wrong)), *expected) for wrong, *expected in MISTAKES))


def test_a_backend_that_does_not_know_an_option_says_so():
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    limits = limits_of({"targets": None, "label_smoothing": 0.1}, on_gpu)
    with pytest.raises(BackendError, match=r"(?s)no CUDA.* supports label_smoothing.*reference: supported"):
        resolve("contrastive", on_gpu, "native", limits)
    assert limits.get("triton") is None

"""The same bits a hundred times: losses, statistics and every gradient, with any number of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import infonce, siglip

Run = Callable[[], list[Tensor]]

# Several tiles each way, ragged; the kernels' tiles have 64 to 512 rows or columns.
N, M, E = 590, 640, 24


def _rows(n: int, seed: int, e: int = E) -> Tensor:
    return F.normalize(torch.randn(n, e, generator=torch.Generator().manual_seed(seed)), dim=1)


def _ids(n: int, seed: int, high: int) -> Tensor:
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))


def _options(n: int) -> dict[str, tuple[Callable[..., Any], bool, dict[str, Any]]]:
    """name -> loss, whether it has M keys instead of as many as queries, options; every option is in one of them."""
    ids = _ids(n, 2, n // 4)
    key_ids = torch.cat([ids.flip(0), ids[_ids(M - N, 3, n)]])
    negatives, teacher = _rows(300, 4), (_rows(n, 5, 16), _rows(n, 6, 16), 0.4)
    return {
        "infonce": (infonce, False, {}),
        "infonce, one way": (infonce, True, dict(symmetric=False, targets=_ids(n, 7, n), return_stats=True)),
        "infonce, ids": (infonce, True, dict(query_ids=ids, key_ids=key_ids, negatives=negatives, return_stats=True)),
        "infonce, ignored": (
            infonce,
            False,
            dict(
                query_ids=ids,
                same_id="ignore",
                negatives=negatives,
                label_smoothing=0.1,
                weights=torch.rand(n, generator=torch.Generator().manual_seed(8)),
                teacher=teacher,
                return_stats=True,
            ),
        ),
        "infonce, ids and a teacher": (infonce, False, dict(query_ids=ids, label_smoothing=0.2, teacher=teacher)),
        "siglip": (siglip, False, {}),
        "siglip, ids": (siglip, True, dict(query_ids=ids, key_ids=key_ids, return_stats=True)),
    }


def prepared(name: str, backend: str, dtype: torch.dtype, n: int = N, device: str = "cpu") -> Run:
    """A function that computes the loss, its gradients and its statistics from the same input each time."""
    loss, more_keys, options = _options(n)[name]

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(placed, value))
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.ndim == 2 else value.dtype)

    queries, keys = _rows(n, 0), _rows(n + M - N if more_keys else n, 1)
    keys[:n] = F.normalize(keys[:n] + queries, dim=1)
    scalars = [torch.tensor(14.3), torch.tensor(-10.0)][: 1 if loss is infonce else 2]
    leaves = [placed(x).requires_grad_() for x in (queries, keys, *scalars)]
    function = functools.partial(loss, backend=backend, **{key: placed(value) for key, value in options.items()})

    def run() -> list[Tensor]:
        out = function(*leaves)
        value, stats = out if isinstance(out, tuple) else (out, ())
        return [value.detach(), *torch.autograd.grad(value, leaves), *stats]

    return run


def assert_same_bits(run: Run, runs: int = 100, threads: Sequence[int] = ()) -> None:
    """Repeat the first run, cycling through these numbers of threads."""
    first = run()
    assert all(x.isfinite().all() for x in first) and all(x.any() for x in first[:4])
    before = torch.get_num_threads()
    try:
        for i in range(1, runs):
            if threads:
                torch.set_num_threads(threads[i % len(threads)])
            for j, (x, y) in enumerate(zip(first, run(), strict=True)):
                assert torch.equal(x, y), f"run {i}: result {j} differs by up to {(x - y).abs().max():.1e}"
    finally:
        torch.set_num_threads(before)


NAMES = list(_options(N))
PLAIN = ("infonce", "siglip")  # what the CUDA C++ kernels support
BOTH = (torch.float32, torch.bfloat16)


def judge(name, backend, dtype, n, device="cpu", **repeated):
    backends.need("contrastive", backend, dtype, device)
    assert_same_bits(prepared(name, backend, dtype, n, device), **repeated)


@pytest.mark.parametrize(
    ("name", "dtype", "n"),
    [
        *((name, torch.float32, N) for name in NAMES),
        ("infonce, ignored", torch.bfloat16, N),
        *((name, torch.bfloat16, 2100) for name in PLAIN),  # several superblocks
    ],
    ids=str,
)
def test_native(name, dtype, n):
    judge(name, "native", dtype, n, threads=(2, 1, 3, 2, 5))


@pytest.mark.parametrize(("name", "dtype"), [(name, BOTH[i % 2]) for i, name in enumerate(NAMES)], ids=str)
def test_triton_interpreted(name, dtype):
    """The interpreter runs programs one at a time, in order: only uninitialised memory or fresh random draws can
    differ."""
    judge(name, "triton", dtype, 150, runs=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(
    ("backend", "name"), [*(("triton", name) for name in NAMES), *(("native", name) for name in PLAIN)]
)
def test_on_a_gpu(backend, name, dtype):
    judge(name, backend, dtype, 4500, "cuda")  # several superblocks

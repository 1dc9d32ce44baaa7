"""How time grows: InfoNCE over the batch, attention over tokens and segments, packing over bytes, planning over items.

Each point has plain PyTorch beside it, as far as that fits, and the cost model's prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmkernels.bench.case import Case, Params, Settings
from mmkernels.bench.cases import attention, contrastive, planner
from mmkernels.bench.cases.attention_masks import KINDS
from mmkernels.bench.cases.packing_rows import PACK

__all__ = ["cases"]

_TOKENS = 4096  # of all segments together
_PLAIN = 8192  # largest batch of plain PyTorch on a CPU


def _points(name: str, values: Sequence[int], **others: Any) -> list[Params]:
    return [{name: value, **others} for value in values]


def _over(
    case: Case,
    name: str,
    curve: str,
    quick: list[Params],
    full: list[Params],
    large: list[Params],
    calibrate: list[Params],
) -> Case:
    """The same contenders, without the further alternatives, over more sizes."""
    baseline = {of: run for of, run in case.others.items() if of in case.baseline}
    return replace(
        case,
        name=name,
        curve=curve,
        quick=quick,
        full=full,
        large=large,
        calibrate=calibrate,
        others=baseline,
        peers={},
        backends_of=None,
    )


def _contrastive(settings: Settings) -> list[Case]:
    wanted = {"infonce fwd+bwd": "infonce over N", "siglip fwd+bwd": "siglip over N"}
    single, half = {"E": 512, "dtype": "float32"}, {"E": 512, "dtype": "bfloat16"}
    powers = [2**k for k in range(10, 15)]

    def limits(p: Params, name: str) -> str | None:
        if settings.device == "cpu" and p["N"] > _PLAIN and not name.startswith("mmkernels"):
            return f"too slow beyond N={_PLAIN}"
        return contrastive.limits(p, name)

    return [
        _over(
            replace(case, limits=limits),
            wanted[case.name],
            "N",
            _points("N", powers[:2], **single),
            _points("N", powers, **single),
            _points("N", [2**k for k in range(15, 21)], **half),
            _points("N", (512, 1024), **single),
        )
        for case in contrastive.CASES
        if case.name in wanted
    ]


def _attention(settings: Settings) -> list[Case]:
    dense, packed = (next(kind for kind in KINDS if kind.name == name) for name in ("dense", "packed"))
    heads = {"H": 8, "D": 64, "dtype": "float32"}
    many = {"H": 16, "D": 128, "dtype": "bfloat16"}

    def segments(counts: Sequence[int], tokens: int, of: dict[str, Any]) -> list[Params]:
        return [{"S": count, "L": tokens // count, **of} for count in counts]

    counts = [1, 4, 16, 64, 256]
    return [
        _over(
            attention.case(dense, True, settings),
            "attention over T",
            "T",
            _points("T", (512, 1024, 2048), **heads),
            _points("T", (256, 512, 1024, 2048, 4096, 8192), **heads),
            _points("T", (16384, 32768), **many),
            _points("T", (256, 768), **heads),
        ),
        _over(
            attention.case(packed, True, settings),
            f"attention over segments of {_TOKENS} tokens",
            "S",
            segments(counts[2:4], _TOKENS, heads),
            segments(counts, _TOKENS, heads),
            [],
            [{"S": 32, "L": 32, **heads}, {"S": 2, "L": 512, **heads}],
        ),
    ]


def _packing() -> list[Case]:
    rows, lengths = {"E": 1024, "dtype": "float32"}, {"lengths": "obelics@8192"}
    return [
        _over(
            PACK,
            "pack over bytes",
            "MiB",
            _points("MiB", (16, 64), **rows),
            _points("MiB", (4, 16, 64, 256), **rows),
            [],
            _points("MiB", (48,), **rows),
        ),
        replace(
            _over(
                planner.PLAN,
                "plan over items",
                "n",
                _points("n", (10_000, 100_000), **lengths),
                _points("n", (10_000, 100_000, 1_000_000, 4_000_000), **lengths),
                [],
                _points("n", (300_000,), **lengths),
            ),
            ours=planner.best_fit,
        ),
    ]


def cases(settings: Settings) -> list[Case]:
    return [*_contrastive(settings), *_attention(settings), *_packing()]

"""A choice among many combinations of values in which every two values that may meet do meet.

Most faults need one value of one argument, or two values of two; such a choice finds those like all combinations would
(Kuhn, Wallace, Gallo: Software fault interactions and implications for software testing, 2004).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

__all__ = ["covering", "launches"]


def covering(combinations: Sequence[tuple[Hashable, ...]]) -> Iterator[int]:
    """Indices of the chosen `combinations`, which are equally long; the same ones in every process.

    Greedy: the combination with the most unmet pairs comes next; among equals the one whose pairs were met least, so
    that no value always meets the same few others.
    """
    pairs = [
        {(i, j, values[i], values[j]) for i, j in combinations_with_replacement(range(len(values)), 2)}
        for values in combinations
    ]
    missing = set().union(*pairs)
    met: Counter[tuple[int, int, Hashable, Hashable]] = Counter()
    while missing:
        best = max(range(len(pairs)), key=lambda i: (len(pairs[i] & missing), -sum(met[pair] for pair in pairs[i])))
        missing -= pairs[best]
        met.update(pairs[best])
        yield best


def launches(cases: Sequence[Any]) -> set[tuple[str, int]]:
    """(name, architecture) of a covering choice among `mmkernels.testing.aot.TritonCase`s, of each kernel by itself.

    What varies is the architecture, the types of arguments, and the constexprs but for tiles: a launcher chooses tiles
    and warps by the others. So each kernel is chosen on every architecture that has it, with every type and option.
    """
    of_kernels: dict[object, list[tuple[Any, int]]] = {}
    for case in cases:
        of_kernels.setdefault(case.kernel, []).extend((case, arch) for arch in case.archs)
    chosen = set()
    for listed in of_kernels.values():
        arguments = [{**case.constexprs, **case.signature} for case, _ in listed]
        names = sorted(name for name in set().union(*arguments) if not name.startswith("BLOCK"))
        columns: list[Sequence[Hashable]] = [
            [arch for _, arch in listed],
            *([values.get(name) for values in arguments] for name in names),
        ]
        combinations = list(zip(*_independent(columns), strict=True))
        chosen |= {(listed[i][0].name, listed[i][1]) for i in covering(combinations)}
    return chosen


def _independent(columns: Sequence[Sequence[Hashable]]) -> list[Sequence[Hashable]]:
    """Without columns that an earlier one determines, and those of arguments that are None unless an option adds them
    if two earlier ones, an option and a type, determine them. The first column always stays."""
    kept = list(columns[:1])
    for column in columns[1:]:
        earlier = combinations(kept, 2 if None in column and len(kept) > 1 else 1)
        by = (list(zip(*these, strict=True)) for these in earlier)
        if not any(len({*zip(keys, column, strict=True)}) == len({*keys}) for keys in by):
            kept.append(column)
    return kept

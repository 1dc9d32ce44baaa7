"""Write the tables of errors in docs/numerics.md from the newest `benches/results/accuracy-*.json` of each machine and
instruction set.

python scripts/write_accuracy.py            # writes them
python scripts/write_accuracy.py --check    # compares with what is committed
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from write_performance import RESULTS, ROOT, replaced

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- errors: scripts/write_accuracy.py writes them -->\n", "<!-- end of errors -->\n"
DTYPES = ("float32", "bfloat16", "float16")

Pair = tuple[float, float]  # our relative error, and plain PyTorch's


def newest() -> list[Mapping[str, Any]]:
    """Of each machine and instruction set."""
    found = {}
    for path in sorted(RESULTS.glob("accuracy-*.json"), key=lambda path: path.stem[-10:]):
        results = json.loads(path.read_text(encoding="utf-8"))
        found[results["about"]["device"], results["about"]["isa"]] = results
    return [found[key] for key in sorted(found)]


def largest(errors: Mapping[str, Pair], gradients: bool) -> Pair:
    """The output with our largest error, of the gradients or of the others."""
    chosen = (pair for name, pair in errors.items() if name.startswith(("d", "grad")) == gradients)
    return max(chosen, key=lambda pair: pair[0])


def _row(case: str, by_dtype: Mapping[str, Mapping[str, Pair]]) -> str:
    cells = [case.removesuffix(" fwd+bwd")]
    for dtype in DTYPES:
        if dtype not in by_dtype:
            cells += ["", ""]
            continue
        for gradients in (False, True):
            mine, plain = largest(by_dtype[dtype], gradients)
            cells.append(f"{mine:.1e} / {plain:.1e}" if mine or plain else "0")
    return f"| {' | '.join(cells)} |"


def tables(every: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for results in every:
        about = results["about"]
        yield f"{about['device']}, {about['isa']}, torch {about['versions']['torch']}, {about['date'][:10]}:"
        yield ""
        heads = [f"{dtype}, {what}" for dtype in ("float32", "bf16", "fp16") for what in ("result", "gradients")]
        yield f"| op | {' | '.join(heads)} |"
        yield f"|---|{'---|' * len(heads)}"
        cases: dict[str, dict[str, Mapping[str, Pair]]] = {}
        for row in results["rows"]:
            cases.setdefault(row["case"], {})[row["dtype"]] = row["errors"]
        for case, by_dtype in cases.items():
            yield _row(case, by_dtype)
        yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed")
    text = PAGE.read_text(encoding="utf-8")
    written = replaced(text, BEGIN, END, tables(newest()))
    if not parser.parse_args().check:
        PAGE.write_text(written, encoding="utf-8")
    elif written != text:
        print(f"{PAGE.name} is not what scripts/write_accuracy.py writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

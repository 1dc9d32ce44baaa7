"""Write docs/recipes.md from the recipes: what each does, its source, its data, its wiring, and what it has reached
(`benches/results/recipes-*.json`).

python scripts/write_recipes.py            # writes docs/recipes.md
python scripts/write_recipes.py --check    # compares with the committed page
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmkernels.pretrain import recipes
from mmkernels.pretrain.picture import picture

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipes.md"

sys.path.insert(0, str(ROOT / "benches"))
import recipes as bench  # noqa: E402

HEAD = """# The recipes

Each is one value in `mmkernels/pretrain/recipes/`. Run one with `mmkernels pretrain --recipe NAME`; `--help` then shows
its settings, and [Pretraining](pretraining.md) tells how to write your own. This page is generated from them by
`scripts/write_recipes.py`.

"""

MEASURED = """
## What they reach

Held-out figures of the settings below on the bundled data, as `python benches/recipes.py` measures them; a ±
is half the range of the seeds. Held out are, of the [emoji](data-emoji.md), a style of drawing (A), concepts (B) and
both (C); of the [scenes](data-scenes.md), other scenes, pairs of objects never seen together (combinations), and a
style of drawing. The ablation is the same recipe without what it is about; rows with an arrow fine-tune a trained one
[with a tenth of the labels](transfer.md). Minutes are those of the steps on two cores with AVX-512, or with AVX2 alone
where it says so. A figure that is not better than chance and than every run of its ablation is marked, and so are
adapters that reach less than 95% of a full fine-tune. Regions of the scenes are pixels: recipes that mask some name
visible ones as well (`keep`), which a detector's features would tell them. What lacks these tasks lacks that, too.

"""

TRIED = """

Where a figure is not shown, this was tried, on validation splits unless another is named:

"""


def page() -> str:
    """The whole page."""
    every = {name: recipes.load(name) for name in recipes.names()}
    rows = ["| recipe | what it does | data | source |", "|---|---|---|---|"]
    rows += [f"| [{name}](#{name}) | {r.summary} | {r.data} | {r.source} |" for name, r in every.items()]
    results = sorted((ROOT / "benches/results").glob("recipes-*.json"))
    found, speeds = bench.newest(results)
    measured = MEASURED + bench.table(found, speeds) + TRIED + bench.tried(found) + "\n" if results else ""
    parts = [HEAD + "\n".join(rows) + "\n" + measured]
    for name, recipe in every.items():
        settings = ", ".join(f"{key} {value}" for key, value in recipe.settings.items())
        more = f"\nSettings of its own: {settings}.\n" if settings else ""
        parts.append(f"\n## {name}\n\n```\n{picture(name, recipe)}\n```\n{more}")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed page")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is not what scripts/write_recipes.py writes", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Draw `docs/images/mask-*.svg`: what each query sees in the examples of docs/masks.md.

python docs/drawings/masks.py            # writes the pictures
python docs/drawings/masks.py --check    # compares with the committed ones
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from mmkernels import AttentionMask, Modality

IMAGES = Path(__file__).resolve().parents[1] / "images"
CELL, GAP = 9, 1

STYLE = """<style>
.seen { fill: #0b5cad } .hidden { fill: #e3e7ec } text { font: 9px sans-serif; fill: #59636e }
@media (prefers-color-scheme: dark) { .seen { fill: #74b4f5 } .hidden { fill: #333b45 } text { fill: #a0aab5 } }
</style>"""


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def masks() -> dict[str, tuple[str, Tensor]]:
    """Name -> what it is, bool [Tq, Tk]. The same calls as in docs/masks.md."""
    samples = boundaries(5, 7, 4)
    text, image, audio = (int(kind) for kind in (Modality.TEXT, Modality.IMAGE, Modality.AUDIO))
    kinds = [text] * 2 + [image] * 4 + [text] * 3 + [image] * 3 + [text] * 4
    modality = torch.tensor(kinds, dtype=torch.uint8)
    spans = torch.tensor([-1] * 2 + [0] * 4 + [-1] * 3 + [1] * 3 + [-1] * 4, dtype=torch.int32)
    two = boundaries(9, 7)
    padding = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    media_q = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, -1, 0, 0, 0], dtype=torch.int32)
    media_k = torch.tensor([0] * 3 + [1] * 3 + [0] * 3, dtype=torch.int32)
    crossed = torch.tensor([text] * 4 + [image] * 5 + [text] * 3 + [audio] * 4, dtype=torch.uint8)
    lo = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4], dtype=torch.int32)
    hi = torch.tensor([4, 4, 4, 4, 8, 8, 8, 8], dtype=torch.int32)
    found = {
        "packed": ("packed", AttentionMask.packed(samples).to_dense(16, 16)),
        "causal": ("packed, causal", AttentionMask.packed(samples, causal=True).to_dense(16, 16)),
        "window": ("causal with a window of 3", AttentionMask.packed(samples, causal=True, window=3).to_dense(16, 16)),
        "multimodal": ("multimodal", AttentionMask.multimodal(two, modality, spans).to_dense(16, 16)),
        "prefix": ("prefix", AttentionMask.prefix(two, torch.tensor([4, 2])).to_dense(16, 16)),
        "cross": ("packed over two streams", AttentionMask.packed(samples, boundaries(4, 4, 4)).to_dense(16, 12)),
        "media": (
            "media",
            AttentionMask.media(boundaries(8, 4), boundaries(6, 3), media_q, media_k).to_dense(12, 9),
        ),
        "cross-only": ("cross_only", AttentionMask.cross_only(two, crossed).to_dense(16, 16)),
        "padding": ("from_padding", AttentionMask.from_padding(padding).to_dense(16, 16)),
        "rows": ("from_rows", AttentionMask.from_rows(lo, hi).to_dense(8, 8)),
    }
    return found


def drawn(title: str, dense: Tensor) -> str:
    """Queries downwards, keys to the right."""
    rows, columns = dense.shape
    width, height = 14 + columns * CELL, 14 + rows * CELL
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    share = dense.double().mean().item()
    parts = [f'{head} role="img">', f"<title>{title}</title>"]
    parts.append(f"<desc>{rows} queries by {columns} keys, of which {share:.0%} of the pairs are visible</desc>{STYLE}")
    parts.append(
        '<text x="14" y="9">keys</text><text transform="translate(9 14) rotate(-90)" text-anchor="end">queries</text>'
    )
    for seen, name in ((False, "hidden"), (True, "seen")):
        at = (dense == seen).nonzero().tolist()
        path = "".join(f"M{14 + j * CELL} {14 + i * CELL}h{CELL - GAP}v{CELL - GAP}h-{CELL - GAP}z" for i, j in at)
        parts.append(f'<path class="{name}" d="{path}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed pictures")
    pictures = {IMAGES / f"mask-{name}.svg": drawn(*each) for name, each in masks().items()}
    if not parser.parse_args().check:
        for path, text in pictures.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path.name for path, text in pictures.items() if not path.exists() or path.read_text("utf-8") != text]
    for name in stale:
        print(f"{name} is not what docs/drawings/masks.py draws", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())

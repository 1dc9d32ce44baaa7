# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "pillow>=10", "resvg-py==0.5.0"]
# ///
"""Build the embedded image-text data set: emoji drawn by five vendors, with names, keywords and groups.

    python scripts/build_emoji_pack.py            # writes mmkernels/pretrain/data/emoji/
    python scripts/build_emoji_pack.py --check    # rebuilds in memory and compares with the committed pack

Input: every emoji of emojibase that is neither a flag nor a component (skin tones are variants, not concepts), drawn by
Noto, Noto v1, Twemoji, Fluent flat and Emoji One 2 where the vendor has it. Output: `emoji.npz` (palette indices and
one 128-colour RGBA palette per vendor, readable with NumPy alone), `LICENSES/`, `ATTRIBUTION.md`.

The sources are npm packages, pinned by version and by the sha512 of their tarball, and fetched by the `npm` client from
any registry or mirror: the hashes verify them. The output is a pure function of them: two runs give the same bytes.
Needs `npm` and the packages in the block at the top; reading the pack needs neither.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from emoji_drawings import COLOURS, SIZE, IconSet, find_svgs, psnr, quantise, rasterise
from emoji_sources import PACKAGES, VENDORS, WORDS, family, held_out, read_concepts
from pack_files import DATA, Pack, Source, fetch, finish, json_array, parser_of


def build_arrays(sources: dict[str, Source]) -> dict[str, np.ndarray]:
    concepts = read_concepts(sources["emojibase-data"], sources["cldr-annotations-full"])
    sets = {vendor.name: IconSet(sources[vendor.package]) for vendor in VENDORS}
    named = [icon_set for icon_set in sets.values() if icon_set.by_code]
    table = {
        "codes": [c.code for c in concepts],
        "names": [c.name for c in concepts],
        "keywords": [c.keywords for c in concepts],
        "families": [family(c.name) for c in concepts],
        "groups": [c.group for c in concepts],
        "held_out": held_out(concepts),
        "vendors": [v.name for v in VENDORS],
    }
    arrays = {"table": json_array(table)}
    for vendor in VENDORS:
        svgs = find_svgs(sets[vendor.name], named, concepts)
        present = [i for i, svg in enumerate(svgs) if svg is not None]
        images = np.stack([rasterise(svg) for svg in svgs if svg is not None])
        indices, palette = quantise(images)
        quality = psnr(images, indices, palette)
        print(f"{vendor.name:12} {len(present):5} images, PSNR {quality:.1f} dB", file=sys.stderr)
        arrays[f"{vendor.name}/concepts"] = np.array(present, np.int16)
        arrays[f"{vendor.name}/palette"] = palette
        arrays[f"{vendor.name}/indices"] = indices
    return arrays


def licence_texts(sources: dict[str, Source]) -> dict[str, str]:
    spdx = sources["spdx-license-list"]
    texts = {name: spdx.json(f"licenses/{name}.json")["licenseText"] for name in ("Apache-2.0", "CC-BY-4.0", "MIT")}
    year_and_holder = "Copyright (c) <year> <copyright holders>"
    if year_and_holder not in texts["MIT"]:
        raise ValueError("the MIT template has changed")
    return {
        "Apache-2.0.txt": texts["Apache-2.0"],
        "CC-BY-4.0.txt": texts["CC-BY-4.0"],
        "MIT-fluent-emoji.txt": texts["MIT"].replace(year_and_holder, "Copyright (c) Microsoft Corporation."),
        "MIT-emojibase.txt": sources["emojibase-data"].text("LICENSE"),
        "Unicode-3.0.txt": sources["cldr-annotations-full"].text("LICENSE"),
    }


def attribution(arrays: dict[str, np.ndarray]) -> str:
    lines = [
        "# Attribution",
        "",
        "`emoji.npz` contains artwork and words by the authors below, who do not endorse this project.",
        "",
        f"**Modified:** every drawing was rasterised to {SIZE} x {SIZE} pixels and reduced to {COLOURS} colours per "
        "vendor; flags, skin tones and anything that is not an emoji were left out. Names and keywords were merged "
        "and put in order. The changes were made by `scripts/build_emoji_pack.py`.",
        "",
        "| in the pack | images | licence | from | taken from the package |",
        "|---|---|---|---|---|",
    ]
    for vendor in VENDORS:
        count = len(arrays[f"{vendor.name}/concepts"])
        package = f"`{vendor.package}` {PACKAGES[vendor.package].version}"
        lines.append(f"| {vendor.name} | {count} | {vendor.licence} | {vendor.credit} | {package} |")
    for what, licence, credit, package in WORDS:
        lines.append(f"| {what} | | {licence} | {credit} | `{package}` {PACKAGES[package].version} |")
    lines += [
        "",
        "The licence texts are in `LICENSES/`. CC-BY-4.0 is at https://creativecommons.org/licenses/by/4.0/; the "
        "material is",
        "provided as is, without warranties (see its section 5).",
        "",
    ]
    return "\n".join(lines)


def build() -> Pack:
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: fetch(name, package, Path(folder)) for name, package in PACKAGES.items()}
        arrays = build_arrays(sources)
        return Pack(arrays, attribution(arrays), licence_texts(sources))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=DATA / "emoji", help="output folder (default: the package's own)")
    args = parser.parse_args()
    finish(build, args.out / "emoji.npz", args.check)


if __name__ == "__main__":
    main()

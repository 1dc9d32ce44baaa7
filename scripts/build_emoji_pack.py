# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "pillow>=10", "resvg-py==0.5.0"]
# ///
"""Build the embedded image-text data set: emoji drawn by five vendors, with names and keywords.

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

import argparse
import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from emoji_drawings import COLOURS, SIZE, IconSet, find_svgs, psnr, quantise, rasterise
from emoji_sources import PACKAGES, VENDORS, WORDS, Source, family, fetch, held_out, read_concepts

PACK_DIR = Path(__file__).resolve().parent.parent / "mmkernels" / "pretrain" / "data" / "emoji"


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Like np.savez_compressed, but reproducible: no time stamps, no platform field, no pickles."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            body = io.BytesIO()
            np.lib.format.write_array(body, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(entry, body.getvalue())
    return out.getvalue()


def build_arrays(sources: dict[str, Source]) -> dict[str, np.ndarray]:
    concepts = read_concepts(sources["emojibase-data"], sources["cldr-annotations-full"])
    sets = {vendor.name: IconSet(sources[vendor.package]) for vendor in VENDORS}
    named = [icon_set for icon_set in sets.values() if icon_set.by_code]
    table = {
        "codes": [c.code for c in concepts],
        "names": [c.name for c in concepts],
        "keywords": [c.keywords for c in concepts],
        "families": [family(c.name) for c in concepts],
        "held_out": held_out(concepts),
        "vendors": [v.name for v in VENDORS],
    }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    arrays = {"table": np.frombuffer(text, np.uint8)}
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
        "The licence texts are in `LICENSES/`. CC-BY-4.0 is at https://creativecommons.org/licenses/by/4.0/; the",
        "material is provided as is, without warranties (see its section 5).",
        "",
    ]
    return "\n".join(lines)


def compare(arrays: dict[str, np.ndarray], path: Path) -> list[str]:
    """Names of the arrays that differ from the pack at `path`. Bytes are not compared, because zlib versions differ."""
    with np.load(path, allow_pickle=False) as pack:
        names = sorted(set(pack.files) | set(arrays))
        return [n for n in names if n not in pack.files or n not in arrays or not np.array_equal(pack[n], arrays[n])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed pack instead of writing")
    parser.add_argument("--out", type=Path, default=PACK_DIR, help="output folder (default: the package's own)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: fetch(name, Path(folder)) for name in PACKAGES}
        arrays = build_arrays(sources)
        texts = licence_texts(sources)
    if args.check:
        different = compare(arrays, args.out / "emoji.npz")
        if different:
            raise SystemExit(f"the pack differs from a fresh build in: {', '.join(different)}")
        print("the pack equals a fresh build")
        return
    (args.out / "LICENSES").mkdir(parents=True, exist_ok=True)
    (args.out / "emoji.npz").write_bytes(npz_bytes(arrays))
    (args.out / "ATTRIBUTION.md").write_text(attribution(arrays), encoding="utf-8")
    for name, text in texts.items():
        (args.out / "LICENSES" / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"{args.out / 'emoji.npz'}: {(args.out / 'emoji.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

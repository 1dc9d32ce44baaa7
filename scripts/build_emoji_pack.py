# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "pillow>=10", "resvg-py==0.5.0"]
# ///
"""Build the embedded image-text data set: emoji drawn by five vendors, with names and keywords.

    python scripts/build_emoji_pack.py            # writes mmkernels/pretrain/data/emoji/
    python scripts/build_emoji_pack.py --check    # rebuilds in memory and compares with the committed pack

What goes in: every emoji of emojibase that is neither a flag nor a component (skin tones are variants, not concepts),
drawn by Noto, Noto v1, Twemoji, Fluent flat and Emoji One 2 where the vendor has it. What comes out: `emoji.npz`
(palette indices and one 128-colour RGBA palette per vendor, readable with NumPy alone), `LICENSES/`, `ATTRIBUTION.md`.

The sources are npm packages, pinned by version and by the sha512 of their tarball, fetched by the `npm` client (any
registry or mirror it is set up for will do: the hashes decide). The output is a pure function of them: two runs give
the same bytes. Needs `npm`, and the packages named in the block at the top; nothing of this is needed to read the pack.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resvg_py
from PIL import Image

PACK_DIR = Path(__file__).resolve().parent.parent / "mmkernels" / "pretrain" / "data" / "emoji"
SIZE = 48  # pixels: some 15% more bytes than 32 px, and room for crops and zooms at 32 px training resolution
COLOURS = 128  # per vendor: 2.4 MB in all, against 2.7 MB and 3 dB more with 256
HELD_OUT = 0.12  # share of the families kept out of training (splits B and C)
FLAGS, COMPONENTS = 9, 2  # emojibase groups left out


class Package(NamedTuple):
    version: str
    sha512: str  # of the tarball, base64, as in a lock file


PACKAGES = {
    "@iconify-json/noto": Package(
        "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "@iconify-json/noto-v1": Package(
        "1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="
    ),
    "@iconify-json/twemoji": Package(
        "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "@iconify-json/fluent-emoji-flat": Package(
        "1.2.6", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="
    ),
    "@iconify-json/emojione": Package(
        "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="
    ),
    "emojibase-data": Package(
        "17.0.0", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="
    ),
    "cldr-annotations-full": Package(
        "48.2.0", "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ=="
    ),
    "spdx-license-list": Package(
        "6.12.0", "+nUYqm3aZMSHbjsthK+i/HHI2okTElCvqwUd4k8QcSk+FTGgjq+fsdFj2wZOaX6XmR2JdWhf/NeflNnvKOjcnQ=="
    ),
}


class Vendor(NamedTuple):
    name: str  # as in the pack
    package: str
    licence: str
    credit: str


VENDORS = (
    Vendor(
        "noto", "@iconify-json/noto", "Apache-2.0", "Noto Emoji, Google Inc., https://github.com/googlefonts/noto-emoji"
    ),
    Vendor(
        "noto-v1",
        "@iconify-json/noto-v1",
        "Apache-2.0",
        "Noto Emoji (first design), Google Inc., https://github.com/googlefonts/noto-emoji",
    ),
    Vendor(
        "twemoji",
        "@iconify-json/twemoji",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji",
    ),
    Vendor(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "MIT",
        "Fluent Emoji (flat), Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    Vendor(
        "emojione",
        "@iconify-json/emojione",
        "CC-BY-4.0",
        "Emojitwo, https://github.com/EmojiTwo/emojitwo, originally released as Emojione 2.2 by Ranks.com, "
        "with contributions from the Emojitwo community",
    ),
)

WORDS = (
    ("names, tags", "MIT", "Emojibase, Miles Johnson, https://github.com/milesj/emojibase", "emojibase-data"),
    ("keywords", "Unicode-3.0", "Unicode CLDR, Unicode, Inc., https://cldr.unicode.org", "cldr-annotations-full"),
)


# ---------------------------------------------------------------------------------------------- sources


class Source:
    """The files of one npm package, read from its verified tarball."""

    def __init__(self, tarball: Path) -> None:
        self._tar = tarfile.open(tarball)  # noqa: SIM115  # lives as long as the source

    def text(self, path: str) -> str:
        member = self._tar.extractfile(f"package/{path}")
        if member is None:
            raise FileNotFoundError(path)
        return member.read().decode("utf-8")

    def json(self, path: str) -> Any:
        return json.loads(self.text(path))


def fetch(name: str, folder: Path) -> Source:
    package = PACKAGES[name]
    spec = f"{name}@{package.version}"
    done = subprocess.run(
        ["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, encoding="utf-8"
    )
    tarball = folder / done.stdout.strip().splitlines()[-1]
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise SystemExit(f"{spec}: expected sha512 {package.sha512}, got {digest}")
    return Source(tarball)


# ---------------------------------------------------------------------------------------------- concepts


class Concept(NamedTuple):
    code: str  # code points, lower case, without the variation selector FE0F
    name: str
    keywords: list[str]


def strip_fe0f(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_concepts(emojibase: Source, cldr: Source) -> list[Concept]:
    """Emojibase gives the list, the names and tags; CLDR adds its own keywords."""
    annotations = cldr.json("annotations/en/annotations.json")["annotations"]["annotations"]
    by_code = {strip_fe0f("-".join(f"{ord(c):x}" for c in emoji)): a for emoji, a in annotations.items()}
    concepts = []
    for entry in emojibase.json("en/data.json"):
        if entry.get("group") in (None, FLAGS, COMPONENTS):
            continue
        code = strip_fe0f(entry["hexcode"])
        keywords = [*entry.get("tags", ()), *by_code.get(code, {}).get("default", ())]
        unique = dict.fromkeys(k.strip() for k in keywords if k.strip().lower() != entry["label"].lower())
        concepts.append(Concept(code, entry["label"], list(unique)))
    return sorted(concepts)


def family(name: str) -> str:
    """The name less who does it: `woman judge`, `man judge` and `judge` are one family."""
    words = re.findall(r"[^\s:,]+", name.lower())
    people = {"man", "woman", "person", "men", "women", "people"}
    return " ".join(w for w in words if w not in people) or name.lower()


def held_out(concepts: list[Concept]) -> list[int]:
    """The concepts of the first 12% of families in the order of their blake2b digests."""
    families = sorted({family(c.name) for c in concepts}, key=lambda f: hashlib.blake2b(f.encode()).digest())
    chosen = set(families[: round(HELD_OUT * len(families))])
    return [i for i, c in enumerate(concepts) if family(c.name) in chosen]


# ---------------------------------------------------------------------------------------------- drawings


class IconSet:
    """One vendor's icons: by name, or by code point where the set has a `chars.json`."""

    def __init__(self, source: Source) -> None:
        self.data = source.json("icons.json")
        self.icons: dict[str, dict[str, Any]] = self.data["icons"]
        self.aliases: dict[str, dict[str, Any]] = self.data.get("aliases", {})
        self.by_code = {strip_fe0f(code): name for code, name in source.json("chars.json").items()}

    def names_of(self, code: str) -> list[str]:
        """The name of a code point in this set, then the aliases of that name."""
        name = self.by_code.get(code)
        if name is None:
            return []
        return [name, *(alias for alias, to in self.aliases.items() if to["parent"] == name and set(to) == {"parent"})]

    def svg(self, name: str) -> str | None:
        """The SVG of an icon or alias (flips and quarter turns applied), drawn on a centred square; None if absent."""
        transform = ""
        extra: dict[str, Any] = {}
        while name not in self.icons:
            if name not in self.aliases:
                return None
            extra = {**self.aliases[name], **extra}
            name = self.aliases[name]["parent"]
        icon = self.icons[name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        x, y = left + width / 2, top + height / 2
        if extra.get("hFlip") or extra.get("vFlip") or extra.get("rotate"):
            flip = f"scale({-1 if extra.get('hFlip') else 1} {-1 if extra.get('vFlip') else 1})"
            turn = f"rotate({90 * extra.get('rotate', 0)})"
            transform = f' transform="translate({x} {y}) {turn} {flip} translate({-x} {-y})"'
        side = max(width, height)
        box = f"{x - side / 2} {y - side / 2} {side} {side}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{side}" height="{side}"><g{transform}>{icon["body"]}</g></svg>'
        )


def slug(label: str) -> str:
    """The icon name that a label would have; empty if the label has signs that no name can carry (`UP! button`)."""
    if re.search(r"[!#*]", label):
        return ""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "").replace("’", "")).strip("-")


def find_svgs(icon_set: IconSet, named: list[IconSet], concepts: list[Concept]) -> list[str | None]:
    """A vendor's drawing of each concept.

    Sets without code points are searched by name: the label's own, then the names that the other sets use for the
    same code point. There a drawing may be claimed twice, as by `man running` and `person running`: it goes to the
    claimant under whose name it is filed, the other being an alias, or to nobody if that is not the same family.
    """
    if icon_set.by_code:
        found = [icon_set.names_of(concept.code)[:1] for concept in concepts]
        return [icon_set.svg(names[0]) if names else None for names in found]
    claims: dict[str, list[tuple[bool, int]]] = {}
    for i, concept in enumerate(concepts):
        names = [slug(concept.name), *(name for other in named for name in other.names_of(concept.code))]
        name = next((name for name in names if icon_set.svg(name) is not None), None)
        if name is not None:
            claims.setdefault(icon_set.svg(name) or "", []).append((name in icon_set.aliases, i))
    svgs: list[str | None] = [None] * len(concepts)
    for svg, claimants in claims.items():
        if len({family(concepts[i].name) for _, i in claimants}) == 1:
            svgs[min(claimants)[1]] = svg
    return svgs


def rasterise(svg: str) -> np.ndarray:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    if image.shape != (SIZE, SIZE, 4):
        raise ValueError(f"rasterise: expected {SIZE} x {SIZE}, got {image.shape}")
    return image


# ---------------------------------------------------------------------------------------------- quantisation


def quantise(images: np.ndarray, rounds: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, S, S, 4] to palette indices [n, S, S] and a straight-alpha palette [128, 4], by weighted k-means.

    Distances are taken in premultiplied colour, where what cannot be seen has no weight. Colours are first binned to
    5 bits a channel, so that k-means sees some ten thousand weighted points instead of millions of pixels.
    """
    pixels = images.reshape(-1, 4).astype(np.uint32)
    alpha = pixels[:, 3:]
    premultiplied = np.concatenate([(pixels[:, :3] * alpha + 127) // 255, alpha], 1)
    binned = premultiplied >> 3
    keys = (binned[:, 0] << 15) | (binned[:, 1] << 10) | (binned[:, 2] << 5) | binned[:, 3]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    sums = np.stack([np.bincount(inverse, premultiplied[:, c]) for c in range(4)], 1)
    points = sums / counts[:, None]  # mean colour of each bin
    weights = np.sqrt(counts.astype(np.float64))  # flat areas would take the whole palette otherwise
    centres = np.zeros((COLOURS, 4))  # entry 0 stays fully transparent
    distance = ((points - centres[0]) ** 2).sum(1)
    for i in range(1, COLOURS):  # weighted farthest-point start: deterministic, and no colour is forgotten
        centres[i] = points[np.argmax(distance * weights)]
        distance = np.minimum(distance, ((points - centres[i]) ** 2).sum(1))
    for _ in range(rounds):
        nearest = _nearest(points, centres)
        mass = np.bincount(nearest, weights, COLOURS)
        moved = np.stack([np.bincount(nearest, weights * points[:, c], COLOURS) for c in range(4)], 1)
        centres[1:] = np.where(mass[1:, None] > 0, moved[1:] / np.maximum(mass[1:, None], 1e-9), centres[1:])
    centres = np.rint(centres)
    order = np.lexsort((centres @ [0.299, 0.587, 0.114, 0.0], centres[:, 3]))  # neighbours alike: deflates better
    centres = centres[order]
    indices = _nearest(points, centres)[inverse].astype(np.uint8).reshape(images.shape[:3])
    opacity = np.maximum(centres[:, 3:], 1)
    straight = np.where(centres[:, 3:] > 0, np.minimum(centres[:, :3] * 255 / opacity, 255), 0)
    return indices, np.rint(np.concatenate([straight, centres[:, 3:]], 1)).astype(np.uint8)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    best = [
        ((chunk[:, None, :] - centres[None]) ** 2).sum(2).argmin(1)  # [4096, 128, 4], no BLAS: the same everywhere
        for chunk in (points[i : i + 4096] for i in range(0, len(points), 4096))
    ]
    return np.concatenate(best)


def psnr(images: np.ndarray, indices: np.ndarray, palette: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the visible picture, over white."""
    error = []
    for original, index in zip(images, indices, strict=True):
        a, b = (_over_white(x) for x in (original, palette[index]))
        error.append(((a - b) ** 2).mean())
    return float(10 * np.log10(255**2 / np.mean(error)))


def _over_white(image: np.ndarray) -> np.ndarray:
    alpha = image[..., 3:].astype(np.float64) / 255
    return image[..., :3] * alpha + 255 * (1 - alpha)


# ---------------------------------------------------------------------------------------------- writing


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """As np.savez_compressed, with every byte fixed: no time stamps, no platform field, pickles refused."""
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
    """Names of the arrays that differ from the pack at `path`; not its bytes, as versions of zlib differ."""
    with np.load(path, allow_pickle=False) as pack:
        names = sorted(set(pack.files) | set(arrays))
        return [n for n in names if n not in pack.files or n not in arrays or not np.array_equal(pack[n], arrays[n])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed pack instead of writing")
    parser.add_argument("--out", type=Path, default=PACK_DIR, help="folder to write (default: the package's own)")
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

"""Sources of the emoji pack: npm packages by version and hash, the vendors' licences, the list of concepts."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from pack_files import Package, Source

HELD_OUT = 0.12  # fraction of the families kept out of training (splits B and C)
FLAGS, COMPONENTS = 9, 2  # emojibase groups left out


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
    name: str  # in the pack
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
    ("names, tags, groups", "MIT", "Emojibase, Miles Johnson, https://github.com/milesj/emojibase", "emojibase-data"),
    ("keywords", "Unicode-3.0", "Unicode CLDR, Unicode, Inc., https://cldr.unicode.org", "cldr-annotations-full"),
)


class Concept(NamedTuple):
    code: str  # code points in lower case, without the variation selector FE0F
    name: str
    keywords: list[str]
    group: str


def strip_fe0f(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_concepts(emojibase: Source, cldr: Source) -> list[Concept]:
    """Emojibase gives the list, the names, tags and groups; CLDR adds keywords."""
    annotations = cldr.json("annotations/en/annotations.json")["annotations"]["annotations"]
    by_code = {strip_fe0f("-".join(f"{ord(c):x}" for c in emoji)): a for emoji, a in annotations.items()}
    groups = {group["order"]: group["message"] for group in emojibase.json("en/messages.json")["groups"]}
    concepts = []
    for entry in emojibase.json("en/data.json"):
        if entry.get("group") in (None, FLAGS, COMPONENTS):
            continue
        code = strip_fe0f(entry["hexcode"])
        keywords = [*entry.get("tags", ()), *by_code.get(code, {}).get("default", ())]
        unique = dict.fromkeys(k.strip() for k in keywords if k.strip().lower() != entry["label"].lower())
        concepts.append(Concept(code, entry["label"], list(unique), groups[entry["group"]]))
    return sorted(concepts)


def family(name: str) -> str:
    """The name without the person: `woman judge`, `man judge` and `judge` are one family."""
    words = re.findall(r"[^\s:,]+", name.lower())
    people = {"man", "woman", "person", "men", "women", "people"}
    return " ".join(w for w in words if w not in people) or name.lower()


def held_out(concepts: list[Concept]) -> list[int]:
    """The concepts of the first 12% of families, ordered by blake2b digest."""
    families = sorted({family(c.name) for c in concepts}, key=lambda f: hashlib.blake2b(f.encode()).digest())
    chosen = set(families[: round(HELD_OUT * len(families))])
    return [i for i, c in enumerate(concepts) if family(c.name) in chosen]

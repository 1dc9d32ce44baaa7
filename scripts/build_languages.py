# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26"]
# ///
"""Build the embedded names of the emoji in sixteen languages, from Unicode CLDR.

    python scripts/build_languages.py            # writes mmkernels/pretrain/data/languages/
    python scripts/build_languages.py --check    # rebuilds in memory and compares with the committed pack

Input: the concepts of the committed emoji pack, and CLDR's annotations: the short names of single emoji, and those that
CLDR derives for sequences such as `woman judge`. Output: `languages.npz` (one JSON table, readable with NumPy alone),
`LICENSES/`, `ATTRIBUTION.md`. The sources are npm packages pinned by version and hash. Needs `npm`.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from pathlib import Path

from emoji_sources import PACKAGES, strip_fe0f
from pack_files import DATA, Pack, Package, Source, emoji_table, fetch, finish, json_array, parser_of

ANNOTATIONS, DERIVED = "cldr-annotations-full", "cldr-annotations-derived-full"
SOURCES = {
    ANNOTATIONS: PACKAGES[ANNOTATIONS],
    DERIVED: Package(
        "48.2.0", "log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw=="
    ),
}
# Large languages of ten scripts; where some share a script, ones of different branches.
LANGUAGES = {
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "tr": "Turkish",
    "ru": "Russian",
    "uk": "Ukrainian",
    "el": "Greek",
    "ar": "Arabic",
    "he": "Hebrew",
    "hi": "Hindi",
    "th": "Thai",
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Chinese (simplified)",
}

ATTRIBUTION = f"""# Attribution

`languages.npz` contains names of emoji from Unicode CLDR (Unicode, Inc., https://cldr.unicode.org), licensed under
Unicode-3.0 (`LICENSES/Unicode-3.0.txt`), taken from the packages `{ANNOTATIONS}` and
`{DERIVED}` {SOURCES[DERIVED].version}. Unicode, Inc. does not endorse this project.

**Modified:** only the short names of the emoji in `emoji/emoji.npz` are kept, in {len(LANGUAGES)} languages.
In five Ukrainian names a Latin letter among Cyrillic ones became the Cyrillic letter that looks the same. The changes
were made by `scripts/build_languages.py`.
"""


_LOOKALIKES = str.maketrans("cI", "\u0441\u0406")  # Latin to Cyrillic


def in_one_script(name: str) -> str:
    """The name with each Latin letter of a Cyrillic word replaced by the Cyrillic one that looks the same."""
    words = re.split(r"(\W+)", name)
    return "".join(w.translate(_LOOKALIKES) if re.search("[\u0400-\u04ff]", w) else w for w in words)


def short_names(sources: dict[str, Source], language: str) -> dict[str, str]:
    """The short name of each emoji, by its code points as the emoji pack writes them."""
    files = (
        (sources[ANNOTATIONS], "annotations/{}/annotations.json", "annotations"),
        (sources[DERIVED], "annotationsDerived/{}/annotations.json", "annotationsDerived"),
    )
    names: dict[str, str] = {}
    for source, path, key in files:
        for emoji, annotation in source.json(path.format(language))[key]["annotations"].items():
            if "tts" in annotation:
                code = strip_fe0f("-".join(f"{ord(char):04x}" for char in emoji))
                names[code] = in_one_script(unicodedata.normalize("NFC", annotation["tts"][0].strip()))
    return names


def build() -> Pack:
    codes = emoji_table()["codes"]
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: fetch(name, package, Path(folder)) for name, package in SOURCES.items()}
        licence = sources[ANNOTATIONS].text("LICENSE")
        if sources[DERIVED].text("LICENSE") != licence:
            raise SystemExit(f"{DERIVED}: expected the licence of {ANNOTATIONS}")
        found = {language: short_names(sources, language) for language in LANGUAGES}
    names = {language: [by_code.get(code) for code in codes] for language, by_code in found.items()}
    table = {"titles": LANGUAGES, "names": names}  # null where CLDR has no name
    return Pack({"table": json_array(table)}, ATTRIBUTION, {"Unicode-3.0.txt": licence})


def main() -> None:
    args = parser_of(__doc__).parse_args()
    finish(build, DATA / "languages" / "languages.npz", args.check)


if __name__ == "__main__":
    main()

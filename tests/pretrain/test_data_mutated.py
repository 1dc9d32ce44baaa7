"""Whatever happens to the bytes or the file names: each sample is read, or counted and named."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from pretrain_data import png

from mmkernels.plan_cli.files import FileError, read_columns
from mmkernels.pretrain.data import FolderDataset, Source, TooManyBrokenError, WebDataset
from mmkernels.pretrain.data.captions import LONGEST
from mmkernels.pretrain.data.unicode import printable

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
Edit = tuple[str, float, bytes]

# Bytes that are special in one of the formats, and any others.
PIECES = st.sampled_from(
    [b"\0", b"\n", b"\r", b'"', b",", b"\\", b"{", b"[", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf"]
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["put", "insert", "drop", "cut"]), st.floats(0, 0.999), PIECES | st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, edits: list[Edit]) -> bytes:
    """The content with bytes overwritten, inserted, dropped, or truncated at a place given as a share of the length."""
    for kind, share, piece in edits:
        at = int(share * len(content))
        after = {"put": at + len(piece), "insert": at, "drop": at + 1 + len(piece), "cut": len(content)}[kind]
        content = content[:at] + (piece if kind in ("put", "insert") else b"") + content[after:]
    return content


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", errors="surrogateescape", encoding="utf-8") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def opened(make: Callable[[], Source], where: str) -> Source | None:
    """The data set after reading all of it once; None if it was refused with an error that names the file."""
    try:
        data = make()
    except ValueError as error:
        if isinstance(error, TooManyBrokenError | UnicodeError) or where not in str(error):
            raise
        return None
    for sample in data.read(range(len(data))):
        assert all(caption.encode("utf-8") for caption in sample.captions)
        assert len(max(sample.captions, key=len)) <= LONGEST
    return data


def named(data: Source) -> set[str]:
    """What is read, and what is counted."""
    return {data.name(i) for i in range(len(data))} | set(data.broken.reasons) | set(data.broken.left_out)


WHOLE = {f"{i}.{kind}": text for i in range(6) for kind, text in (("png", png(i)), ("txt", b"thing %d" % i))}
SHARD = tar_of(WHOLE)


def seen_by_tarfile(path: Path) -> list[str]:
    names: list[str] = []
    with suppress(tarfile.TarError), tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        names.extend(member.name for member in tar if not member.isdir())
    return names


def accounted(name: str, label: str, names: set[str]) -> bool:
    """Whether a member is one of these, or belongs to the sample of its key or of its stem."""
    key = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    candidates = {name, *([key[1], name.rpartition(".")[0]] if key else [])}
    return bool({printable(f"{label}/{candidate}") for candidate in candidates} & names)


@given(EDITS)
@quick
def test_a_mutated_shard(edits: list[Edit]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(mutated(SHARD, edits))
        data = opened(lambda: WebDataset(path, resolution=4, max_broken=1.0), "s.tar")
        if data is None:
            return
        names, members = named(data), seen_by_tarfile(path)
        assert all(accounted(name, "s.tar", names) for name in members)
        lost = [name for name in WHOLE if not accounted(name, "s.tar", names)]
        assert not lost or "s.tar" in data.broken.left_out, "files are lost without a word"
        if all(kind == "put" for kind, _, _ in edits):
            assert len(lost) <= 2 * len(edits), "a damaged header takes more than its own file with it"


NAMES = st.lists(
    st.text(st.sampled_from("ab./_ é\n\udce9"), min_size=1, max_size=8).flatmap(
        lambda stem: st.sampled_from([stem, f"{stem}.png", f"{stem}.txt", f"{stem}.json", f"{stem}.cls"])
    ),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(NAMES)
@example(["IMG 2020.01.02.png", "IMG 2020.01.02.txt"])
@example(["x.input.png", "x.outputs.txt"])
@quick
def test_any_names_in_a_shard(names: list[str]) -> None:
    files = {f"{i}.{kind}": content for i, (kind, content) in enumerate([("png", png())])}
    files |= {"0.txt": b"there is one"} | {name: png() if name.endswith("png") else b'{"text": "x"}' for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(tar_of(files))
        data = opened(lambda: WebDataset(path, resolution=4, max_broken=1.0), "s.tar")
        assert data is not None
        found = named(data)
        missing = [name for name in seen_by_tarfile(path) if not accounted(name, "s.tar", found)]
        assert not missing
        assert "s.tar" not in data.broken.left_out


CAPTIONS = ["a dog", "a cat, asleep", 'the "best" fox', "é 🍎", "two\nlines"]


def table_of(kind: str) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps({"image": f"{i}.png", "caption": c}) + "\n" for i, c in enumerate(CAPTIONS)).encode()
    captions = CAPTIONS if kind == "csv" else [re.sub(r"[\n,\"]", "", caption) for caption in CAPTIONS]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("image", "caption"), *((f"{i}.png", c) for i, c in enumerate(captions))])
    return out.getvalue().encode()


@pytest.mark.parametrize("kind", ["csv", "csv without quotes", "jsonl"])
@given(edits=EDITS)
@quick
def test_a_mutated_table(kind: str, edits: list[Edit]) -> None:
    content = mutated(table_of(kind), edits)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(CAPTIONS)):
            (Path(folder) / f"{i}.png").write_bytes(png(i))
        path = Path(folder) / f"t.{kind.split()[0]}"
        path.write_bytes(content)
        data = opened(lambda: FolderDataset(path, resolution=4, max_broken=1.0), path.name)
        if data is None or (path.suffix == ".csv" and b'"' in content):  # with quotes a row may span lines
            return
        names = named(data)
        lines = list(enumerate(io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline=""), 1))
        if path.suffix == ".csv":
            header = next(number for number, line in lines if line.strip())
            images = {number: line.split(",")[0].strip() for number, line in lines if number > header}
        else:
            images = {number: image_of(line) for number, line in lines}
        lost = [
            number
            for number, line in lines
            if line.strip() and number in images
            if f"{path.name}: line {number}" not in names and printable(images[number]) not in names
        ]
        assert not lost


def image_of(line: str) -> str:
    """The image that a line names; an empty string if it names none."""
    try:
        return str(json.loads(line)["image"]).strip()
    except (ValueError, TypeError, KeyError):
        return ""


LENGTHS = {"jsonl": b"".join(b'{"length": %d}\n' % i for i in range(9)), "npy": b""}


@pytest.mark.parametrize("kind", ["jsonl", "npy"])
@given(edits=EDITS)
@quick
def test_a_mutated_file_of_lengths(kind: str, edits: list[Edit]) -> None:
    import numpy as np

    out = io.BytesIO()
    np.save(out, np.arange(9))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"l.{kind}"
        path.write_bytes(mutated(LENGTHS[kind] or out.getvalue(), edits))
        try:
            found = read_columns(path, ["length"])["length"]
        except FileError as error:
            if f"l.{kind}" not in str(error):
                raise
        else:
            assert found.dtype == np.int64
            assert not (found < 0).any()

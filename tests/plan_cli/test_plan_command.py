"""`mmkernels plan`: each kind of file, the figures it shows, the picture, and its error messages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro", reason="mmkernels[plan] is not installed")
pytest.importorskip("tabulate", reason="mmkernels[plan] is not installed")

from mmkernels import balance_ranks, cli, plan_packing
from mmkernels.testing.lengths import samples_like

SAMPLES = samples_like("obelics@8192", 600)


def write(path: Path, lengths=SAMPLES.lengths, images=SAMPLES.images) -> Path:
    """The samples in the format of the path's suffix, with columns length and images."""
    if path.suffix == ".npy":
        table = np.zeros(len(lengths), [("length", "i8"), ("images", "i4")])
        table["length"], table["images"] = lengths, images
        np.save(path, table)
    elif path.suffix == ".jsonl":
        rows = [{"length": int(a), "images": int(b)} for a, b in zip(lengths, images, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"length": lengths, "images": images}), path)
    return path


def report_of(capsys, path: Path, *arguments: str, capacity: int = 8192) -> dict:
    status = cli.main(["plan", str(path), "--capacity", str(capacity), "--picture", "None", "--json", *arguments])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_figures_of_every_kind_of_file(suffix, tmp_path, capsys):
    report = report_of(capsys, write(tmp_path / f"l{suffix}"), "--images", "images", "--ranks", "8")
    auto = plan_packing(SAMPLES.lengths, 8192, images=SAMPLES.images)
    packs = {each["strategy"]: each["packs"] for each in report["strategies"]}
    assert report["items"] == 600
    assert report["best"] == auto.strategy
    assert packs == {name: plan_packing(SAMPLES.lengths, 8192, strategy=name).num_packs for name in packs}
    assert report["lower_bound"] == auto.lower_bound
    assert report["steps"] == balance_ranks(auto, 8).num_steps
    assert 1 <= report["imbalance"] <= report["imbalance_in_turn"]
    assert 0.1 < report["padding_efficiency"] < 0.5


def test_plain_numbers_and_lists(tmp_path, capsys):
    np.save(tmp_path / "plain.npy", SAMPLES.lengths.astype(np.uint16))
    (tmp_path / "plain.jsonl").write_text("\n".join(map(str, SAMPLES.lengths)) + "\n\n", encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text(
        "".join(f'{{"input_ids": {[0] * (i % 9)}}}\n' for i in range(40)), encoding="utf-8"
    )
    array, lines = (report_of(capsys, tmp_path / f"plain{suffix}")["strategies"] for suffix in (".npy", ".jsonl"))
    assert [each["packs"] for each in array] == [each["packs"] for each in lines]
    assert report_of(capsys, tmp_path / "ids.jsonl", "--column", "input_ids")["tokens"] == sum(i % 9 for i in range(40))


def test_parquet_lists(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"input_ids": [[1, 2], [], [3]]}), tmp_path / "ids.parquet")
    assert report_of(capsys, tmp_path / "ids.parquet", "--column", "input_ids")["tokens"] == 3
    pq.write_table(pa.table({"length": [1, None]}), tmp_path / "null.parquet")
    assert cli.main(["plan", str(tmp_path / "null.parquet"), "--capacity", "8"]) == 1
    assert "length: expected a value for each item, got 1 without" in capsys.readouterr().err


def test_table_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "packs.png"
    arguments = [
        "plan",
        str(write(tmp_path / "l.npy")),
        "--capacity",
        "8192",
        "--ranks",
        "4",
        "--picture",
        str(picture),
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("600 items", "subset_sum *", "padding 32 to the longest", "4 ranks, ", f"picture: {picture}"):
        assert text in shown
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (1800, 990)
        assert len(np.unique(np.asarray(image.convert("L")))) > 100  # not a blank page


@pytest.mark.parametrize("lengths", [[5], [8, 8], [0, 0], [3, 99, 4]])
def test_picture_of_few_items(lengths, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "l.npy", np.array(lengths))
    arguments = [str(tmp_path / "l.npy"), "--capacity", "8", "--oversize", "own_pack", "--picture"]
    assert cli.main(["plan", *arguments, str(tmp_path / "p.svg")]) == 0
    assert (tmp_path / "p.svg").stat().st_size > 1000
    assert ("packs of their own" in capsys.readouterr().out) == (99 in lengths)


def test_nothing_to_pack(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.zeros(0, np.int64))
    report = report_of(capsys, tmp_path / "l.npy")
    assert (report["items"], report["steps"], report["lower_bound"]) == (0, 0, 0)


def test_dropped_items_are_reported(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.array([3, 99, 4]))
    assert report_of(capsys, tmp_path / "l.npy", "--oversize", "drop", capacity=8)["dropped"] == 1
    assert (
        cli.main(["plan", str(tmp_path / "l.npy"), "--capacity", "8", "--oversize", "drop", "--picture", "None"]) == 0
    )
    assert "1 items DROPPED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("l.txt", b"1", [], "expected a name that ends with .npy, .jsonl, .parquet"),
        ("none.npy", None, [], "no such file"),
        ("l.npy", b"junk", [], "not a .npy array"),
        ("l.parquet", b"junk", [], "not a .parquet file"),
        ("l.jsonl", b"1\n{]\n", [], "l.jsonl:2: not JSON"),
        ("l.jsonl", b'{"tokens": 3}\n', [], "line 1 of "),
        ("l.jsonl", b'{"tokens": 3}\n', [], "no column 'length'; there are: tokens"),
        ("l.jsonl", b"1.5\n", [], "l.jsonl:1: length: expected an integer or a list, got 1.5"),
        ("l.jsonl", b"1\n\xff\xfe2\x00\n", [], "l.jsonl:2: not JSON"),
        ("l.jsonl", b"1\n" + b"[" * 100_000, [], "l.jsonl:2: not JSON"),
        ("l.jsonl", b"9999999999999999999\n", [], "l.jsonl:1: length: expected an integer < 2**63"),
        ("l.npy", b"\x93NUMPY\x01\x00\x0a\x00{'descr': x\n", [], "not a .npy array"),
        ("l.npy", b"PK\x03\x04", [], "not a .npy array"),
        ("l.jsonl", b"-1\n", [], "length: expected integers >= 0, got -1 of item 0"),
        (
            "l.jsonl",
            b"9\n",
            [],
            "lengths: expected each in [0, capacity=8], got 9 at index 0; --oversize",
        ),
        ("l.jsonl", b"3\n", ["--max-images", "2"], "images: expected [n] integers with max_images"),
        ("l.jsonl", b"3\n", ["--ranks", "0"], "world_size: expected an integer >= 1, got 0"),
        ("l.jsonl", b"3\n", ["--picture", "no/such/folder.png"], "--picture: "),
        ("l.jsonl", b"3\n", ["--picture", "packs.xyz"], "--picture: "),
    ],
)
def test_errors_name_their_cause(name, content, arguments, message, tmp_path, capsys):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    picture = [] if "--picture" in arguments else ["--picture", "None"]
    assert cli.main(["plan", str(tmp_path / name), "--capacity", "8", *picture, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmkernels plan: ")
    assert message in error


def test_a_length_beyond_int64_does_not_turn_negative(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.array([3, 2**63 + 1], np.uint64))
    assert cli.main(["plan", str(tmp_path / "l.npy"), "--capacity", "8", "--picture", "None"]) == 1
    assert "length: expected integers < 2**63, got 9223372036854775809 of item 1" in capsys.readouterr().err


def test_a_missing_column_of_an_array(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.array([3]))
    assert cli.main(["plan", str(tmp_path / "l.npy"), "--capacity", "8", "--images", "images"]) == 1
    assert "no column 'images'; there are: none" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("tyro", "plan"), ("matplotlib", "plan"), ("pyarrow", "parquet")])
def test_without_an_extra_the_command_says_what_to_install(package, extra, tmp_path):
    path = tmp_path / ("l.parquet" if package == "pyarrow" else "l.npy")
    path.write_bytes(b"") if package == "pyarrow" else np.save(path, np.array([3]))
    script = f"""
import sys
sys.modules[{package!r}] = None
from mmkernels.cli import main
sys.exit(main(["plan", {str(path)!r}, "--capacity", "8"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"mmkernels plan needs the package {package}: pip install 'mmkernels[{extra}]'" in done.stderr

"""In the C locale, which is ASCII only, a run works as elsewhere: files are UTF-8, whatever their names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SMALL: dict[str, object] = {"model.width": 16, "model.heads": 2, "model.embed-dim": 8}
SMALL |= {"streams.image.encoder.size": 16, "streams.image.encoder.layers": 1}
SMALL |= {"streams.text.encoder.layers": 1, "streams.text.encoder.words": 64, "streams.text.encoder.grams": 64}
RUN = {"batch": 8, "chunk": 4, "steps": 4, "eval-every": 2, "checkpoint-every": 2, "threads": 1, "profile": "1 1"}
RUN |= {"eval-fraction": 0.3, "max-broken": 0.1, **SMALL}
TINY = " ".join(f"--{name} {value}" for name, value in RUN.items()).split()

# Opening one of our text files without an encoding is an error.
CHILD = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="mmkernels")
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
from mmkernels.cli import main
sys.exit(main(sys.argv[1:]) or (sys.argv[1] == "pretrain" and main([*sys.argv[1:], "--resume"])))
"""


def in_the_c_locale(*arguments: str) -> str:
    """The output of a command."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", CHILD, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_run(kind: str, pictures: Path, tmp_path: Path) -> None:
    """Opened, trained, reported and resumed."""
    data = tmp_path / "写真"
    data.mkdir()
    rows = [json.loads(line) for line in (pictures / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    if kind == "folder":
        for row in rows:
            (pictures / row["image"]).rename(data / f"é-{row['image']}")
        named = ({"写": f"é-{row['image']}", "題": f"{row['caption']} 🍎"} for row in rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in named)
        (data / "captions.jsonl").write_text(text, encoding="utf-8")
    else:
        with tarfile.open(data / "ü.tar", "w") as tar:
            for row in rows:
                (pictures / "caption.txt").write_text(f"{row['caption']} 🍎", encoding="utf-8")
                tar.add(pictures / row["image"], f"é-{row['image']}")
                tar.add(pictures / "caption.txt", f"é-{row['image']}".replace(".png", ".txt"))
    broken = data / ("é-red-circle.png" if kind == "folder" else "ö.tar")
    broken.write_bytes(b"")
    run = tmp_path / "läufe"
    arguments = ["--csv-img-key", "写", "--csv-caption-key", "題"] if kind == "folder" else []
    shown = in_the_c_locale("pretrain", "--data", f"{kind}:{data}", "--run", str(run), *arguments, *TINY)
    assert "held_out  image \\u2192 text" in shown
    assert f"report: {run / 'report.html'}" in shown
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<title>clip on {kind}:{data}</title>" in page
    assert re.search(r"<b>a \w+ \w+ 🍎</b>", page), "held-out captions"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(broken.name in record["message"] for record in log if record["kind"] == "warning")
    assert max(record["step"] for record in log) == 4
    assert json.loads((run / "profile.json").read_text(encoding="utf-8"))["traceEvents"]


def test_plan(tmp_path: Path) -> None:
    pytest.importorskip("tabulate", reason="mmkernels[plan] is not installed")
    (tmp_path / "längen.jsonl").write_text('{"länge": 3}\n{"länge": 2}\n', encoding="utf-8")
    arguments = ["--capacity", "8", "--column", "länge", "--picture", str(tmp_path / "bild-ü.png")]
    assert f"picture: {tmp_path / 'bild-ü.png'}" in in_the_c_locale("plan", str(tmp_path / "längen.jsonl"), *arguments)
    assert (tmp_path / "bild-ü.png").stat().st_size > 1000

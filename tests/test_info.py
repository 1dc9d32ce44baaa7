"""`mmkernels info` reports the facts and never raises, whatever is missing or broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import info
from mmkernels.runtime import backends, native


def run(script: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """In a fresh process, where no checkout shadows the package."""
    return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)


def test_report_is_json_and_complete() -> None:
    report = json.loads(json.dumps(info.collect()))
    assert report["versions"]["torch"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["native"]["why_absent"] == native.why_absent()
    assert not [name for name, part in report.items() if isinstance(part, dict) and "error" in part]


def test_choice_of_each_op_is_the_one_that_serves() -> None:
    rows = {(row["family"], row["device"], row["dtype"]): row for row in info.collect()["backends"]}
    for family in backends.FAMILIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            row = rows[family, "cpu", str(dtype).removeprefix("torch.")]
            assert row["chosen"] == backends.resolve(family, torch.empty(0, dtype=dtype))
            assert set(row["others"]) | {row["chosen"]} == set(backends.BACKENDS)
            assert all(row["others"].values())


def test_text_has_every_part() -> None:
    text = info.render(info.collect())
    for word in ("mmkernels", "torch", "triton", "native core", "device", "threads", "OpenMP", *backends.FAMILIES):
        assert word in text


@pytest.mark.parametrize("part", ["_versions", "_torch", "_native", "_devices", "_openmp", "_backends"])
def test_broken_part_is_reported_not_raised(part: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(info, part, broken)
    assert info.main([]) == 0
    assert "the disk is full" in capsys.readouterr().out
    assert info.main(["--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_two_openmp_runtimes_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_openmp", lambda: ["/usr/lib/libgomp.so.1", "/usr/lib/libiomp5.so"])
    assert any("several OpenMP runtimes" in warning for warning in info.collect()["warnings"])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "7f00 r-xp 00000000 08:01 1 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
            "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
        ),
        (
            "7f00 r-xp 00000000 08:01 1 /site/torch.libs/libgomp-a34b3233.so.1.0.0",
            "/site/torch.libs/libgomp-a34b3233.so.1.0.0",
        ),
        ("7f00 r-xp 00000000 08:01 1 /site/lib/libiomp5.so", "/site/lib/libiomp5.so"),
        ("7f00 r-xp 00000000 08:01 1 /site/lib/libomp.so", "/site/lib/libomp.so"),
        ("7f00 r-xp 00000000 08:01 1 /site/lib/libcomponent.so", None),
    ],
)
def test_openmp_runtimes_are_recognised(line: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, *rest: line)
    assert info._openmp() == ([found] if found else [])


def test_device_without_compiled_kernels_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"name": "Old card", "capability": "7.0", "served_by_native": False}
    monkeypatch.setattr(info, "_devices", lambda: [old])
    assert any("Old card (sm_70)" in warning for warning in info.collect()["warnings"])


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"


def test_without_torch(tmp_path: Path) -> None:
    done = run(WITHOUT_TORCH + "from mmkernels.cli import main; sys.exit(main(['info']))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: PyTorch cannot be imported" in done.stdout
    done = run(WITHOUT_TORCH + "from mmkernels import info; info.main(['--json'])", tmp_path)
    assert json.loads(done.stdout)["torch"]["why_absent"]


def test_public_names_without_torch_say_what_to_install(tmp_path: Path) -> None:
    done = run(WITHOUT_TORCH + "from mmkernels import attention", tmp_path)
    assert done.returncode != 0
    assert "ImportError: mmkernels.attention needs PyTorch: pip install torch" in done.stderr
    done = run(WITHOUT_TORCH + "import mmkernels; mmkernels.nonsense", tmp_path)
    assert "AttributeError: module 'mmkernels' has no attribute 'nonsense'" in done.stderr


@pytest.mark.skipif(native.why_absent() is not None, reason=f"native core: {native.why_absent()}")
def test_unknown_instruction_set_is_reported_not_raised(tmp_path: Path) -> None:
    script = "import os; os.environ['MMKERNELS_CPU_ISA'] = 'z80'\nfrom mmkernels import info; info.main([])"
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "z80" in done.stdout


def test_module_runs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mmkernels.info"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "backend=None picks" in done.stdout

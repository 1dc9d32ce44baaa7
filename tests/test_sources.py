"""The rules for the text of files hold; and the checkers detect violations."""

from pathlib import Path

import pytest
import sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "checker",
    [sources.size_problems, sources.machine_problems, sources.encoding_problems, sources.view_problems],
)
def test_rule_holds(checker) -> None:
    problems = checker(ROOT)
    assert not problems, "\n".join(problems)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_long_files_are_seen(tmp_path: Path) -> None:
    write(tmp_path, "csrc/at_most.h", "\n" * sources.LINES)
    write(tmp_path, "csrc/long.cu", "\n" * (sources.LINES + 1))
    write(tmp_path, "docs/long.md", "\n" * (sources.LINES + 1))
    write(tmp_path, ".venv-2.6/long.py", "\n" * (sources.LINES + 1))
    assert sources.size_problems(tmp_path, {}) == ["csrc/long.cu: 401 lines, at most 400: split it"]
    assert not sources.size_problems(tmp_path, {"csrc/long.cu": "one table"})
    for name in ("csrc/at_most.h", "csrc/gone.h"):
        (found,) = sources.size_problems(tmp_path, {"csrc/long.cu": "one table", name: "it was long"})
        assert found.startswith(f"{name}: not above 400 lines")


def test_long_functions_are_seen(tmp_path: Path) -> None:
    body = "    x = 1\n"
    write(tmp_path, "mmkernels/a.py", "def f():\n" + body * (sources.FUNCTION_LINES - 1))
    write(tmp_path, "mmkernels/b.py", 'def f():\n    """One\n\n    more."""\n' + body * (sources.FUNCTION_LINES - 1))
    write(tmp_path, "mmkernels/c.py", "@triton.jit\ndef f():\n" + body * (sources.KERNEL_LINES - 1))
    assert not sources.size_problems(tmp_path, {})
    write(tmp_path, "tests/d.py", "class A:\n    async def f(self):\n" + ("    " + body) * sources.FUNCTION_LINES)
    write(tmp_path, "tests/e.py", "@triton.jit\ndef f():\n" + body * sources.KERNEL_LINES)
    assert sources.size_problems(tmp_path, {}) == [
        "tests/d.py:2: f has 61 lines, at most 60",
        "tests/e.py:2: f has 151 lines, at most 150",
    ]


def test_machine_paths_are_seen(tmp_path: Path) -> None:
    for text in ("see /wo" + "rk/main/x", "cd /ro" + "ot/build", "https://py" + "pi.org/simple"):
        write(tmp_path, "docs/page.md", f"first line, with a harmless build/work/tree and /usr/local/cuda\n{text}\n")
        (found,) = sources.machine_problems(tmp_path)
        assert found.startswith("docs/page.md:2: mentions"), text


# Calls, and whether each names its encoding or needs none.
CALLS = {
    "open(x)": False,
    "open(x, 'w')": False,
    "open(x, mode='a')": False,
    "open(x, 'w', encoding='utf-8')": True,
    "open(x, 'rb')": True,
    "x.open()": False,
    "x.open('a', 1)": False,
    "x.open('rb')": True,
    "x.read_text()": False,
    "x.read_text('utf-8')": True,
    "x.write_text(y)": False,
    "x.write_text(y, encoding='utf-8')": True,
    "Image.open(x)": True,
    "os.open(x, os.O_RDONLY)": True,
}


def test_encodings_of_the_locale_are_seen(tmp_path: Path) -> None:
    for call, is_right in CALLS.items():
        write(tmp_path, "benches/b.py", f"def f(x, y):\n    {call}\n")
        expected = [] if is_right else [f"benches/b.py:2: {call.partition('(')[0]} without encoding="]
        assert sources.encoding_problems(tmp_path) == expected, call


# Calls of `view`, and whether something holds the tensor.
VIEWS = {
    "view(x)": True,
    "view(rows.lo)": True,
    "view(x.view(-1))": True,
    "view(x.contiguous())": False,
    "view(unit_stride(x))": False,
    "view(None if x is None else x.contiguous())": False,
}


def test_views_of_temporaries_are_seen(tmp_path: Path) -> None:
    for call, is_right in VIEWS.items():
        write(tmp_path, "mmkernels/ops/packing/native.py", f"def f(x, rows):\n    {call}\n")
        assert bool(sources.view_problems(tmp_path)) is not is_right, call

"""Mutation testing: break one line of a kernel at a time and count the failing tests.

    python scripts/mutate.py                          # every mutation; a markdown table
    python scripts/mutate.py --only attention         # mutations whose name matches this pattern
    python scripts/mutate.py --before ../old          # also run the suite of another checkout with equal kernels
    python scripts/mutate.py --list
    python scripts/mutate.py -- --maxfail=5           # options of pytest

Each mutation is applied to a copy of the checkout, which is rebuilt if C++ changed: without CUDA, since the tests
emulate CUDA kernels, and for two instruction sets, the baseline and the best of this processor. Then it runs the tests
that the mutation names and its line can reach. A mutation that no test notices is a hole in the suite; the exit status
reports it. A mutation takes half a minute to ten minutes, so this is not part of the suite: run it before and after you
remove tests. Needs what `make test` installs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """One line of a file, its replacement, and the tests that should fail."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def can_reach(self) -> str:
        """Pytest's -k for the tests that the broken line can reach."""
        if self.path.endswith((".h", ".cpp")):
            return "not triton and not emulated"
        return "triton" if Path(self.path).name.startswith("triton_") else ""


ATTENTION, CONTRASTIVE, PACKING = ("tests/ops/attention",), ("tests/ops/contrastive",), ("tests/ops/packing",)
ATTENTION_CUDA = ("tests/ops/attention/test_attention_cuda.py", "tests/ops/attention/test_attention_sm90.py")
CONTRASTIVE_CUDA = ("tests/ops/contrastive/test_contrastive_cuda.py",)

MUTATIONS = (
    # C++ on the CPU
    Mutation(
        "attention cpu: a masked lane is kept",
        "csrc/attention/attention_cpu_fwd.h",
        "x = select((lane >= static_cast<Int>(from - j)) & (lane < static_cast<Int>(to - j)), x, Vec<C>{});",
        "x = select((lane >= static_cast<Int>(from - j)) & (lane <= static_cast<Int>(to - j)), x, Vec<C>{});",
        ATTENTION,
    ),
    Mutation(
        "attention cpu: a negative scale is taken for a positive one",
        "csrc/attention/attention_cpu_fwd.h",
        "sign_(!rewrites_ && args.scale < 0 ? -1 : 1),",
        "sign_(1),",
        ATTENTION,
    ),
    Mutation(
        "rope cpu: the second half turns the wrong way",
        "csrc/attention/rope_cpu.cpp",
        "write(to + half + j, b * c + a * s, n);",
        "write(to + half + j, b * c - a * s, n);",
        ("tests/ops/attention/test_rope.py",),
    ),
    Mutation(
        "contrastive cpu: a later tile overwrites the best positive of a column",
        "csrc/contrastive/softmax_forward.h",
        "column.best[c] = of_tile.best[c] > column.best[c] ? of_tile.best[c] : column.best[c];",
        "column.best[c] = of_tile.best[c];",
        CONTRASTIVE,
    ),
    Mutation(
        "contrastive cpu: the teacher's part of a column is lost",
        "csrc/contrastive/softmax_forward.h",
        "if (teacher_rows_.given()) column.of_teacher[c] += of_tile.of_teacher[c];",
        "if (teacher_rows_.given()) column.of_teacher[c] = of_tile.of_teacher[c];",
        CONTRASTIVE,
    ),
    Mutation(
        "siglip cpu: no bias",
        "csrc/contrastive/sigmoid.h",
        "const Vec<C> z = sign * (a * scale_ + bias_), e = exp(min(z, -z));",
        "const Vec<C> z = sign * (a * scale_), e = exp(min(z, -z));",
        CONTRASTIVE,
    ),
    Mutation(
        "packing cpu: a NaN does not win a maximum",
        "csrc/packing/packing_pool_cpu.cpp",
        "const auto wins = (v > old) | ((v != v) & (old == old));",
        "const auto wins = v > old;",
        PACKING,
    ),
    Mutation(
        "packing cpu: the carry of a sum is dropped",
        "csrc/packing/packing_sums.h",
        "store_n(total + e, rest == rest ? sum + rest : sum, n);",
        "store_n(total + e, sum, n);",
        PACKING,
    ),
    Mutation(
        "planner: a bit set forgets to clear upwards",
        "csrc/packing/planner_rooms.h",
        "      if (word != 0) return;\n      value >>= 6;",
        "      return;",
        ("tests/planning",),
    ),
    # CUDA C++, in the emulator
    Mutation(
        "attention cuda: a head reads another group's keys",
        "csrc/attention/attention_fwd.cu",
        "head_kv = head / (p.heads / p.heads_kv);",
        "head_kv = head % p.heads_kv;",
        ATTENTION_CUDA,
    ),
    Mutation(
        "attention cuda: the sum is not rescaled",
        "csrc/attention/attention_fwd.cu",
        "l[r] = l[r] * correction + sum;",
        "l[r] = l[r] + sum;",
        ATTENTION_CUDA,
    ),
    Mutation(
        "infonce cuda: the positive pair is among the others",
        "csrc/contrastive/contrastive_fwd.cu",
        "b[mi][ni][e] = exists && !positive ? sign * b[mi][ni][e] : kBeyond;",
        "b[mi][ni][e] = exists ? sign * b[mi][ni][e] : kBeyond;",
        CONTRASTIVE_CUDA,
    ),
    # Triton, in the interpreter
    Mutation(
        "attention triton: dlse is left out",
        "mmkernels/ops/attention/triton_bwd.py",
        "b_delta -= tl.load(dlse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)",
        "pass",
        ATTENTION,
    ),
    Mutation(
        "attention triton: a gradient without dropout's factor",
        "mmkernels/ops/attention/triton_bwd.py",
        "b_z = tl.where(m_keep, extras.keep_factor, 0.0)",
        "b_z = tl.where(m_keep, 1.0, 0.0)",
        ATTENTION,
    ),
    Mutation(
        "attention triton: the sink has no mass",
        "mmkernels/ops/attention/triton_fwd.py",
        "b_l = b_l * b_alpha + exponential(b_sink - b_m_new, b_q.dtype)",
        "b_l = b_l * b_alpha",
        ATTENTION,
    ),
    Mutation(
        "infonce triton: the weighted sum is not moved to the new maximum",
        "mmkernels/ops/contrastive/triton_fwd.py",
        "(dot + total * below) * before + tl.sum(b_p * b_d, AXIS)",
        "dot * before + tl.sum(b_p * b_d, AXIS)",
        CONTRASTIVE,
    ),
    Mutation(
        "packing triton: the first row of the third source is lost",
        "mmkernels/ops/packing/triton_fwd.py",
        "b_rows = tl.where((b_index >= third_begin)[:, None], b_more, b_rows)",
        "b_rows = tl.where((b_index > third_begin)[:, None], b_more, b_rows)",
        PACKING,
    ),
    # Python around the kernels
    Mutation(
        "contrastive: a part's mean is merged without its weight",
        "mmkernels/ops/contrastive/types.py",
        "both[MEAN] = of_a * a[MEAN] + of_b * b[MEAN]",
        "both[MEAN] = (a[MEAN] + b[MEAN]) / 2",
        CONTRASTIVE,
    ),
    Mutation(
        "contrastive: the ignored pairs are counted as seen",
        "mmkernels/ops/contrastive/losses.py",
        "else _Counts(1, keys - same + _targets_alike(pairs))",
        "else _Counts(1, keys)",
        CONTRASTIVE,
    ),
    Mutation(
        "attention: a window is one key too wide",
        "mmkernels/ops/attention/rows.py",
        "lo = torch.maximum(lo, past_self - window)",
        "lo = torch.maximum(lo, past_self - window - 1)",
        ATTENTION,
    ),
    Mutation(
        "registration: gradients do not reach their arguments",
        "mmkernels/runtime/autograd.py",
        "made[self._signature.place[name]] = grad if name in needs else None",
        "made[self._signature.place[name]] = None",
        ("tests/runtime", "tests/ops/packing"),
    ),
    Mutation(
        "gradient caching: autocast stays on in the backward",
        "mmkernels/gradcache/backward.py",
        "stack.enter_context(torch.autocast(device_type, enabled=False))",
        "pass",
        ("tests/gradcache",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    failed: int
    passed: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.failed} | {self.passed} | {self.seconds:.0f}"


class Copy:
    """A copy of a checkout in which one line at a time is broken."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.root, site = folder / "checkout", folder / "site"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, capture_output=True, check=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, target)
        site.mkdir()
        (site / "mmkernels").symlink_to(self.root / "mmkernels")
        self.environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def check(self) -> None:
        """Raise if the unbroken suite cannot be collected: its errors would count as tests that notice."""
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests"]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{self.root}: pytest cannot collect the tests:\n{(done.stdout + done.stderr)[-5000:]}")

    @contextmanager
    def broken(self, mutation: Mutation) -> Iterator[None]:
        path = self.root / mutation.path
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.before) == 1, f"{mutation.name}: found {text.count(mutation.before)} times"
        path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def test(self, mutation: Mutation, arguments: list[str], limit: float) -> Outcome:
        there = [name for name in mutation.tests if (self.root / name).exists()]
        assert there, f"none of {mutation.tests} is in {self.root}"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not aot and not gpu", *there]
        command += ["-k", mutation.can_reach, *arguments]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return Outcome(1, 0, limit)  # a test that hangs has noticed
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)}
        assert counts, last
        seconds = time.monotonic() - begin
        return Outcome(counts.get("failed", 0) + counts.get("error", 0), counts.get("passed", 0), seconds)


class Build:
    """The native core, built from one copy and shared by all."""

    def __init__(self, copies: list[Copy], folder: Path) -> None:
        self._copies, self._folder = copies, folder
        options = ["-DMMKERNELS_CUDA=OFF", "-DSKBUILD_PROJECT_VERSION=0", "-DCMAKE_BUILD_TYPE=Release"]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        options += [f"-DMMK_COMPILER_HAS_{isa}=OFF" for isa in _other_instruction_sets()]
        self._run("cmake", "-S", copies[0].root, "-B", folder, "-G", "Ninja", *options)

    def _run(self, *command: str | Path) -> None:
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    def update(self) -> None:
        """Compile what differs from the last build, including the files of the previous mutation."""
        self._run("cmake", "--build", self._folder)
        (library,) = self._folder.glob(f"_native*{sysconfig.get_config_var('EXT_SUFFIX')}")
        for copy in self._copies:
            shutil.copy2(library, copy.root / "mmkernels" / library.name)


def _other_instruction_sets() -> list[str]:
    """All instruction sets except the baseline and the one that this processor would choose."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    best = next((isa for flag, isa in (("avx512bw", "avx512"), ("avx2", "avx2")) if flag in flags), "baseline")
    return [isa for isa in ("avx2", "avx512", "avx512bf16") if isa != best]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that the mutation's name must match")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--before", type=Path, help="another checkout, to run its suite too")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for the tests of one mutation")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --, such as --maxfail=5")
    given = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(given.only, mutation.name)]
    if given.list:
        print(*(f"{mutation.path}: {mutation.name}" for mutation in chosen), sep="\n")
        return 0
    unnoticed = 0
    columns = ["fail | pass | s"] * (2 if given.before else 1)
    print("| broken |", " | ".join(columns), "|\n|---" + "|---|---|---" * len(columns) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copies = [Copy(ROOT, folder / "new")]
        if given.before:
            copies.insert(0, Copy(given.before, folder / "before"))
        build = Build(copies, folder / "build")
        build.update()
        for copy in copies:
            copy.check()
        for mutation in chosen:
            with contextlib.ExitStack() as stack:
                for copy in copies:
                    stack.enter_context(copy.broken(mutation))
                build.update()
                outcomes = [copy.test(mutation, given.arguments, given.limit) for copy in copies]
            unnoticed += outcomes[-1].failed == 0
            print(f"| {mutation.name} |", " | ".join(map(str, outcomes)), "|", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())

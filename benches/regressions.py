"""Does `mmkernels bench --compare` find a kernel that became slower, and nothing where nothing changed?

    python benches/regressions.py                   ten pairs of each; a quarter of an hour
    python benches/regressions.py --runs 2          fewer

Each pair is two runs of the contrastive benches in processes of their own, of which the second is unchanged, or has a
SigLIP kernel that waits after each call for a share of its time. Prints how many pairs were judged right, and writes
the changes to benches/results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studies import measured_on, results_of

from mmkernels.bench.compare import Change, compare

SLOWED = ("launch_contrastive_siglip_fwd_cpu", "launch_contrastive_siglip_bwd_cpu")

RUN = """
import sys, time
from mmkernels.bench.cli import main
from mmkernels.runtime import native

def slowed(call, share):
    def slower(*args, **named):
        begin = time.perf_counter()
        result = call(*args, **named)
        end = time.perf_counter() + share * (time.perf_counter() - begin)
        while time.perf_counter() < end:
            pass
        return result
    return slower

for name in {names}:
    setattr(native.core, name, slowed(getattr(native.core, name), {share}))
sys.exit(main(["contrastive", "--filter", "fwd+bwd float32", "--no-memory", "--json", {path!r}]))
"""


def measured(folder: Path, name: str, share: float) -> dict[str, Any]:
    """A run whose SigLIP kernels take 1 + share times as long."""
    path = folder / f"{name}.json"
    code = RUN.format(names=SLOWED if share else (), share=share, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def is_right(changes: list[Change], slowed: bool) -> bool:
    """Whether what is flagged is what was slowed."""
    flagged = {change.group for change in changes if change.is_bad}
    expected = {change.group for change in changes if "siglip" in change.group} if slowed else set()
    return flagged == expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="pairs of each kind")
    parser.add_argument("--share", type=float, default=0.3, help="of its time that the slowed kernel waits")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.runs):
            before = measured(Path(folder), "before", 0.0)
            for kind, share in (("unchanged", 0.0), ("slowed", args.share)):
                changes = compare(before, measured(Path(folder), kind, share))
                right = is_right(changes, bool(share))
                rows.append({"kind": kind, "right": right, "changes": [asdict(change) for change in changes]})
                print(f"pair {i + 1}, {kind}: {'right' if right else 'wrong'}", flush=True)
    counts = {kind: sum(row["right"] for row in rows if row["kind"] == kind) for kind in ("unchanged", "slowed")}
    print(", ".join(f"{kind}: {count} of {args.runs} right" for kind, count in counts.items()))
    about = measured_on()
    result = {"about": about, "share": args.share, "right": counts, "runs": args.runs, "rows": rows}
    results_of("regressions", about).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

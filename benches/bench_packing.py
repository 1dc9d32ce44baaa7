"""Packing: the ops against a copy of the same bytes and plain PyTorch, late interaction against the padded einsum.

bench_planner.py measures the planner.

python benches/bench_packing.py --help
"""

from __future__ import annotations

from harness import main
from packing_late import MAXSIM
from packing_media import PATCHES, SPLICE
from packing_rows import PACK, SOURCES, UNPACK
from packing_segments import PAD, POOLS, WEIGHTED

if __name__ == "__main__":
    main("packing", [PACK, SOURCES, UNPACK, PAD, *POOLS, WEIGHTED, SPLICE, PATCHES, MAXSIM])

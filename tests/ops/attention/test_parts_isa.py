"""The CPU kernels of the family's parts on every instruction set. The set is chosen when the core is loaded, so each
runs in a process of its own; one for all parts, for starting it is what takes long."""

import os
import subprocess
import sys

import pytest
import torch

from mmkernels.runtime import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_each_instruction_set(isa):
    if native.why_absent() is not None:
        pytest.skip(native.why_absent())
    if isa not in native.core().build_info()["cpu_isas"]:
        pytest.skip(f"{isa} is not compiled in, or this CPU lacks it")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_parts_isa as t; t.check_all()"
    environment = {**os.environ, "MMKERNELS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_all() -> None:
    import test_additive
    import test_gate
    import test_rope

    for dtype in DTYPES:
        for case in ("half_of_the_head", "neighbours_in_part", "rotation_alone"):
            test_rope.test_against_float64(case, dtype, "native")
        for case in ("channels", "heads", "scalar"):
            test_gate.test_against_float64(case, dtype, "native")
        for mask in ("cross", "window"):
            test_additive.test_masks(mask, dtype, "native")

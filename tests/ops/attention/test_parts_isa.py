"""The CPU kernels of the family's parts on every instruction set; one process for all parts, for starting it is what
takes long."""

import isas
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@isas.each
def test_each_instruction_set(isa):
    isas.run_on(isa, check_all)


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

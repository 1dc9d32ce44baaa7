"""The family's CPU kernels on every instruction set; one process for all, because startup is slow."""

import isas
import torch
from backends import DTYPES


@isas.each
def test_each_instruction_set(isa):
    isas.run_on(isa, check_all)


def check_all() -> None:
    import test_accuracy
    import test_additive
    import test_gate
    import test_max_logit
    import test_rope

    test_accuracy.check_native()
    test_max_logit.test_nan_and_inf(torch.float32, "native")
    for dtype in DTYPES:
        for case in ("half_of_the_head", "neighbours_in_part", "rotation_alone"):
            test_rope.assert_case(case, dtype, "native")
        for case in ("channels", "heads", "scalar"):
            test_gate.assert_right(test_gate.gated_rows(*test_gate.CASES[case], dtype=dtype), "native", case)
        for mask in ("cross", "window"):
            test_additive.assert_mask(mask, dtype, "native")

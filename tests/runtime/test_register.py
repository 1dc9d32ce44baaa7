"""Signatures of ops: groups, schemas, what is saved; and the named Triton launchers exist."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmkernels.runtime.register import Op
from mmkernels.runtime.signature import Signature, with_tensors, without_tensors

ROOT = Path(__file__).resolve().parents[2]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None
    mode: str


class Offsets(NamedTuple):
    start: Tensor
    stop: Tensor


def fake(
    x: Tensor, pair: Pair, offsets: Offsets | None, parts: list[Tensor], k: int, scale: float, flag: bool
) -> tuple[Tensor, Tensor]:
    raise AssertionError


def test_the_schema_has_the_fields_of_the_groups() -> None:
    signature = Signature.of(fake)
    assert signature.schema == (
        "(Tensor x, Tensor left, Tensor? right, str mode, Tensor? start, Tensor? stop, Tensor[] parts, SymInt k, "
        "float scale, bool flag, str backend) -> (Tensor, Tensor)"
    )
    assert signature.names[signature.place["stop"]] == "stop"
    assert signature.outputs == 2


@pytest.mark.parametrize("offsets", [None, Offsets(torch.tensor(1), torch.tensor(2))])
def test_what_is_flattened_is_grouped_again(offsets: Offsets | None) -> None:
    signature = Signature.of(fake)
    args = (torch.ones(2), Pair(torch.ones(1), None, "sum"), offsets, [torch.ones(3)], 4, 0.5, True)
    flat = signature.flatten(*args, "reference")
    assert len(flat) == len(signature.names) + 1
    assert flat[-1] == "reference"
    assert tuple(signature.group(*flat)) == args
    assert signature.inputs(*signature.group(*flat)).pair.mode == "sum"


def test_the_second_op_takes_tangents_and_lets_gradients_be_absent() -> None:
    def backward(grad_out: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        raise AssertionError

    signature = Signature.of(backward).along(["left", "right"], ["grad_out"])
    assert signature.schema == (
        "(Tensor? tangent_left, Tensor? tangent_right, Tensor? grad_out, Tensor left, Tensor? right, str mode, "
        "str backend) -> (Tensor, Tensor, Tensor)"
    )


def test_two_arguments_of_one_name_are_refused() -> None:
    def twice(left: Tensor, pair: Pair) -> Tensor:
        raise AssertionError

    with pytest.raises(AssertionError, match="two arguments of one name"):
        Signature.of(twice)


def test_an_argument_of_another_type_is_refused() -> None:
    def mapped(x: Tensor, options: dict) -> Tensor:
        raise AssertionError

    with pytest.raises(KeyError):
        Signature.of(mapped)


def test_what_is_saved_comes_back() -> None:
    values = (torch.ones(2), None, 3, Pair(torch.zeros(1), None, "max"), (torch.ones(1), ()))
    tensors: list[Tensor] = []
    kept = without_tensors(values, tensors)
    assert [x.data_ptr() for x in tensors] == [values[i].data_ptr() for i in (0,)] + [
        values[3].left.data_ptr(),
        values[4][0].data_ptr(),
    ]
    filled = with_tensors(kept, iter(tensors))
    assert isinstance(filled[3], Pair)
    assert filled[0] is values[0]
    assert filled[3].mode == "max"
    assert filled[1:3] == (None, 3)
    assert filled[4][0] is values[4][0]


def _double(x: Tensor, factor: int) -> Tensor:
    return x * factor


def test_a_gradient_by_a_name_that_is_none_is_an_error_of_ours() -> None:
    op = Op(
        "test_misnamed_fwd",
        fake=_double,
        impls={"reference": _double},
        save=lambda inputs, outputs: (inputs.factor,),
        backward=lambda ctx, grad: {"y": grad},
        check=lambda x, factor: None,
    )
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(KeyError, match="y"):
        op(x, 2, "reference").sum().backward()


def test_what_has_no_formula_raises_and_what_is_checked_raises() -> None:
    def check(x: Tensor, factor: int) -> None:
        if factor < 0:
            raise ValueError("factor: expected at least 0")

    op = Op("test_constant_fwd", fake=_double, impls={"reference": _double}, check=check)
    with pytest.raises(ValueError, match="factor"):
        op(torch.ones(2), -1, "reference")
    y = op(torch.ones(2, requires_grad=True), 2, "reference")
    with pytest.raises(NotImplementedError, match="test_constant_fwd has no gradient formula"):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode formula"):
        torch.func.jvp(lambda x: op(x, 2, "reference"), (torch.ones(2),), (torch.ones(2),))


def test_the_triton_launchers_that_ops_name_are_there() -> None:
    named = []
    for path in sorted(ROOT.glob("mmkernels/ops/**/*.py")):
        named += re.findall(r'on_triton\(\s*"([\w.]+)",\s*"(\w+)"', path.read_text(encoding="utf-8"))
    assert ("mmkernels.ops.attention.triton_fwd", "attention_fwd") in named
    for module, name in named:
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (module, name)

"""`mmkernels/_native.pyi` matches the C++ sources, and they match the built module."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from mmkernels.runtime import native

ROOT = Path(__file__).resolve().parents[1]


def script():
    spec = importlib.util.spec_from_file_location("build_native_stub", ROOT / "scripts/build_native_stub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stubbed() -> dict[str, list[str]]:
    """Function -> types of its arguments."""
    text = (ROOT / "mmkernels/_native.pyi").read_text(encoding="utf-8")
    functions = re.findall(r"^def (\w+)\((.*)\) -> ", text, re.M)
    return {name: re.findall(r"\w+: ([^,]+)", arguments) for name, arguments in functions}


_PYBIND11_TYPES = {
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
}


def built(function) -> list[str]:
    """The types in a signature written by pybind11: `name(arg0: type, ...) -> type`."""
    arguments = re.split(r"(?:^|, )\w+: ", re.match(r"\w+\((.*)\) -> ", inspect.getdoc(function))[1])[1:]
    return [_PYBIND11_TYPES.get(kind, kind).split(".")[-1] for kind in arguments]


def test_the_stub_is_what_the_sources_say() -> None:
    assert script().stub() == script().STUB.read_text(encoding="utf-8")


@pytest.mark.skipif(native.why_absent() is not None, reason=f"native core: {native.why_absent()}")
def test_the_stub_is_what_was_built() -> None:
    core = native.core
    there = {name: value for name, value in vars(core).items() if callable(value) and not isinstance(value, type)}
    there = {name: built(value) for name, value in there.items() if not name.startswith("_")}
    listed = stubbed()
    missing = {name for name in listed if not name.endswith("_cuda") or native.has_cuda()} - set(there)
    assert not missing
    assert "launch_attention_fwd_cpu" in there
    for name, types in there.items():
        # A planner array is Any in the stub.
        expected = [kind if mine != "Any" else mine for kind, mine in zip(types, listed[name], strict=True)]
        assert listed[name] == expected, name

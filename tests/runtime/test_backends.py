"""Which backend serves a call, and the errors for those that cannot."""

import importlib.metadata

import pytest
import torch

from mmkernels.runtime import backends, native


@pytest.mark.parametrize(
    ("capability", "archs", "served"),
    [
        ((8, 0), ("80",), True),
        ((8, 9), ("80",), True),
        ((12, 0), ("80",), True),  # from its PTX
        ((12, 0), ("80-real",), False),
        ((12, 0), ("80-virtual",), True),
        ((7, 5), ("80", "90a-real"), False),
        ((9, 0), ("90a-real",), True),
        ((9, 1), ("90a-real",), False),  # "a" code runs on its own architecture only
        ((10, 0), ("90a-real",), False),
        ((10, 0), ("90a-virtual",), False),
        ((10, 3), ("100a-real",), False),
        ((8, 6), (), False),
    ],
)
def test_arch_served(capability: tuple[int, int], archs: tuple[str, ...], served: bool) -> None:
    assert backends.arch_served(capability, archs) is served


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core with CUDA kernels and an H100, as far as backend selection can see."""
    monkeypatch.setattr(native, "_why_absent", None)
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(native, "cuda_archs", lambda: ("80", "90a-real"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_unverified_cuda_kernels_run_only_when_named(gpu_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", frozenset())
    assert backends.candidates("attention", CUDA, torch.bfloat16)["native"] is None
    assert "docs/verified.md" in (backends.defaults("attention", CUDA, torch.bfloat16)["native"] or "")
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", frozenset({"attention"}))
    assert backends.defaults("attention", CUDA, torch.bfloat16)["native"] is None


def test_device_is_compared_with_what_was_compiled(gpu_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_archs", lambda: ("100a-real",))
    why = backends.candidates("attention", CUDA, torch.bfloat16)["native"]
    assert why == "compiled for 100a-real; this device is sm_90"


@pytest.mark.parametrize("arch", ["90a", "90a-real"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sm90_wants_nothing_more(
    gpu_core: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: str
) -> None:
    monkeypatch.setattr(native, "cuda_archs", lambda: ("80", arch))
    assert backends.sm90_wants(CUDA, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_sm90_wants_16_bits(gpu_core: None, dtype: torch.dtype) -> None:
    assert backends.sm90_wants(CUDA, dtype) == f"bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 1), (10, 0), (12, 0)], ids=str)
def test_sm90_wants_its_device(gpu_core: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """`sm_90a` code runs on 9.0 only, not on later devices."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert backends.sm90_wants(CUDA, torch.bfloat16) == "a device of compute capability 9.0"
    assert backends.sm90_wants(CPU, torch.bfloat16) == "a device of compute capability 9.0"


@pytest.mark.parametrize("archs", [(), ("80",), ("90",), ("90-real", "90-virtual"), ("100a-real",)], ids=str)
def test_sm90_wants_its_code(gpu_core: None, monkeypatch: pytest.MonkeyPatch, archs: tuple[str, ...]) -> None:
    """A build for 9.0 without the `a` features lacks these kernels."""
    monkeypatch.setattr(native, "cuda_archs", lambda: archs)
    assert backends.sm90_wants(CUDA, torch.bfloat16) == "a native core compiled for 90a"


def test_interpreter_is_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.7.1")
    assert backends.candidates("packing", CPU, torch.float32)["triton"] is None
    assert backends.defaults("packing", CPU, torch.float32)["triton"] is not None


def test_unknown_backend_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="backend: expected None or one of native, triton, reference, got 'cuda'"):
        backends.resolve("packing", torch.empty(0), "cuda")


def test_error_lists_every_candidate() -> None:
    with pytest.raises(backends.BackendError) as raised:
        backends.resolve("packing", torch.empty(0, dtype=torch.float64), "triton")
    message = str(raised.value)
    assert "backend='triton' does not support this call" in message
    assert all(f"  {name}: " in message for name in backends.BACKENDS)
    assert "not float64" in message


def test_limit_of_a_call_excludes_a_backend() -> None:
    limits = {"native": "head dims up to 256, not 300", "triton": None}
    assert backends.resolve("attention", torch.empty(0), None, limits) == "reference"
    with pytest.raises(backends.BackendError, match="head dims up to 256, not 300"):
        backends.resolve("attention", torch.empty(0), "native", limits)


def test_interpreter_without_float64_products_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for version, serves in (("3.2.0", False), ("3.4.0", False), ("3.5.0", True), ("3.10.1", True), ("4.0", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        why = backends.candidates("contrastive", CPU, torch.float32)["triton"]
        assert (why is None) == serves
        assert serves or f"Triton {version} has no float64 products in its interpreter: expected at least 3.5" in why


def test_a_triton_that_does_not_compile_the_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 and 2.7 ship Triton 3.2 and 3.3."""
    pytest.importorskip("triton", reason="triton is not installed")
    cuda = torch.device("cuda")
    for version, serves in (("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        why = backends._why_not_triton(cuda, torch.bfloat16)
        assert (why is None) == serves
        assert serves or why == f"Triton {version} does not compile these kernels: expected at least 3.4"

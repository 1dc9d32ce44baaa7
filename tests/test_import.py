"""`import mmkernels` adds almost nothing to `import torch`, registers every op, and reports what is missing."""

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from mmkernels.runtime import absence, backends

# Half a second to two seconds each, for modules that a program may never use.
SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy", "triton")


def run(script: str, tmp_path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_next_to_nothing(tmp_path: Path) -> None:
    """Counts modules, not seconds: the count is the same on every machine."""
    script = """
import sys, torch, numpy
before = set(sys.modules)
import mmkernels, mmkernels.nn
print(*sorted(set(sys.modules) - before))
"""
    brought = run(script, tmp_path).split()
    ours = [name for name in brought if name.split(".")[0] == "mmkernels"]
    assert not [name for name in brought if name.startswith(SLOW)]
    assert len(ours) > 50
    assert not [name for name in ours if ".triton_" in name]
    # The rest is Python's own library, or a part of torch or numpy that costs milliseconds.
    assert len(brought) - len(ours) <= 10, sorted(set(brought) - set(ours))


def test_every_op_is_registered_by_the_import(tmp_path: Path) -> None:
    """A saved program with these ops needs only `import mmkernels`."""
    script = "import torch, mmkernels\nprint(*(x for x in torch._C._dispatch_get_all_op_names() if 'mmkernels' in x))"
    found = run(script, tmp_path).split()
    for name in ("attention_fwd", "attention_norm_rope_fwd", "contrastive_infonce_fwd", "packing_segment_pool_fwd"):
        assert f"mmkernels::{name}" in found


def test_compiles_after_the_import_alone(tmp_path: Path) -> None:
    """torch.compile sees the choice of a backend as a constant, although it is not yet imported when the choice is
    marked."""
    script = """
import sys, torch, mmkernels
assert "torch._dynamo" not in sys.modules
x, scale = torch.randn(8, 4), torch.tensor(5.0)
compiled = torch.compile(mmkernels.infonce, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x, x, scale), mmkernels.infonce(x, x, scale))
"""
    run(script, tmp_path)


def test_marked_as_torch_marks() -> None:
    def theirs() -> None: ...

    def ours() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(theirs)
    assert vars(backends._constant(ours)) == vars(theirs)


# Where the core is not beside the imported files


def package(root: Path, *, core: bool = False, sources: bool = False) -> Path:
    (root / "mmkernels").mkdir(parents=True)
    if core:
        (root / "mmkernels" / f"_native{EXTENSION_SUFFIXES[0]}").touch()
    if sources:
        (root / "csrc").mkdir()
    return root / "mmkernels"


def test_sources_that_hide_the_installed_package_say_so(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    sources = package(checkout, sources=True)
    package(site, core=True)
    said = absence.why_no_core(sources, ["/nowhere", str(checkout), str(site)])
    assert f"the sources in {checkout}, without a native core, hide the mmkernels installed in {site}" in said
    assert "start Python in another folder" in said
    assert "compiler" not in said


def test_sources_alone_say_so(tmp_path: Path) -> None:
    said = absence.why_no_core(package(tmp_path, sources=True), [str(tmp_path)])
    assert f"imported from its sources in {tmp_path}" in said
    assert "pip install" in said


def test_installation_without_a_core_asks_for_the_compiler(tmp_path: Path) -> None:
    said = absence.why_no_core(package(tmp_path), [str(tmp_path)])
    assert "mmkernels was built without its native core (no C++ compiler at install time?" in said
    assert "MMKERNELS_REQUIRE_NATIVE=1" in said


def test_import_in_the_root_of_a_checkout(tmp_path: Path) -> None:
    """As users meet it: sources without a core in the working folder, the installed package on the path."""
    installed = Path(backends.__file__).parents[1]
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    (checkout / "csrc").mkdir(parents=True)
    package(site, core=True)
    for file in installed.rglob("*.py"):
        target = checkout / "mmkernels" / file.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    script = f"""
import sys, warnings
sys.path.insert(1, {str(site)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mmkernels
print(mmkernels.__path__[0], *(w.message for w in caught if w.category is RuntimeWarning))
from mmkernels import info
print(info.render(info.collect()))
"""
    said = run(script, checkout)
    assert said.startswith(f"{checkout}/mmkernels the sources in {checkout}, without a native core, hide")
    assert said.count(f"hide the mmkernels installed in {site}") > 1

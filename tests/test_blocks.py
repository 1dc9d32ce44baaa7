"""Every code block of every page: Python runs and prints what the page says, commands exist with their options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blocks import CLIENTS, PAGES, Block, blocks_of, needs, problems, python_blocks, run
from commands import commands, problem
from given import names, put_files

ALONE = ("README.md",)  # each block can be copied by itself
PYTHON = {page: python_blocks(page) for page in PAGES}
OF_CLIENTS = [page for page, blocks in PYTHON.items() if any(map(needs, blocks))]
WITHOUT = {page: [block for block in blocks if not needs(block)] for page, blocks in PYTHON.items()}
SHELL = [block for page in PAGES for block in blocks_of(page) if block.language == "shell" and block.not_run is None]
NOT_RUN = [block for page in PAGES for block in blocks_of(page) if block.not_run is not None]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nothing is looked up outside this machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_no_block_goes_unseen(page: str) -> None:
    assert problems(page) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page, blocks in WITHOUT.items() if blocks and page not in OF_CLIENTS])
def test_python_runs(page: str, page_folder: Path, runs: Path) -> None:
    put_files(page, page_folder, runs)
    run(WITHOUT[page], names(page), alone=page in ALONE)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", OF_CLIENTS)
def test_python_inside_trainers_runs(page: str, page_folder: Path, runs: Path) -> None:
    for name in sorted({CLIENTS[name] for block in PYTHON[page] for name in needs(block)}):
        pytest.importorskip(name)
    put_files(page, page_folder, runs)
    run(PYTHON[page], names(page))


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block: Block, page_folder: Path) -> None:
    put_files(block.page, page_folder)
    found = {command: problem(command) for command in commands(block)}
    assert found
    assert {command: why for command, why in found.items() if why is not None} == {}


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_does_not_run_is_listed(block: Block) -> None:
    if "signatures" not in (block.not_run or ""):
        compile(block.code, block.page, "exec")
    pytest.skip(f"{block} does not run: {block.not_run}")


def test_examples_of_each_family_are_in_the_readme() -> None:
    code = "".join(block.code for block in PYTHON["README.md"])
    for name in ("attention", "infonce", "GradCache", "plan_packing", "segment_pool"):
        assert re.search(rf"\b{name}\(", code), name


# The checks themselves


def test_a_block_that_fails_or_prints_something_else_is_seen() -> None:
    page = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    with pytest.raises(AssertionError, match="page:6"):
        run(blocks_of("page", page)[:2], {})
    run(blocks_of("page", page.replace("\n2\n", "\n1\n"))[:2], {})
    with pytest.raises(NameError):
        run(blocks_of("page", page)[:2], {}, alone=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\nimport torch\n```\n", "looks like Python"),
        ("    for batch in loader:\n        train(batch)\n", "looks like Python"),
        ("<!-- not run: too slow -->\n```python\nx\n```\n", "no reason"),
        ("<!-- not run: downloads a model -->\n\nText.\n\n```python\nx\n```\n", "not right before"),
    ],
)
def test_a_block_that_would_go_unseen_is_seen(text: str, found: str) -> None:
    assert any(found in each for each in problems("page", text))


@pytest.mark.parametrize(
    "command",
    [
        "mmkernels pretrian",
        "mmkernels pretrain --recipe clip --no-such-option 3",
        "mmkernels pretrain --recipe clip --steps many",
        "mmkernels scale --machine H1000",
        "torchrun --nprocs 8 -m mmkernels.pretrain --recipe clip",
        "torchrun --nproc-per-node 8 -m mmkernels.pretrain --batches 4096",
        "python benches/no_such_bench.py",
        "python benches/recipes.py --no-such-option",
        "make no-such-target",
        "make test NOSUCH=1",
        "pip install '.[nosuch]'",
        "pip install --nosuch .",
        "pytest -m nosuch",
        "nosuch --help",
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str, page_folder: Path) -> None:
    assert problem(command) is not None


def test_the_commands_of_a_block() -> None:
    script = "```bash\n#SBATCH --nodes 4\nsrun torchrun -m \\\n    x  # why\ncode=$?\n```\n"
    session = "```\n$ mmkernels info\nmmkernels 1.0\n```\n"
    assert [list(commands(block)) for block in blocks_of("page", f"{script}\n{session}")] == [
        ["srun torchrun -m x # why"],
        ["mmkernels info"],
    ]


def test_a_library_of_a_trainer_is_seen() -> None:
    code = "```python\nimport torch\nfrom {} import x\n```\n"
    wanted = {
        "mmkernels": set(),
        "mmkernels.integrations.torch_data": set(),
        "mmkernels.integrations.energon": {"megatron"},
        "transformers": {"transformers"},
    }
    assert {name: needs(blocks_of("page", code.format(name))[0]) for name in wanted} == wanted

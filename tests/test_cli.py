"""The command line dispatches, needs an extra only where it uses it, and says which."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import mmkernels
from mmkernels import cli


def test_public_names_are_there() -> None:
    assert all(getattr(mmkernels, name) is not None for name in mmkernels.__all__)


def test_help_lists_the_commands(capsys) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("info", "pretrain"))


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mmkernels.__version__


def test_no_command_and_unknown_command_fail(capsys) -> None:
    assert cli.main([]) == 2
    assert cli.main(["prtrain"]) == 2
    assert "no command 'prtrain'" in capsys.readouterr().err


def test_info(capsys) -> None:
    assert cli.main(["info"]) == 0
    assert "backend=None picks" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["info"], ["pretrain", "--help"]], ids=" ".join)
def test_reader_that_leaves_early_is_no_error(command) -> None:
    run = [sys.executable, "-m", "mmkernels.cli", *command]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode == 141


def test_no_output_at_all_is_no_error() -> None:
    closing = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'mmkernels.cli', '--help'])"
    done = subprocess.run([sys.executable, "-c", closing], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stdout", [sys.__stdout__, io.StringIO(), None], ids=["file", "replaced", "closed"])
def test_other_broken_pipe_is_an_error(stdout, monkeypatch) -> None:
    def broken(argv):
        raise BrokenPipeError("of a worker")

    monkeypatch.setitem(cli._COMMANDS, "info", broken)
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main(["info"])


def without(package: str, tmp_path: Path, command: str) -> subprocess.CompletedProcess:
    script = (
        f"import sys; sys.modules[{package!r}] = None\nfrom mmkernels.cli import main; sys.exit(main([{command!r}]))"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["tyro", "tqdm", "PIL"])
def test_pretrain_without_its_extra_says_what_to_install(package: str, tmp_path: Path) -> None:
    done = without(package, tmp_path, "pretrain")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        f"mmkernels pretrain needs the package {package}: pip install 'mmkernels[pretrain]'"
    )


@pytest.mark.parametrize(("command", "package"), [("finetune", "tyro"), ("export", "safetensors")])
def test_transfer_without_its_extra_says_what_to_install(command: str, package: str, tmp_path: Path) -> None:
    done = without(package, tmp_path, command)
    assert done.returncode == 2
    message = f"mmkernels {command} needs the package {package}: pip install 'mmkernels[pretrain]'"
    assert done.stderr.strip().endswith(message)


@pytest.mark.parametrize("package", ["imagehash", "datasketch", "py3langid", "sklearn", "tyro"])
def test_data_report_without_its_extra_says_what_to_install(package: str, tmp_path: Path) -> None:
    done = without(package, tmp_path, "data-report")
    assert done.returncode == 2
    message = f"mmkernels data-report needs the package {package}: pip install 'mmkernels[report]'"
    assert done.stderr.strip().endswith(message)


def test_info_needs_no_extra(tmp_path: Path) -> None:
    assert without("tyro", tmp_path, "info").returncode == 0


def test_pretrain_hands_its_arguments_over(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "--help"])
    assert stopped.value.code == 0
    assert "mmkernels pretrain" in capsys.readouterr().out

"""Runs a test's function once per rank, in processes of their own that talk over gloo."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run"]


def run(function: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """Call `function(rank, world, *args)` on each of `world` ranks of a gloo group; a failure of one is raised here.

    Args:
        function: at the top level of a test file. A child finds it by that file: it cannot import it by the name that
            pytest gave the module.
        folder: an empty one, for the rendezvous.
    """
    code = function.__code__
    mp.spawn(_rank, (code.co_filename, function.__name__, world, str(folder / "rendezvous"), args), nprocs=world)


def _rank(rank: int, file: str, name: str, world: int, rendezvous: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=patience)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank, world, *args)
    dist.barrier()
    os._exit(0)  # without teardown, in which a process group and a hook written in Python can wait for each other

"""Ranks of a gloo group for tests: processes that start once and then run one function after another.

    results = ranks.run(4, case, argument)        # case(rank, world, argument) in each of four processes

A failing rank shows its traceback; a hanging one shows where it is after `timeout` seconds, and is killed. Either way
the next call starts new processes, because the others wait for messages that will not come.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["run"]

# Processes are forked from one that has imported torch and has no threads yet.
_context = multiprocessing.get_context("forkserver")
_pools: dict[int, _Pool] = {}


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """`function(rank, world, *args)` on every rank of a gloo group; the results in rank order.

    Args:
        function: at the top level of its file.
        args: anything that can be pickled.

    Raises:
        AssertionError: a rank failed, with its traceback, or did not answer in time.
    """
    pool = _pools.get(world)
    if pool is None:
        pool = _pools[world] = _Pool(world)
    try:
        return pool.run(function, args, timeout)
    except AssertionError:
        _pools.pop(world).close()
        raise


class _Pool:
    def __init__(self, world: int) -> None:
        _context.set_forkserver_preload(["torch", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, world, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function.__code__.co_filename, function.__qualname__, args))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = False, f"ended with code {self._processes[rank].exitcode}"
            if not all(fine for fine, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for this rank, or fail like it
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in sorted(answers.items()) if not fine]
        silent = [
            f"rank {rank}: no answer; it is at\n{self._at(rank)}"
            for rank in range(len(self._pipes))
            if rank not in answers
        ]
        assert not failed + silent, "\n".join([function.__name__, *failed, *silent])
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def _at(self, rank: int) -> str:
        """The stacks of a rank's threads."""
        if (pid := self._processes[rank].pid) is not None and self._processes[rank].is_alive():
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)
        return _stacks(self._folder.name, rank).read_text(encoding="utf-8")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _stacks(folder: str, rank: int) -> Path:
    return Path(folder) / f"stacks-{rank}"


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    stacks = _stacks(folder, rank).open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, stacks)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    path = Path(folder) / "rendezvous"
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=patience)
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            os._exit(0)  # no teardown: a process group and a hook written in Python can deadlock in it
        try:
            torch.manual_seed(0)
            answer = True, getattr(_module(file), name)(rank, world, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


def _module(file: str) -> ModuleType:
    """The test file as a module; pytest's name for it may not be importable here."""
    name = f"ranks_{Path(file).stem}_{abs(hash(file))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@atexit.register
def _close_all() -> None:
    while _pools:
        _pools.popitem()[1].close()

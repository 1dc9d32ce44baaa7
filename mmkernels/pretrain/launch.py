"""The processes of a run: what a launcher such as torchrun says of them, and the group in which they train."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.ranks import ALONE, PeerError, Ranks

__all__ = ["device_of", "launched", "leads", "shards_of"]


@contextmanager
def launched(config: Config) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that train together, and the device of this one.

    They are those of a process group that there is already, or of one made for the time inside from what the launcher
    has set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as by torchrun; or SLURM_PROCID, SLURM_LOCALID
    and SLURM_STEP_NUM_TASKS, as by srun, with the same MASTER_ADDR and MASTER_PORT. Without, this process is alone.

    Raises:
        ValueError: the settings do not fit the ranks, or the device is not there, or a process group has no backend for
            it.
    """
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if dist.is_available() and dist.is_initialized():
        with _with_hosts(device, timedelta(seconds=config.timeout)) as group:
            yield _ranks(group, config), device
        return
    world = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    if world == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, patience = _number("RANK", "SLURM_PROCID", 0), timedelta(seconds=config.timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=_store_of_this_start(rank, world, patience),
        rank=rank,
        world_size=world,
        timeout=patience,
    )
    try:
        yield _ranks(dist.group.WORLD, config), device
    except BaseException:
        _end_after_error()
        raise
    dist.destroy_process_group()


def _end_after_error() -> None:
    """End the group that was made here without waiting for other ranks, which may be gone: NCCL waits for what is in
    flight when it is destroyed. Afterwards another can be made, if this torch can abort one."""
    if "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
    elif abort := getattr(dist.distributed_c10d, "_abort_process_group", None):
        with suppress(Exception):  # what is raised already says more
            abort()


@contextmanager
def _with_hosts(device: torch.device, patience: timedelta) -> Iterator[Any]:
    """The process group that there is, or one of the same ranks if that takes no tensors on the host: ranks exchange
    many of these."""
    shown = dist.get_backend_config()  # such as cpu:gloo,cuda:nccl
    if device.type != "cpu" and f"{device.type}:" not in shown and dist.get_world_size() > 1:
        raise ValueError(f"device: expected one for which the process group has a backend ({shown}), got {device}")
    if "cpu:" in shown or dist.get_world_size() == 1:
        yield dist.group.WORLD
        return
    made = dist.new_group(timeout=patience, backend=f"cpu:gloo,{shown}")
    yield made
    dist.destroy_process_group(made)  # not after an error: it would wait for ranks that may be gone


def _store_of_this_start(rank: int, world: int, patience: timedelta) -> dist.Store:
    """Where the ranks find each other. torchrun lets those that it starts again share a store with those before them,
    whose addresses are still in it; so each says that it is here, and rank 0 answers with a name that is new."""
    shared, _, _ = next(dist.rendezvous("env://", rank, world, timeout=patience))
    me, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if rank:
        shared.set(f"mmkernels/here/{rank}", me)
        shared.wait([f"mmkernels/welcome/{me}"], patience)
        name = shared.get(f"mmkernels/welcome/{me}").decode()
        shared.add(f"mmkernels/joined/{name}", 1)
        return dist.PrefixStore(name, shared)
    welcomed: dict[int, bytes] = {}
    while shared.add(f"mmkernels/joined/{me}", 0) < world - 1:
        for other in range(1, world):
            if shared.check([key := f"mmkernels/here/{other}"]) and (they := shared.get(key)) != welcomed.get(other):
                shared.set(f"mmkernels/welcome/{they.decode()}", me)
                welcomed[other] = they
        if time.monotonic() > deadline:
            missing = ", ".join(str(other) for other in range(1, world) if other not in welcomed) or "some"
            raise PeerError(f"ranks {missing} of {world} have not come within {patience.total_seconds():.0f} s")
        time.sleep(0.01)
    return dist.PrefixStore(me, shared)


def _ranks(group: object, config: Config) -> Ranks:
    ranks = Ranks(group)
    if ranks.size == 1:
        return ALONE
    if config.parallel == "hsdp" and ranks.size % shards_of(config, ranks):
        got = f"{shards_of(config, ranks)} of {ranks.size} ranks"
        raise ValueError(f"shard_ranks: expected a number that divides that of the ranks, got {got}")
    return ranks


def shards_of(config: Config, ranks: Ranks) -> int:
    """How many ranks hold one replica of the model."""
    if config.parallel == "fsdp":
        return ranks.size
    return config.shard_ranks or _number("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", ranks.size)


def leads() -> bool:
    """Whether this process is the one that prints: known before there is a group."""
    return _number("RANK", "SLURM_PROCID", 0) == 0


def _number(name: str, other: str, default: int) -> int:
    """What one of two environment variables says."""
    for each in (name, other):
        if each in os.environ:
            try:
                return int(os.environ[each].partition("(")[0])  # SLURM: 8(x4), 8 on each of 4 nodes
            except ValueError:
                raise ValueError(f"{each}: expected a number, got {os.environ[each]!r}") from None
    return default


def device_of(config: Config) -> torch.device:
    """The device of this process; of several GPUs that of its place on the node. Raise ValueError if there is none of
    that name."""
    local = _number("LOCAL_RANK", "SLURM_LOCALID", -1)
    if config.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and local >= 0:  # a launcher may show each process its own GPU alone
            return torch.device(kind, local % torch.cuda.device_count())
        return torch.device(kind)
    try:
        device = torch.device(config.device)
        if device.type == "cuda" and device.index is None and local >= 0:
            device = torch.device("cuda", local % max(torch.cuda.device_count(), 1))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former: PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected auto, or one that is here, got {config.device} ({reason})") from error
    return device

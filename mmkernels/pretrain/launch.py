"""The processes of a run: what a launcher such as torchrun says of them, and the group in which they train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.ranks import ALONE, Ranks

__all__ = ["device_of", "launched", "leads", "shards_of"]


@contextmanager
def launched(config: Config) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that train together, and the device of this one.

    They are those of a process group that there is already, or of one made for the time inside from what the launcher
    has set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as by torchrun; or SLURM_PROCID, SLURM_LOCALID
    and SLURM_STEP_NUM_TASKS, as by srun, with the same MASTER_ADDR and MASTER_PORT. Without, this process is alone.

    Raises:
        ValueError: the settings do not fit the ranks, or the device is not there.
    """
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if dist.is_available() and dist.is_initialized():
        yield _ranks(dist.group.WORLD, config), device
        return
    world = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    if world == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=_number("RANK", "SLURM_PROCID", 0),
        world_size=world,
        timeout=timedelta(seconds=config.timeout),
    )
    try:
        yield _ranks(dist.group.WORLD, config), device
    finally:
        dist.destroy_process_group()


def _ranks(group: object, config: Config) -> Ranks:
    ranks = Ranks(group)
    if ranks.size == 1:
        return ALONE
    if config.parallel == "hsdp" and ranks.size % shards_of(config, ranks):
        got = f"{shards_of(config, ranks)} of {ranks.size} ranks"
        raise ValueError(f"shard_ranks: expected a number that divides that of the ranks, got {got}")
    if config.batch < ranks.size:
        raise ValueError(f"batch: expected at least a sample for each of {ranks.size} ranks, got {config.batch}")
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
                return int(os.environ[each])
            except ValueError:
                raise ValueError(f"{each}: expected a number, got {os.environ[each]!r}") from None
    return default


def device_of(config: Config) -> torch.device:
    """The device of this process; of several GPUs that of its place on the node. Raise ValueError if there is none of
    that name."""
    local = _number("LOCAL_RANK", "SLURM_LOCALID", -1)
    if config.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(kind, local) if kind == "cuda" and local >= 0 else torch.device(kind)
    try:
        device = torch.device(config.device)
        if device.type == "cuda" and device.index is None and local >= 0:
            device = torch.device("cuda", local)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former: PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected auto, or one that is here, got {config.device} ({reason})") from error
    return device

"""Which devices the tensors of a process group's messages may be on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["backends_of", "device_of_numbers"]


def backends_of(group: Any) -> dict[str, str]:
    """Device type -> backend of a process group: {"cpu": "gloo", "cuda": "nccl"}. (`get_backend` has one name for all,
    and none for a group that was made without.)"""
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}


def device_of_numbers(group: Any) -> torch.device:
    """Where the few numbers are that ranks agree on. It depends on the group alone, not on tensors, of which a rank may
    have wrong ones: the host, if the group has a backend for it, so that nobody waits for a GPU; else the rank's GPU.
    """
    kinds = backends_of(group)
    if "cpu" in kinds:
        return torch.device("cpu")
    kind = next(iter(kinds))
    return torch.device(kind, torch.get_device_module(kind).current_device())

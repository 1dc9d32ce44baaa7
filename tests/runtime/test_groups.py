"""Which device agreements of a group are on: with backends that are not here, by what torch says of a group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mmkernels.runtime.groups import backends_of, device_of_numbers


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),  # init_process_group("gloo")
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl,cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda:3"),  # "nccl", or none on a machine with GPUs, whose get_backend is "undefined"
    ],
)
def test_the_device_depends_on_the_group_alone(config: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(current_device=lambda: 3))
    assert device_of_numbers(object()) == torch.device(device)
    assert ",".join(f"{kind}:{backend}" for kind, backend in backends_of(object()).items()) == config

"""The losses inside a bfloat16 model wrapped by DistributedDataParallel or fully_shard: their scalars stay float32."""

from __future__ import annotations

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmkernels.nn import SigLIPLoss


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.loss = nn.Linear(8, 8), SigLIPLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.tower(x), self.tower(y))


def _case(rank: int, world: int, wrapper: str) -> None:
    model = Model().bfloat16()
    x, y = torch.randn(2, 6, 8, dtype=torch.bfloat16).unbind()
    if wrapper == "ddp":
        run: nn.Module = DistributedDataParallel(model)
    else:  # fully_shard takes no scalar parameters
        run = fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=set(model.loss.parameters()))
    run(x, y).backward()
    if wrapper == "fully_shard":
        model.to(torch.float32)
        model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        dtype = torch.float32 if name.startswith("loss") else torch.bfloat16
        assert p.dtype == p.grad.dtype == dtype, name
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
def test_scalars_stay_wide_in_a_wrapped_model(wrapper: str) -> None:
    if wrapper == "fully_shard" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 shards on a device alone: its streams on a CPU have no record_event")
    ranks.run(2, _case, wrapper)

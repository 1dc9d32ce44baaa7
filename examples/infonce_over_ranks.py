"""InfoNCE over ranks: every rank embeds its own pairs, and the loss is that of all ranks' pairs together.

torchrun --nproc-per-node 2 examples/infonce_over_ranks.py    # on GPUs: the backend "nccl", and tensors on the device
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mmkernels import infonce

ROWS = 64  # pairs of each rank


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(96, 32), nn.Linear(48, 32)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = normalize(self.image(images), dim=-1), normalize(self.text(texts), dim=-1)
        return x, y, self.log_scale.exp()


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS * world, 96, generator=generator)
    texts = images[:, :48] + torch.randn(ROWS * world, 48, generator=generator)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)

    torch.manual_seed(0)
    model = DistributedDataParallel(Towers())
    x, y, scale = model(images[mine], texts[mine])
    loss = infonce(x, y, scale, group=dist.group.WORLD)  # the same on every rank
    loss.backward()  # DistributedDataParallel averages: .grad is the gradient of the loss of all pairs

    single = copy.deepcopy(model.module)  # to compare with: one process that has all pairs
    single.zero_grad()
    expected = infonce(*single(images, texts))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for parameter, of in zip(model.module.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, of.grad, rtol=1e-3, atol=1e-5)
    if rank == 0:
        print(f"{world} ranks of {ROWS} pairs, loss {loss.item():.4f}")
        print("loss and gradients are those of one process with all pairs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

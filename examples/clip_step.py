"""A CLIP training step with a batch whose activations would not fit in memory.

The towers embed the batch 64 samples at a time; the loss sees all of it. `.grad` is the full-batch gradient: the last
lines compare it with a plain PyTorch pass over the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.nn import InfoNCELoss

BATCH, CHUNK, STEPS = 256, 64, 5


def tower(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, 64))


def plain_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """What `InfoNCELoss` computes, with the [N, N] logits in memory."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def main() -> None:
    torch.manual_seed(0)
    image_tower, text_tower, loss = tower(96), tower(48), InfoNCELoss()  # the loss holds the temperature
    towers = [*image_tower.parameters(), *text_tower.parameters()]
    scale = {"params": loss.parameters(), "weight_decay": 0.0}  # decay would pull the temperature towards 1
    optimizer = torch.optim.AdamW([{"params": towers}, scale], lr=3e-3)
    cached = GradCache([image_tower, text_tower], loss, chunk_size=CHUNK)

    images = torch.randn(BATCH, 96)
    texts = images[:, :48] + 0.5 * torch.randn(BATCH, 48)  # captions correlate with their images
    for step in range(STEPS):
        optimizer.zero_grad()
        value = cached(images, texts)  # forward and backward
        optimizer.step()
        loss.clamp_()
        print(f"step {step}: loss {value.item():.3f}, scale {loss.scale.item():.2f}")

    optimizer.zero_grad()
    cached(images, texts)
    parameters = [*towers, *loss.parameters()]
    ours = [p.grad.clone() for p in parameters]
    optimizer.zero_grad()
    plain_loss(image_tower(images), text_tower(texts), loss.scale).backward()
    for mine, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
    print("gradients equal those of one pass over the whole batch")


if __name__ == "__main__":
    main()

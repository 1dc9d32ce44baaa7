"""Gradient caching in a Lightning module: the batch of a contrastive loss is larger than what the encoders' activations
leave room for, and the gradient is that of the whole batch.

pip install mmkernels lightning
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from mmkernels import GradCache, infonce

BATCH, CHUNK = 256, 32


class Contrast(lightning.LightningModule):
    def __init__(self, cached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64))
        self.text = nn.Linear(48, 64)
        self.log_scale = nn.Parameter(torch.tensor(2.66))
        self.cache = GradCache([self.image, self.text], self.contrast, chunk_size=CHUNK) if cached else None
        self.losses: list[float] = []

    def contrast(self, x: Tensor, y: Tensor) -> Tensor:
        return infonce(normalize(x, dim=-1), normalize(y, dim=-1), self.log_scale.exp())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, texts = batch
        if self.cache is None:
            loss = self.contrast(self.image(images), self.text(texts))
        else:
            loss = self.cache.as_loss()(images, texts)  # Lightning runs its backward, as of any loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(cached: bool) -> Contrast:
    torch.manual_seed(1)
    images = torch.randn(4 * BATCH, 96)
    loader = DataLoader(TensorDataset(images, images[:, :48] + torch.randn(4 * BATCH, 48)), batch_size=BATCH)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    module = Contrast(cached)
    lightning.Trainer(max_epochs=2, gradient_clip_val=1.0, **options).fit(module, loader)
    return module


def main() -> None:
    cached, whole = trained(True), trained(False)
    print("losses with gradient caching:", ", ".join(f"{loss:.4f}" for loss in cached.losses))
    print("losses of whole batches:     ", ", ".join(f"{loss:.4f}" for loss in whole.losses))
    for mine, other in zip(cached.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    print(f"the same weights, with activations of {CHUNK} samples instead of {BATCH}")


if __name__ == "__main__":
    main()

"""open_clip's loss swapped for ours: one import. The same training, without the N x N logits in memory.

pip install 'mmkernels[open-clip]'
"""

import torch
from open_clip import ClipLoss as TheirClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from mmkernels.integrations.open_clip import ClipLoss  # before: from open_clip import ClipLoss

BATCH, STEPS = 64, 5


def model() -> CLIP:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=16, vocab_size=500, width=64, heads=2, layers=2)
    return CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


def trained(loss_fn: torch.nn.Module) -> tuple[list[float], CLIP]:
    """A few steps as in open_clip_train: a batch of images and tokens, features, loss."""
    clip = model()
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        texts = torch.randint(1, 500, (BATCH, 16), generator=generator)
        image_features, text_features, logit_scale = clip(images, texts)
        optimizer.zero_grad()
        loss = loss_fn(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, clip


def main() -> None:
    ours, model_a = trained(ClipLoss())
    theirs, model_b = trained(TheirClipLoss())
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        print(f"step {step}: loss {a:.6f}, open_clip's {b:.6f}")
    for mine, other in zip(model_a.parameters(), model_b.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    print("the same losses and weights as with open_clip's loss")


if __name__ == "__main__":
    main()

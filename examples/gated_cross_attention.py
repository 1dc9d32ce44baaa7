"""Interleaved text and images: each text token attends to the last image before it, through a gate that starts closed.

A Flamingo-like layer can be inserted into a pretrained language model: while its gate is 0 it changes nothing.
"""

import torch

from mmkernels import AttentionMask
from mmkernels.nn import GatedCrossAttention

WIDTH, HEADS, PATCHES = 64, 4, 9


def main() -> None:
    torch.manual_seed(0)
    # Two packed documents of 10 and 8 text tokens. The first has two images, after its tokens 2 and 6, the second has
    # one, before its first token.
    text = torch.tensor([0, 10, 18], dtype=torch.int32)
    images = torch.tensor([0, 2 * PATCHES, 3 * PATCHES], dtype=torch.int32)
    seen = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2] + [1] * 8, dtype=torch.int32)  # images so far, per text token
    owner = torch.repeat_interleave(torch.tensor([1, 2, 1], dtype=torch.int32), PATCHES)  # which image, per patch
    mask = AttentionMask.media(text, images, seen, owner)

    layer = GatedCrossAttention(WIDTH, HEADS, bias=False)  # a bias would change tokens without an image too
    hidden = torch.randn(18, WIDTH)  # from the language model
    patches = torch.randn(3 * PATCHES, WIDTH)  # from the vision encoder
    torch.testing.assert_close(layer(hidden, patches, mask), hidden)
    print("with a closed gate the layer passes the text through")

    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(8):
        optimizer.zero_grad()
        out = layer(hidden, patches, mask)
        loss = (out - 1).square().mean()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")

    changed = (layer(hidden, patches, mask) - hidden).abs().amax(1) > 1e-4
    assert not changed[:3].any(), "tokens before the first image see none, and are not changed"
    assert changed[3:].all()
    print("the gate has opened: only the tokens that have an image before them have changed")


if __name__ == "__main__":
    main()

"""A training step of a small vision-language model over packed samples of text and images.

Samples of different lengths form dense packs without padding between them. Image features replace placeholder tokens,
text is causal, an image's tokens see each other in both directions, and samples do not see each other: the last lines
compare a pack's loss with those of its samples alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import AttentionMask, Media, Modality, PackedBatch, embed_splice, patchify, plan_packing
from mmkernels.nn import FusedSelfAttention

VOCABULARY, WIDTH, HEADS, PATCH, CAPACITY = 1000, 64, 4, 8, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = FusedSelfAttention(WIDTH, HEADS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        x = x + self.attention(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH))
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.positions = nn.Embedding(CAPACITY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy of each token's successor in its sample."""
        pictures = batch.media[Modality.IMAGE]
        x = embed_splice(batch.tokens, self.table, self.patches(pictures.values), pictures.dst_index)
        x = x + self.positions(batch.position_ids)
        mask = AttentionMask.multimodal(batch.cu_seqlens, batch.modality_ids, batch.span_ids)  # once, for all layers
        for block in self.blocks:
            x = block(x, mask)
        return F.cross_entropy(x @ self.table.T, batch.next_labels(), ignore_index=-100)


def sample(words: int) -> tuple[list[Tensor | Media], Tensor]:
    """A prompt, an image and a caption, and the labels, which only the caption has."""
    tokens, grid = patchify([torch.randn(3, 32, 32)], PATCH)
    picture = Media(Modality.IMAGE, tokens, grid_thw=tuple(grid[0].tolist()))
    prompt, caption = torch.randint(VOCABULARY, (2,)), torch.randint(VOCABULARY, (words,))
    labels = torch.cat([torch.full((len(prompt) + picture.length,), -100), caption])
    return [prompt, picture, caption], labels


def main() -> None:
    torch.manual_seed(0)
    samples = [sample(int(words)) for words in torch.randint(4, 100, (24,))]
    plan = plan_packing([len(labels) for _, labels in samples], CAPACITY)
    print(plan)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # A pack is a step here; for several in a step see `PackedBatch.loss_weights`, whose mean is over the tokens of all.
    for step, items in enumerate(plan):
        parts, labels = zip(*(samples[i] for i in items), strict=True)
        batch = PackedBatch.from_samples(parts, capacity=CAPACITY, sample_ids=items.tolist(), labels=labels)
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        print(f"pack {step}: {batch.num_samples} samples, {batch.num_tokens} tokens, loss {loss.item():.3f}")

    with torch.no_grad():
        together, sums, targets = model(batch), 0.0, 0
        for part, label in zip(parts, labels, strict=True):
            count = int((label[1:] != -100).sum())
            sums += count * model(PackedBatch.from_samples([part], labels=[label])).item()
            targets += count
    torch.testing.assert_close(together.item(), sums / targets, rtol=1e-4, atol=0.0)
    print("the loss of a pack is the mean over its samples' tokens, each as if alone")


if __name__ == "__main__":
    main()

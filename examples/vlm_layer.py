"""A decoder layer of a vision-language model over packed samples: text is causal, an image's tokens see each other in
both directions, and samples do not see each other. The mask is O(tokens), and all layers share it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import AttentionMask, Modality, attention, qk_norm_rope

WIDTH, HEADS, KV_HEADS = 128, 8, 2
DIM = WIDTH // HEADS


class Layer(nn.Module):
    """Grouped-query attention with RMS-normalised, rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.to_q, self.to_out = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.to_kv = nn.Linear(WIDTH, 2 * KV_HEADS * DIM)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, C] -> q [T, H, D], k and v [T, Hkv, D]"""
        y = self.norm(x)
        k, v = self.to_kv(y).unflatten(-1, (2, KV_HEADS, DIM)).unbind(1)
        q, k = qk_norm_rope(self.to_q(y).unflatten(-1, (HEADS, DIM)), k, positions)
        return q, k, v

    def forward(self, x: Tensor, mask: AttentionMask, positions: Tensor) -> Tensor:
        out = attention(*self.heads(x, positions), mask)
        return x + self.to_out(out.flatten(1))


def sample(*parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Modality and span of each token; every image of a sample is a span of its own, text is in none."""
    modalities, spans = [], []
    for i, (kind, length) in enumerate(parts):
        modalities += [Modality.IMAGE if kind == "image" else Modality.TEXT] * length
        spans += [i if kind == "image" else -1] * length
    return modalities, spans


def main() -> None:
    torch.manual_seed(0)
    samples = [sample(("text", 3), ("image", 16), ("text", 9)), sample(("image", 9), ("text", 7), ("image", 9))]
    lengths = [len(spans) for _, spans in samples]
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    modality_ids = torch.tensor([m for modalities, _ in samples for m in modalities], dtype=torch.uint8)
    span_ids = torch.tensor([s for _, spans in samples for s in spans], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])

    mask = AttentionMask.multimodal(cu_seqlens, modality_ids, span_ids)
    print(f"{len(span_ids)} tokens, {mask.density(len(span_ids), len(span_ids)):.0%} of all pairs are visible")
    layer, x = Layer(), torch.randn(len(span_ids), WIDTH)
    out = layer(x, mask, positions)
    out.square().mean().backward()

    dense = mask.to_dense(len(span_ids), len(span_ids))  # to compare with: what SDPA needs
    assert dense[3, 18]  # an image's first token sees its last
    assert not dense[1, 2]  # text sees no later text
    assert not dense[lengths[0] :, : lengths[0]].any()  # nor another sample
    q, k, v = (y.transpose(0, 1)[None] for y in layer.heads(x, positions))
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out, x + layer.to_out(plain.flatten(1)), rtol=1e-4, atol=1e-5)
    print("the same as SDPA with the dense mask")


if __name__ == "__main__":
    main()

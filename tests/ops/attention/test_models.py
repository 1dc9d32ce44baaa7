"""As users would: a Gemma-3-like and a Flamingo-like layer give the same with our op as with a dense mask and SDPA.

The dense masks are written as those models write them, from token types and media locations, without our builders.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkernels import AttentionMask, Modality, attention
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of

DIM, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 24


def ours(q, k, v, mask, scale):
    return attention(q, k, v, mask, scale=scale)


def dense_sdpa(q, k, v, mask, scale):
    """q [T, H, D] under a bool mask [Tq, Tk]; a row without a key, NaN in SDPA, is zeroed as Flamingo does."""
    seen = mask.any(1)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask | ~seen[:, None], scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1) * seen[:, None, None]


def rotate(x, position, theta):
    half = x.shape[-1] // 2
    angle = position[:, None] / theta ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GemmaLayer(nn.Module):
    """Norms before and after both halves, QK-norm, rotary positions, grouped heads, a gated MLP."""

    def __init__(self, theta):
        super().__init__()
        self.theta = theta
        self.q, self.k = nn.Linear(DIM, HEADS * HEAD_DIM, False), nn.Linear(DIM, KV_HEADS * HEAD_DIM, False)
        self.v, self.o = nn.Linear(DIM, KV_HEADS * HEAD_DIM, False), nn.Linear(HEADS * HEAD_DIM, DIM, False)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.gate, self.up, self.down = nn.Linear(DIM, 96, False), nn.Linear(DIM, 96, False), nn.Linear(96, DIM, False)

    def forward(self, x, position, attend, mask):
        h = self.norms[0](x)
        q, k, v = (layer(h).unflatten(-1, (-1, HEAD_DIM)) for layer in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), position, self.theta), rotate(self.k_norm(k), position, self.theta)
        x = x + self.norms[1](self.o(attend(q, k, v, mask, HEAD_DIM**-0.5).flatten(1)))
        h = self.norms[2](x)
        return x + self.norms[3](self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h)))


class FlamingoLayer(nn.Module):
    """Gated cross-attention to the media before each token; both gates start near zero."""

    def __init__(self):
        super().__init__()
        self.norm, self.ff_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.kv = nn.Linear(DIM, HEADS * HEAD_DIM, False), nn.Linear(DIM, 2 * HEADS * HEAD_DIM, False)
        self.o, self.ff = nn.Linear(HEADS * HEAD_DIM, DIM, False), nn.Linear(DIM, DIM, False)
        self.gates = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x, media, attend, mask):
        q = self.q(self.norm(x)).unflatten(-1, (HEADS, HEAD_DIM))
        k, v = self.kv(media).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(1)
        x = x + self.gates[0].tanh() * self.o(attend(q, k, v, mask, HEAD_DIM**-0.5).flatten(1))
        return x + self.gates[1].tanh() * F.gelu(self.ff(self.ff_norm(x)))


def assert_same(layers, inputs, ours, theirs):
    """Output and gradients of inputs and parameters: equal in float64; in float32 as close to float64 as SDPA's."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        values = [x.to(dtype).requires_grad_() for x in inputs]
        parameters = [p for layer in layers for p in layer.to(dtype).parameters()]
        for call in (ours, theirs):
            out = call(*values)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
            results[dtype, call] = [out.detach(), *torch.autograd.grad(out, [*values, *parameters], weight)]
    truths = results[torch.float64, theirs]
    for got, truth in zip(results[torch.float64, ours], truths, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-11)
    for i, truth in enumerate(truths):
        assert_as_accurate(f"{i}", results[torch.float32, ours][i], results[torch.float32, theirs][i], truth)


def test_gemma():
    """A sliding and a global layer over a packed batch of three samples with images of 16 tokens."""
    torch.manual_seed(0)
    image, text = [1] * 16, [0]
    samples = [text * 9 + image + text * 30, image + text + image + text * 5, text * 40]
    token_type = torch.tensor([kind for sample in samples for kind in sample])
    lengths, window = [len(s) for s in samples], 20
    sample = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])

    # Token types to groups: an image is a run of image tokens.
    is_image = token_type == 1
    starts = is_image & ~F.pad(is_image, (1, 0))[:-1]
    group = torch.where(is_image, starts.long().cumsum(0) - 1, -1)
    i, j = torch.arange(len(sample))[:, None], torch.arange(len(sample))
    same_image = (group[:, None] == group) & is_image[:, None]
    same_sample = sample[:, None] == sample
    dense = [((j <= i) & (j > i - w) | same_image) & same_sample for w in (window, len(sample))]

    cu, ids = cu_seqlens_of(lengths), (token_type.byte(), group.int())
    masks = [AttentionMask.multimodal(cu, *ids, bidirectional=(Modality.IMAGE,), window=w) for w in (window, None)]
    layers = [GemmaLayer(1e4), GemmaLayer(1e6)]

    def model(attend, masks):
        def run(x):
            for layer, mask in zip(layers, masks, strict=True):
                x = layer(x, position.to(x.dtype), attend, mask)
            return x

        return run

    x = torch.randn(len(sample), DIM)
    assert_same(layers, [x], model(ours, masks), model(dense_sdpa, dense))


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_flamingo(mode):
    """Interleaved text with media of 8 latents; tokens before the first medium see none, and a sample may have none."""
    torch.manual_seed(0)
    marks = [[5, 20, 21], [0], [], [30]]  # where each medium of a sample stands in its text
    text_lengths, latents = [40, 12, 9, 31], 8
    text_time, media_time, text_sample, media_sample = [], [], [], []
    for s, (at, length) in enumerate(zip(marks, text_lengths, strict=True)):
        text_time += [sum(m <= t for m in at) for t in range(length)]
        media_time += [m + 1 for m in range(len(at)) for _ in range(latents)]
        text_sample += [s] * length
        media_sample += [s] * len(at) * latents
    text_time, media_time, text_sample, media_sample = (
        torch.tensor(x, dtype=torch.int32) for x in (text_time, media_time, text_sample, media_sample)
    )
    match = text_time[:, None] == media_time if mode == "last" else text_time[:, None] >= media_time
    dense = match & (text_sample[:, None] == media_sample)
    assert not dense[0].any()

    cu_q, cu_k = cu_seqlens_of(text_lengths), cu_seqlens_of([len(at) * latents for at in marks])
    mask = AttentionMask.media(cu_q, cu_k, text_time - 1, media_time - 1, mode=mode)
    layer = FlamingoLayer()
    x = torch.randn(len(text_time), DIM)
    media = torch.randn(len(media_time), DIM)
    calls = [lambda x, media: layer(x, media, ours, mask), lambda x, media: layer(x, media, dense_sdpa, dense)]
    assert_same([layer], [x, media], *calls)

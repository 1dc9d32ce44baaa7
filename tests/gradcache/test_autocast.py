"""GradCache under autocast: both passes in its dtypes, the backward outside it."""

import pytest
import torch
from gradcache.toys import Encoder, assert_same, chunk_graph, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_is_the_same_in_both_passes(cache_enabled: bool) -> None:
    image, text = Encoder(), Encoder()
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    seen: list[torch.dtype] = []
    image.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
        embeddings = chunk_graph([image, text], [x, y], [4, 4])
        loss = plain_infonce(*embeddings)
    loss.backward()
    expected = gradients(image, text)
    clear(image, text)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
        cached = GradCache([image, text], plain_infonce, chunk_size=4)(x, y)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled() == cache_enabled
    assert seen == [torch.bfloat16] * 6
    assert torch.equal(cached, loss.detach())
    # One graph sums a weight's gradient over chunks in bfloat16, GradCache in float32.
    assert_same(gradients(image, text), expected, 2e-2)


class Exact(nn.Module):
    """An encoder that computes in float32 whatever the surrounding autocast."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.encoder(x)


def test_backward_runs_outside_autocast() -> None:
    """As torch recommends for a training step: inside autocast, a float32 region's backward would multiply in
    bfloat16."""
    image, text = Exact(Encoder()), Exact(Encoder())
    x, y = torch.randn(7, 6), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain_infonce(*chunk_graph([image, text], [x, y], [3, 3]))
    loss.backward()
    expected = gradients(image, text)
    clear(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        GradCache([image, text], plain_infonce, chunk_size=3)(x, y)
    assert_same(gradients(image, text), expected)

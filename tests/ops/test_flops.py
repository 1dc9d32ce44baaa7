"""FlopCounterMode on our ops: it counts the products over the visible pairs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import (
    AttentionMask,
    FalseNegatives,
    additive_attention,
    attention,
    infonce,
    maxsim,
    sample_negatives,
    siglip,
    topk_similar,
)
from mmkernels.testing.contrastive import plain_infonce

N, M, E = 12, 20, 8


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def leaves(*shape, count=2):
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def test_dense_attention_counts_as_pytorchs():
    q, k, v = leaves(1, 32, 2, 16, count=3)

    def plain():
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    assert counted(lambda: attention(q, k, v)) == counted(plain)
    # The scores are recomputed; plain PyTorch keeps them.
    backward = counted(lambda: plain().sum().backward()) + counted(plain) // 2
    assert counted(lambda: attention(q, k, v).sum().backward()) == backward


@pytest.mark.parametrize("kind", ["packed", "cross_only"])
def test_only_visible_pairs_count(kind):
    q, k, v = leaves(32, 2, 16, count=3)
    cu = torch.tensor([0, 5, 5, 20, 32], dtype=torch.int32)
    modalities = (torch.arange(32) % 3 == 0).byte()
    mask = AttentionMask.packed(cu, causal=True) if kind == "packed" else AttentionMask.cross_only(cu, modalities)
    pairs = int(mask.to_dense(32, 32).sum())
    assert counted(lambda: attention(q, k, v, mask)) == 2 * pairs * 2 * (16 + 16)
    assert counted(lambda: attention(q, k, v, mask).sum().backward()) == 2 * pairs * 2 * 7 * 16
    w = torch.randn(2, 16)
    assert counted(lambda: additive_attention(q, k, v, w, mask)) == 2 * pairs * 2 * (16 + 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.randn(32, 2, 16)
        assert counted(lambda: attention(fake, fake, fake)) == 2 * 32 * 32 * 2 * 32


def test_losses():
    product = 2 * N * N * E
    (x, y), scale = leaves(N, E), torch.tensor(2.0, requires_grad=True)
    assert counted(lambda: infonce(x, y, scale)) == product
    # The logits are recomputed; plain PyTorch keeps them.
    assert counted(lambda: plain_infonce(x, y, scale).backward()) == 3 * product
    assert counted(lambda: infonce(x, y, scale).backward()) == 4 * product
    assert counted(lambda: siglip(x, y, scale, -1.0).backward()) == 4 * product
    assert counted(lambda: infonce(x, y.detach(), scale).backward()) == 3 * product
    assert counted(lambda: infonce(x.detach(), y.detach(), scale).backward()) == product
    assert counted(lambda: infonce(x, y, scale, label_smoothing=0.1).backward()) == 4 * product
    negatives = torch.randn(5, E)
    many = counted(lambda: infonce(x, y, scale, negatives=negatives))
    assert many == product + 2 * N * 5 * E
    guide = FalseNegatives(torch.randn(N, 3), torch.randn(N, 3))
    filtered = counted(lambda: infonce(x, y, scale, false_negatives=guide))
    assert filtered == 2 * (product + 2 * N * N * 3 + 2 * N * 3)
    of_teacher = counted(lambda: infonce(x, y, scale, teacher=(torch.randn(N, 3), torch.randn(N, 3), 0.5)))
    assert of_teacher == product + 2 * (2 * N * N * 3)
    keys = torch.randn(M, E)
    assert counted(lambda: topk_similar(x, keys, 3)) == counted(lambda: sample_negatives(x, keys, 1.0)) == 2 * N * M * E


def test_late_interaction():
    """The search multiplies every pair of tokens; gradients read each query token's winners, one of each document."""
    (x,), (y,) = leaves(N, E, count=1), leaves(M, E, count=1)
    cu_q, cu_k = torch.tensor([0, 5, N], dtype=torch.int32), torch.tensor([0, 3, 10, M], dtype=torch.int32)
    search, read = 2 * N * M * E, 2 * N * 3 * E
    assert counted(lambda: maxsim(x, y, cu_q, cu_k)) == search
    assert counted(lambda: maxsim(x, y, cu_q, cu_k).sum().backward()) == search + 2 * read
    assert counted(lambda: maxsim(x, y.detach(), cu_q, cu_k).sum().backward()) == search + read


def test_second_derivatives_count():
    (x, y), scale = leaves(N, E), torch.tensor(2.0)

    def penalty():
        (grad,) = torch.autograd.grad(infonce(x, y.detach(), scale), x, create_graph=True)
        grad.square().sum().backward()

    # forward, backward by x, and of the second derivatives the lse, its tangents, and the gradient's with four products
    assert counted(penalty) == (1 + 2 + (1 + 3 + 7)) * 2 * N * N * E


@pytest.mark.parametrize("first", ["mmkernels", "torch.utils.flop_counter"])
def test_either_import_may_come_first(first):
    """Importing mmkernels does not import FlopCounterMode, which would import Triton."""
    code = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "mmkernels")
import mmkernels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(4, 8)
with FlopCounterMode(display=False) as counter:
    mmkernels.infonce(x, x, 1.0)
assert counter.get_total_flops() == 2 * 4 * 4 * 8, counter.get_total_flops()
assert not any(type(finder).__module__ == "mmkernels.runtime.flops" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)

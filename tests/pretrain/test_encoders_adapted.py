"""Adapters: where they sit, that they start as nothing, and that the base keeps its names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretrain.packed import facts, shaken

from mmkernels import PackedBatch
from mmkernels.pretrain.encoders import Adapted, HashedWords, Patches, Words
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.views import Augment

TEXT = {"text": Stream(Words())}


def batch() -> PackedBatch:
    return PackedBatch.from_samples([torch.tensor([2, 38, 39, 3]), torch.tensor([2, 37, 3])])


def built(part: Any) -> Any:
    torch.manual_seed(0)
    return part.build(facts(TEXT))


def test_the_base_keeps_its_names_and_its_features() -> None:
    base, adapted = built(Words(layers=2)), built(Adapted(Words(layers=2), reduction=4))
    own = set(dict(adapted.named_parameters())) - set(dict(base.named_parameters()))
    places = [f"blocks.{i}.{layer}.adapter" for i in range(2) for layer in ("attention", "feed_forward")]
    assert own == {f"{at}.{way}.{what}" for at in places for way in ("down", "up") for what in ("weight", "bias")}
    assert adapted.blocks[0].attention.adapter.down.weight.shape == (4, 16)
    shaken(base)
    missing = adapted.double().load_state_dict(base.state_dict(), strict=False)
    assert set(missing.missing_keys) == own and not missing.unexpected_keys
    assert torch.equal(adapted(batch()), base(batch()))


def test_where_adapters_sit() -> None:
    """After attention and feed-forward, before each is added."""
    module, packed = shaken(built(Adapted(Words(layers=1), reduction=2))), batch()
    (block,) = module.blocks
    x, mask, positions = module.table(packed.tokens), module.layout(packed).mask(), packed.position_ids

    def adapted(layer: Any, y: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(layer.adapter.down(y), approximate="tanh")
        return y + layer.adapter.up(hidden)

    plain = built(Words(layers=1)).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "adapter" not in k})
    (bare,) = plain.blocks
    x = x + adapted(block.attention, bare.attention(bare.norm(x), mask, positions=positions))
    x = x + adapted(block.feed_forward, bare.feed_forward(x))
    torch.testing.assert_close(module(packed), x)


def test_a_copy_has_adapters_of_its_own() -> None:
    """As momentum twins and averages are made."""
    module = shaken(built(Adapted(Words(layers=1))))
    twin = copy.deepcopy(module)
    for name, parameter in twin.named_parameters():
        if "adapter" in name:
            parameter.data.zero_()
    assert not torch.equal(twin(batch()), module(batch()))


def test_it_passes_for_its_encoder() -> None:
    part = Adapted(Patches(size=16))
    assert Augment().fitted(part, None).size == 16  # type: ignore[arg-type,attr-defined]
    assert not part.reads_text and Adapted(Words()).reads_text and Adapted(Words(causal=True)).causal
    assert not hasattr(part, "causal")
    assert pickle.loads(pickle.dumps(part)) == part == copy.deepcopy(part)


@pytest.mark.parametrize("encoder", [HashedWords(layers=1, words=64, grams=64), Patches(layers=1, size=16)])
def test_other_encoders(encoder: Any) -> None:
    assert any("adapter" in name for name, _ in built(Adapted(encoder)).named_parameters())


def test_errors() -> None:
    with pytest.raises(ValueError, match="reduction: expected at least 1, got 0"):
        Adapted(Words(), reduction=0)
    with pytest.raises(ValueError, match="reduction: expected at most the width 16, got 32"):
        built(Adapted(Words(), reduction=32))
    with pytest.raises(ValueError, match="encoder: expected one with transformer blocks"):
        built(Adapted(Words(layers=0)))

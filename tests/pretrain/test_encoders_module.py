from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pretrain.small_model import TOKENIZER, Samples, built, collated, gradients, recipe
from torch import Tensor, nn

from mmkernels.pretrain.encoders import Module
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.wiring import leaves


class Rows(nn.Module):
    """[B, 3, 5] -> [B, 3, 4], a token per row; or [B, 4], their sum."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.linear, self.several = nn.Linear(5, 4), several

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x if self.several else x.sum(1)


def one() -> nn.Module:
    return Rows(several=False)


def several() -> nn.Module:
    return Rows(several=True)


def voices(encoder: Module) -> Recipe:
    return recipe(streams={"vector": Stream(encoder)}, objectives={"voice": Answer("vector", "voice")})


def vectors() -> Samples:
    random = np.random.default_rng(0)
    rows = [{"vector": random.standard_normal((3, 5)).astype(np.float32), "voice": i % 2} for i in range(4)]
    return Samples([rows[0], {"voice": 1}, *rows[1:]], classes={"voice": ("low", "high")})


@pytest.mark.parametrize(("factory", "tokens"), [(one, 1), (several, 3)])
def test_tokens_are_the_projected_output(factory: object, tokens: int) -> None:
    of, source = voices(Module(factory, out=4, tokens=tokens)), vectors()  # type: ignore[arg-type]
    model, batch = built(of, source), collated(of, source)
    encoder = model.encoder("vector").encoder
    values = torch.stack([torch.from_numpy(row["vector"]) for row in source.values if "vector" in row]).double()
    expected = encoder.project(encoder.module(values)).reshape(-1, 16)
    torch.testing.assert_close(encoder(batch["vector"]), expected)
    ends = encoder.layout(batch["vector"]).cu_seqlens_host
    assert ends == tuple(tokens * end for end in (0, 1, 1, 2, 3, 4))
    loss, whole = gradients(model, batch, 5)
    again, parts = gradients(model, batch, 2)
    torch.testing.assert_close(loss, again)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name)
    assert any("module.linear.weight" in name for name in whole)


def test_images() -> None:
    encoder = Module("torch.nn:Identity", size=8)
    shown = np.zeros((16, 12, 4), np.uint8)  # transparent
    plain, kept, none = encoder.prepare([shown, torch.zeros(3, 8, 8), None], TOKENIZER)
    assert plain.tokens.shape == (1, 3, 8, 8) and (plain.tokens == 1).all() and (kept.tokens == 0).all()
    assert none.tokens.shape == (0, 3, 8, 8)
    assert [encoder.length(value, TOKENIZER) for value in (shown, None, ...)] == [1, 0, 1]


def test_no_values_at_all() -> None:
    source = Samples([{"voice": 0}], classes={"voice": ("low", "high")})
    of = voices(Module(one, out=4))
    assert gradients(built(of, source), collated(of, source), 1)[0] == 0


def test_a_callable_is_stored_by_name() -> None:
    stored = json.dumps(leaves(voices(Module(one, out=4))), default=str)
    assert f'"streams.vector.encoder.factory": "{one.__module__}:one"' in stored


@pytest.mark.parametrize("factory", ["", "torch", "no_such_package:thing", "torch.nn:NoSuchLayer", "math:pi", dict])
def test_a_wrong_factory_is_named(factory: object) -> None:
    with pytest.raises(ValueError, match=r"factory: expected a callable that returns an nn\.Module"):
        built(voices(Module(factory)), vectors())  # type: ignore[arg-type]


def test_a_wrong_output_is_named() -> None:
    of, source = voices(Module(several, out=4, tokens=2)), vectors()
    with pytest.raises(ValueError, match=r"several: expected it to return \[4, 2, 4\], got \[4, 3, 4\]"):
        gradients(built(of, source), collated(of, source), 5)


def test_values_of_several_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"values: expected \[2\] torch.float32 like the first, got \[3\]"):
        Module(one).prepare([np.zeros(2, np.float32), np.zeros(3, np.float32)], TOKENIZER)
    with pytest.raises(ValueError, match="values: expected arrays of numbers, got str"):
        Module(one).prepare(["hum"], TOKENIZER)

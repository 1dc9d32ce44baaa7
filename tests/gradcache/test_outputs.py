"""get_rep: embeddings in an encoder's output of any kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import pytest
import torch
from gradcache.toys import Encoder, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.gradcache import Args
from mmkernels.testing.contrastive import plain_infonce


@dataclass
class Output:
    states: Tensor
    pooled: Tensor


class Tower(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.encoder, self.make = Encoder(dropout=0.3), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.encoder(x))


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda a: {"states": a[:, None], "pooled": a}, itemgetter("pooled")),
    "mapping with attributes": (lambda a: OrderedDict(states=a[:, None], pooled=a), lambda out: out["pooled"]),
    "dataclass": (lambda a: Output(a[:, None], a), attrgetter("pooled")),
    "tuple": (lambda a: (a[:, None], a), itemgetter(1)),
    "states": (lambda a: a[:, None].expand(-1, 3, -1), lambda states: states[:, 0]),
}


@pytest.mark.parametrize("how", ["call", "loss", "backward"])
@pytest.mark.parametrize("size", [3, 10, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_output(kind: str, size: Any, how: str) -> None:
    make, rep = KINDS[kind]
    tower, text, inputs = Tower(make), Encoder(), (torch.randn(10, 6), torch.randn(10, 6))

    def run(encoder: Any, how: str = "call", **options: Any) -> list[Tensor]:
        budget = {"memory_budget": 3000} if size == "auto" else {}
        cache = GradCache([encoder, text], plain_infonce, chunk_size=size, **options, **budget)
        clear(tower, text)
        torch.manual_seed(5)
        if how == "loss":
            cache.as_loss()(*inputs).backward()
        else:
            cache(*inputs)
        return gradients(tower, text)

    expected = run(tower.encoder)
    own = {"backward": torch.Tensor.backward} if how == "backward" else {}
    for get_rep in ([rep, None], lambda out: out if isinstance(out, Tensor) and kind != "states" else rep(out)):
        if kind == "states" and callable(get_rep):
            continue  # one for both would take the text's features apart
        actual = run(tower, how, get_rep=get_rep, **own)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_token_losses_get_whole_outputs() -> None:
    tower, x = Tower(KINDS["dict"][0]), torch.randn(10, 6)

    def token_loss(outputs: list[Any], inputs: list[Any]) -> tuple[Tensor, int]:
        return outputs[0]["states"].square().sum(), outputs[0]["states"].numel()

    cache = GradCache(
        [tower], lambda a: plain_infonce(a, a), chunk_size=4, token_loss_fn=token_loss, get_rep=itemgetter("pooled")
    )
    _, parts = cache(x)
    assert parts["token_loss"] > 0 and gradients(tower)


def test_an_encoder_that_writes_into_its_dict_keeps_no_activations() -> None:
    encoder, batch = Encoder(), {"x": torch.randn(8, 6)}

    def tower(features: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(features) == {"x"}
        features["pooled"] = encoder(features["x"])
        return features

    for given in (batch, Args(batch)):
        GradCache([tower], lambda a: plain_infonce(a, a), chunk_size=3, get_rep=itemgetter("pooled"))(given)
        assert set(batch) == {"x"}


def test_messages() -> None:
    x, towers = torch.randn(6, 6), [Tower(make) for make, _ in KINDS.values()]
    for tower in towers[:4]:
        with pytest.raises(
            TypeError, match=r"encoders\[0\]: output: expected .*\(get_rep finds it in an output of anot"
        ):
            GradCache([tower], lambda a: a.sum(), chunk_size=3)(x)
    with pytest.raises(
        TypeError, match=r"got \{'states': '\[3, 1, 8\] float32 on cpu', .*OrderedDict|\(dict\)"
    ) as found:
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3)(x)
    assert len(str(found.value)) < 300, "no values"
    with pytest.raises(
        TypeError, match=r"get_rep: output: expected a floating-point tensor \[rows, ...\], got 3 \(int\)"
    ):
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3, get_rep=lambda out: 3)(x)
    with pytest.raises(
        ValueError, match=r"get_rep\[0\]: output: expected a floating-point tensor \[rows, ...\], got \[\]"
    ):
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3, get_rep=[lambda out: out["pooled"].sum()])(x)
    with pytest.raises(TypeError, match=r"get_rep: expected None, a callable, or one per encoder, got 'pooled'"):
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3, get_rep="pooled")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"get_rep\[0\]: expected None or a callable, got 'pooled'"):
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3, get_rep=["pooled"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"get_rep: expected one for all, or one for each of the 1 encoders"):
        GradCache([towers[0]], lambda a: a.sum(), chunk_size=3, get_rep=[None, None])

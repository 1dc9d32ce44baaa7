"""open_clip's losses and ours, by one call: the same values and gradients, in one process and over ranks."""

from __future__ import annotations

import inspect
import warnings
from argparse import Namespace
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

open_clip = pytest.importorskip("open_clip")

from mmkernels.integrations import open_clip as ours  # noqa: E402  after the skip

pytestmark = pytest.mark.clients
NAMES = ("ClipLoss", "SigLipLoss", "DistillClipLoss", "CoCaLoss")
WITH_GRAD = {"local_loss": False, "gather_with_grad": True}


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def inputs_of(name: str, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model of open_clip hands to the loss: features of 12 rows, of which `rows` are taken."""
    images, texts = unit(12, 8, 1, dtype)[rows], unit(12, 8, 2, dtype)[rows]
    scale, bias = torch.tensor(14.3, dtype=dtype), torch.tensor(-9.5, dtype=dtype)
    inputs = {"image_features": images, "text_features": texts, "logit_scale": scale}
    if name in ("SigLipLoss", "ClipLoss"):
        inputs["logit_bias"] = bias
    if name == "DistillClipLoss":
        teacher = {
            "dist_image_features": unit(12, 6, 3, dtype)[rows],
            "dist_text_features": unit(12, 6, 4, dtype)[rows],
        }
        inputs |= {**teacher, "dist_logit_scale": torch.tensor(41.0, dtype=dtype)}
    if name == "CoCaLoss":
        generator = torch.Generator().manual_seed(5)
        inputs["logits"] = torch.randn(12, 5, 7, generator=generator, dtype=torch.float64).to(dtype)[rows]
        inputs["labels"] = torch.randint(7, (12, 5), generator=generator)[rows]
    learn = ("image_features", "text_features", "logit_scale", "logit_bias", "logits")
    return {key: value.clone().requires_grad_(key in learn) for key, value in inputs.items()}


def made(module: Any, name: str, **options: Any) -> Any:
    fixed = (2.0, 0.7) if name == "CoCaLoss" else ()
    return getattr(module, name)(*fixed, **options)


def values_and_gradients(loss: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = loss(**inputs, output_dict=True)
    sum(losses.values()).backward()
    grads = {f"d {key}": value.grad for key, value in inputs.items() if value.grad is not None}
    return {**{key: value.detach() for key, value in losses.items()}, **grads}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_one_process(name: str, dtype: torch.dtype, tolerance: float) -> None:
    both = [values_and_gradients(made(m, name), inputs_of(name, slice(12), dtype)) for m in (open_clip.loss, ours)]
    assert both[0].keys() == both[1].keys() and len(both[1]) >= 4
    for key, value in both[0].items():
        torch.testing.assert_close(both[1][key], value.to(both[1][key].dtype), rtol=tolerance, atol=tolerance)
    inputs = inputs_of(name, slice(12), dtype)
    plain = [made(m, name)(*inputs.values()) if name != "CoCaLoss" else None for m in (open_clip.loss, ours)]
    assert type(plain[0]) is type(plain[1])  # without output_dict, by position: a tensor, or a tuple of two


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_closer_to_float64_than_open_clips(name: str) -> None:
    inputs = inputs_of(name, slice(12), torch.bfloat16)  # the same numbers in both dtypes
    wide = {key: x.detach().double() if x.is_floating_point() else x for key, x in inputs.items()}
    wide = {key: x.requires_grad_(inputs[key].requires_grad) for key, x in wide.items()}
    exact = values_and_gradients(made(open_clip.loss, name), wide)
    low = {}
    for module in (open_clip.loss, ours):
        inputs = inputs_of(name, slice(12), torch.bfloat16)
        low[module] = values_and_gradients(made(module, name), inputs)
    for key in ("contrastive_loss", "d image_features", "d text_features"):
        theirs, found = ((low[module][key].double() - exact[key]).abs().max() for module in (open_clip.loss, ours))
        assert found <= theirs, key


@pytest.mark.parametrize("name", NAMES)
def test_constructors_and_calls_are_open_clips(name: str) -> None:
    own, theirs = getattr(ours, name), getattr(open_clip.loss, name)
    assert issubclass(own, theirs)
    asked, given = (inspect.signature(cls.forward).parameters for cls in (theirs, own))
    assert list(asked) == list(given)
    assert [p.default for p in asked.values()] == [p.default for p in given.values()]
    options = {p: False for p in inspect.signature(theirs).parameters if "loss_weight" not in p}
    options |= {"rank": 0, "world_size": 1, "pad_id": 0, "dist_impl": None, "chunk_size": 0}
    accepted = inspect.signature(theirs).parameters
    loss = made(ours, name, **{key: value for key, value in options.items() if key in accepted})
    assert loss.world_size == 1 and not list(loss.parameters()) and not loss.state_dict()


class Towers(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.image = torch.nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64))
        self.text = torch.nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.6, dtype=torch.float64))
        self.logit_bias = None
        if name in ("SigLipLoss", "ClipLoss"):
            self.logit_bias = torch.nn.Parameter(torch.tensor(-9.5, dtype=torch.float64))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {key: value.detach() for key, value in inputs.items()}
        out["image_features"] = F.normalize(out["image_features"] @ self.image, dim=-1)
        out["text_features"] = F.normalize(out["text_features"] @ self.text, dim=-1)
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out


def a_step(rank: int, world: int, name: str, whose: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of a rank, and the gradients of its encoder after DistributedDataParallel's mean."""
    model = DistributedDataParallel(Towers(name)) if world > 1 else Towers(name)
    module = ours if whose == "ours" else open_clip.loss
    own = slice(12 // world * rank, 12 // world * (rank + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = made(module, name, rank=rank, world_size=world, **options)
    losses = loss(**model(inputs_of(name, own, torch.float64)), output_dict=True)
    sum(losses.values()).backward()
    grads = {key.removeprefix("module."): p.grad for key, p in model.named_parameters()}
    return {**{key: value.detach() for key, value in losses.items()}, **grads}


CALLS = [(name, WITH_GRAD) for name in NAMES if name != "SigLipLoss"]
CALLS += [("SigLipLoss", {"dist_impl": each}) for each in (None, "bidir", "shift", "reduce", "gather")]


@pytest.mark.parametrize(
    ("name", "options"), CALLS, ids=lambda x: x if isinstance(x, str) else str(x.get("dist_impl", ""))
)
@pytest.mark.parametrize("world", [2, 4])
def test_over_ranks(name: str, options: dict[str, Any], world: int) -> None:
    """The gradients of open_clip's losses that gather with gradients, and on every rank the loss of one process."""
    alone = a_step(0, 1, name, "theirs", {})
    theirs, found = (ranks.run(world, a_step, name, whose, options) for whose in ("theirs", "ours"))
    for their, of_rank in zip(theirs, found, strict=True):
        for key, value in alone.items():
            if key == "caption_loss":
                continue  # of the rank's own rows, as in open_clip
            torch.testing.assert_close(of_rank[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
            if key == "logit_bias" and name == "ClipLoss":
                continue  # 0 up to rounding in open_clip's
            if not key.endswith("_loss"):
                torch.testing.assert_close(of_rank[key], their[key], rtol=1e-12, atol=1e-12)


def test_without_gradients_of_gathered_features_open_clips_are_a_wth() -> None:
    """The factor that docs/how-to/open_clip.md names."""
    options = {"local_loss": False, "gather_with_grad": False}
    theirs, found = (ranks.run(2, a_step, "ClipLoss", whose, options)[0] for whose in ("theirs", "ours"))
    for key in ("image", "text"):
        torch.testing.assert_close(found[key], 2 * theirs[key], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["logit_scale"], theirs["logit_scale"], rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match=r"gather_with_grad: False .* open_clip's own are 1/2 of these"):
        ours.ClipLoss(world_size=2)
    with pytest.warns(UserWarning, match=r"open_clip's own lack the part that other ranks' features have"):
        ours.ClipLoss(local_loss=True, world_size=2)


def test_patched_replaces_what_open_clip_constructs() -> None:
    common = {"local_loss": False, "gather_with_grad": True, "rank": 0, "world_size": 1, "horovod": False}
    common |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0, "loss_dist_impl": "gather"}
    kinds = {
        "ClipLoss": Namespace(distill=False, siglip=False, model="ViT-B-32", **common),
        "SigLipLoss": Namespace(distill=False, siglip=True, model="ViT-B-32", **common),
        "DistillClipLoss": Namespace(distill=True, siglip=False, model="ViT-B-32", **common),
        "CoCaLoss": Namespace(distill=False, siglip=False, model="coca_ViT-B-32", **common),
    }
    before = {name: getattr(open_clip.loss, name) for name in kinds}
    with ours.patched():
        for name, args in kinds.items():
            assert type(open_clip.create_loss(args)) is getattr(ours, name)
            assert getattr(open_clip, name, getattr(ours, name)) is getattr(ours, name)
            assert getattr(open_clip.loss, name) is getattr(ours, name)  # imported late by the tasks
        with ours.patched():  # within itself
            assert type(open_clip.create_loss(kinds["ClipLoss"])) is ours.ClipLoss
        assert type(open_clip.create_loss(kinds["ClipLoss"])) is ours.ClipLoss
    assert {name: getattr(open_clip.loss, name) for name in kinds} == before
    assert type(open_clip.create_loss(kinds["SigLipLoss"])) is before["SigLipLoss"]
    with pytest.raises(KeyError, match="mine"), ours.patched():
        raise KeyError("mine")
    assert open_clip.loss.ClipLoss is before["ClipLoss"]


def test_errors() -> None:
    inputs = inputs_of("ClipLoss", slice(12), torch.float32)
    with pytest.raises(ValueError, match="world_size: expected 1, the ranks of the default process group, got 2"):
        ours.ClipLoss(world_size=2, gather_with_grad=True)(**inputs)
    if "use_horovod" in inspect.signature(open_clip.loss.ClipLoss).parameters:
        with pytest.raises(ValueError, match="use_horovod: expected False"):
            ours.ClipLoss(use_horovod=True)
    of_teacher = inputs_of("DistillClipLoss", slice(12), torch.float32)
    of_teacher["dist_text_features"].requires_grad_()
    with pytest.raises(ValueError, match="dist_text_features: expected a tensor without gradient"):
        ours.DistillClipLoss()(**of_teacher)
    with pytest.raises(ValueError, match="keys"):
        ours.ClipLoss()(inputs["image_features"], inputs["text_features"][:5], inputs["logit_scale"])


def test_autocast_accepts_two_dtypes() -> None:
    """As a product under autocast does: a tower that casts beside one that does not."""
    images, texts = unit(12, 8, 1, torch.float32), unit(12, 8, 2, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.ClipLoss()(images, texts, torch.tensor(10.0))
    torch.testing.assert_close(loss, ours.ClipLoss()(images, texts.float(), torch.tensor(10.0)))
    with pytest.raises(TypeError, match=r"keys: expected float32 like queries, got .* bfloat16"):
        ours.ClipLoss()(images, texts, torch.tensor(10.0))

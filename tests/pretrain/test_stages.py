"""Stages: what learns, how fast, by which objectives, how deep; and runs that begin with another's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.packed import facts, shaken, tokens

from mmkernels.pretrain import Config, Recipe, Stage, Stream, checkpoint, load_model, loop, train
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objectives import Contrast, MaskedTokens
from mmkernels.pretrain.recipe import Ramp
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError
from mmkernels.pretrain.schedule import check_stages, freeze, learns, stage_at, weights_at
from mmkernels.pretrain.views import MaskWords
from mmkernels.pretrain.warm_start import warm_start

Make = Callable[..., Config]

STREAMS = {
    "text": Stream(Words(layers=1)),
    "masked": Stream(Words(layers=1), field="text", views=(MaskWords(),), tied="text"),
}
RECIPE = Recipe(
    "",
    "",
    "",
    STREAMS,
    {"contrast": Contrast("text", "masked"), "words": MaskedTokens("masked")},
    fusion=Cross(("masked",), "text", layers=2),
)


def with_stages(*stages: Stage) -> Recipe:
    return dataclasses.replace(RECIPE, stages=stages)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(RECIPE, facts(STREAMS))


def learning(model: Model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_patterns(model: Model) -> None:
    every = {name for name, _ in model.named_parameters()}
    freeze(model, Stage(trainable=("fusion.*",)))
    assert learning(model) == {name for name in every if name.startswith("fusion.")} != set()
    freeze(model, Stage(trainable=("*", "!fusion.layers.0.*")))
    assert learning(model) == {name for name in every if not name.startswith("fusion.layers.0.")} != every
    assert not learns("a.b", ("!a.*", "*")), "the order does not matter"
    assert not learns("a.b", ("!c.*",)), "nothing learns unless a pattern says so"
    freeze(model, Stage())
    assert learning(model) == every


def test_the_stage_of_a_step() -> None:
    recipe = with_stages(Stage(until=2), Stage(until=5, lr_scale=0.5), Stage(lr_scale=0.1))
    assert [stage_at(recipe, step).lr_scale for step in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1]
    skipped = with_stages(Stage(until=0), Stage(lr_scale=0.1))
    assert stage_at(skipped, 0).lr_scale == 0.1


def test_objectives_of_a_stage() -> None:
    recipe = with_stages(Stage(until=2, objectives=("contrast",)), Stage())
    assert [set(weights_at(recipe, 0, step)) for step in (1, 2)] == [{"contrast"}, {"contrast", "words"}]
    ramp = dataclasses.replace(RECIPE, objectives={"contrast": Contrast(weight=Ramp(0.0, 1.0, 5))})
    with pytest.raises(ValueError, match="a weight above 0 at step 0"):
        weights_at(ramp, 0, 0)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(), Stage()), r"stages\[0\]: until: expected a step"),
        ((Stage(until=5), Stage(until=3)), r"stages\[1\]: until: expected at least 5, .* got 3"),
        ((Stage(until=-1), Stage()), r"stages\[0\]: until: expected at least 0"),
        ((Stage(lr_scale=0.0),), "lr_scale: expected a positive number"),
        ((Stage(objectives=("word",)),), "objectives: expected some of contrast, words, got word"),
        ((Stage(objectives=()),), "objectives: expected some of .* got none"),
        ((Stage(fusion_depth=3),), "fusion_depth: expected 0 to 2 layers, got 3"),
        ((Stage(fusion_depth=-1),), "fusion_depth: expected 0 to 2 layers, got -1"),
        ((Stage(until=9), Stage(trainable=("adapter*",))), "'adapter.', which fits none"),
        ((Stage(trainable=("*", "!*")),), "trainable: expected something to learn"),
    ],
)
def test_wrong_stages_are_refused_at_once(model: Model, stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stages(with_stages(*stages), model)


def test_checking_freezes_nothing(model: Model) -> None:
    check_stages(with_stages(Stage(trainable=("fusion.*",))), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fusion_of_no_layers_is_the_identity() -> None:
    fusion, found = shaken(RECIPE.fusion.build(facts(STREAMS))), {"text": tokens((3, 2)), "masked": tokens((1, 4), 1)}
    fusion.depth = 0
    assert torch.equal(fusion(found)["masked"].x, found["masked"].x)
    fusion.depth = 1
    one = fusion(found)["masked"].x
    fusion.depth = None
    assert not torch.equal(one, fusion(found)["masked"].x)
    del fusion.layers[1]
    assert torch.equal(one, fusion(found)["masked"].x)


FILE = """
from mmkernels.pretrain.encoders import Adapted, HashedWords, Patches, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Contrast, Matching
from mmkernels.pretrain.recipe import Recipe, Shape, Stage, Stream
from mmkernels.pretrain.state import Ema

RECIPE = Recipe(
    "", "", "",
    {"image": Stream(Patches(layers=1, size=16), teacher=Ema()), "text": Stream(%s, teacher=Ema())},
    {"contrast": Contrast("image", "text", distil=0.1), %s},
    fusion=%s,
    metrics=(Retrieval("image", "text"),),
    model=Shape(width=16, heads=2, embed_dim=8),
    stages=(%s,),
)
"""
WORDS = "Words(layers=1)"
PLAIN = (WORDS, "", "None", "Stage()")


@pytest.fixture
def run(tiny: Make, tmp_path: Path) -> Callable[..., RunFolder]:
    """Train a recipe on the pictures, in a folder of this name."""

    def make(name: str, *parts: str, **changes: Any) -> RunFolder:
        path = tmp_path / f"{name}.py"
        path.write_text(FILE % parts, encoding="utf-8")
        options = {"parts": {}, "vocabulary": 310, "eval_every": 0, "steps": 4, "run": tmp_path / name, **changes}
        return train(tiny(recipe=str(path), **options)).folder

    return make


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint.load_weights(checkpoint.steps_in(folder.checkpoints)[step])
    return {name.removeprefix("model."): w for name, w in found.items() if name.startswith("model.")}


def test_a_run_in_stages(run: Callable[..., RunFolder]) -> None:
    """What is frozen stays bit for bit, and the learning rate, the losses and the depth follow the stage."""
    stages = (
        'Stage(until=3, trainable=("streams.image.*", "objectives.*"), objectives=("contrast",), fusion_depth=0),'
        'Stage(until=6, trainable=("fusion.layers.0.*", "objectives.*"), lr_scale=0.5, fusion_depth=1),'
        "Stage()"
    )
    folder = run(
        "stages", WORDS, '"matching": Matching("image", "text")', "Cross(layers=2)", stages,
        steps=9, keep_checkpoints=9, ema=0.5, warmup=0,
    )  # fmt: skip
    before, middle, after = (weights(folder, step) for step in (3, 6, 9))

    def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str) -> bool:
        return any(not torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))

    assert not moved(before, middle, "streams.") and moved(middle, after, "streams.text.")
    assert moved(before, middle, "fusion.layers.0.") and not moved(before, middle, "fusion.layers.1.")
    assert moved(middle, after, "fusion.layers.1.")
    steps = folder.records("step")
    assert ["matching/loss" in record for record in steps] == [False] * 3 + [True] * 6
    whole = [0.5 * 1.5e-3 * (1 + torch.tensor(torch.pi * step / 9).cos().item()) for step in range(9)]
    assert [r["lr"] for r in steps] == pytest.approx([lr * (0.5 if 3 <= i < 6 else 1) for i, lr in enumerate(whole)])


def test_a_model_is_as_deep_as_it_was(run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        WORDS,
        '"matching": Matching("image", "text")',
        "Cross(layers=2)",
        "Stage(until=4, fusion_depth=1), Stage()",
    )
    folder = run("short", *parts, steps=4)
    model = load_model(folder.path).model
    assert model.fusion is not None and model.fusion.depth == 1
    depths: list[int | None] = []
    monkeypatch.setattr(loop, "write_report", lambda _, trainer: depths.append(trainer.trained.fusion.depth))
    run("short", *parts, steps=4, resume=True, ema=0.0)  # which has nothing left to do but its report
    assert depths == [1]


def test_warm_start(run: Callable[..., RunFolder]) -> None:
    """Names that fit are loaded, twins and average follow, the tokenizer comes along, and the log says so."""
    first = run("first", *PLAIN, steps=3)
    adapted = ("Adapted(Words(layers=1))", "", "None", 'Stage(trainable=("*.adapter.*",))')
    second = run("second", *adapted, init=first.path, steps=3, ema=0.9, vocabulary=400)
    assert second.tokenizer.read_text(encoding="utf-8") == first.tokenizer.read_text(encoding="utf-8")
    old, new = weights(first, 3), weights(second, 3)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items()), "they are frozen"
    whole = checkpoint.load_weights(checkpoint.steps_in(second.checkpoints)[3])
    twins = {n.removeprefix("twins.of.image.module."): w for n, w in whole.items() if n.startswith("twins.of.image.")}
    assert twins and all(torch.allclose(w, old[f"streams.image.{name}"]) for name, w in twins.items())
    (record,) = second.records("init")
    assert record["run"] == str(first.path) and record["of_step"] == 3
    assert set(record["loaded"]) == set(old) and not record["unused"]
    assert set(record["fresh"]) == set(new) - set(old) and all(".adapter." in name for name in record["fresh"])


def test_a_resumed_run_does_not_begin_again(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    first = run("first", *PLAIN, steps=3)
    whole = run("whole", *PLAIN, init=first.path, steps=6)
    again = run("again", *PLAIN, init=first.path, steps=6)
    (again.checkpoints / "step-00000006").rename(tmp_path / "lost")  # as if it had been killed after step 3
    first.checkpoints.rename(tmp_path / "gone")
    resumed = run("again", *PLAIN, init=first.path, steps=6, resume=True)
    assert all(torch.equal(w, weights(resumed, 6)[name]) for name, w in weights(whole, 6).items())
    assert len(resumed.records("init")) == 1


def test_warm_starts_that_cannot_be(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    first = run("first", *PLAIN, steps=1)
    with pytest.raises(RunFolderError, match=r"no config\.json"):
        run("nothing", *PLAIN, init=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"parameters are called as this model's, such as weight, bias, got .*first"):
        warm_start(torch.nn.Linear(2, 2), first.path)
    wide = WORDS + ', project="mlp"'
    with pytest.raises(ValueError, match=r"init: expected tensors of this model's shapes, .*streams\.text\.project"):
        run("wide", wide, "", "None", "Stage()", init=first.path)
    first.checkpoints.rename(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        run("empty", *PLAIN, init=first.path)

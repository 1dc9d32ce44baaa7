"""`mmkernels evaluate`: which measures fit, what they find on a trained run, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.small_model import Samples
from pretrain.test_recipes import small, trainer_of

from mmkernels.cli import main
from mmkernels.pretrain import Config, train
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.evaluate_cli import Evaluation, evaluate_run
from mmkernels.pretrain.measures import TASKS, Subject, group_labels, measures
from mmkernels.pretrain.metrics import (
    Captioning,
    Figure,
    Groups,
    LinearProbe,
    Matched,
    Predictions,
    Reranked,
    Retrieval,
)
from mmkernels.pretrain.recipes import names
from mmkernels.pretrain.setup import open_source

FITS = {
    "albef": "retrieval zero-shot alignment probe neighbours predictions classes groups perplexity ablation",
    "audioclip": "retrieval zero-shot alignment probe neighbours groups",
    "gpt": "probe neighbours predictions classes perplexity",
    "mae": "probe neighbours reconstruction",
    "relation": "predictions classes groups ablation",
    "uniter": "retrieval predictions classes groups perplexity ablation",
    "vqa": "probe neighbours predictions classes groups perplexity ablation",
}


def subject(name: str, run: Path) -> tuple[Subject, Any]:
    trainer = trainer_of(small(name, run))
    train = next(iter(trainer.held_out.values())).train
    return Subject(trainer.recipe, trainer.model, train, (), tuple(group_labels(train))), trainer


@pytest.mark.parametrize("name", names())
def test_every_recipe_has_measures_that_fit(name: str, tmp_path: Path) -> None:
    of, _ = subject(name, tmp_path)
    found = measures(of)
    assert set(of.recipe.metrics) <= set(found) and len(set(found)) == len(found)
    fits = [task for task, make in TASKS.items() if list(make(of))]
    assert fits and (name not in FITS or fits == FITS[name].split())


@pytest.mark.parametrize("name", FITS)
def test_each_gives_figures_beside_chance(name: str, tmp_path: Path) -> None:
    of, trainer = subject(name, tmp_path)
    split, held_out = next(iter(trainer.held_out.items()))
    trainer.begin()
    memory: dict[tuple[str, ...], Any] = {}
    for metric in measures(of):
        for figure in evaluate(trainer.model, [metric], {split: held_out}, memory)[split]:
            assert figure.chance is not None, figure.name
            assert figure.low is None or figure.high is None or figure.low <= figure.high


def test_pairs_that_no_objective_contrasts_share_the_space(tmp_path: Path) -> None:
    of, _ = subject("audioclip", tmp_path)
    assert set(of.pairs()) == {("image", "text", ""), ("image", "audio", ""), ("text", "audio", "")}
    of, _ = subject("cca", tmp_path)
    assert list(of.pairs()) == [("image", "text", "correlation")]
    of, _ = subject("simclr", tmp_path)
    assert not list(of.pairs()), "two views of one field"


BOTH = """
import dataclasses
from mmkernels.pretrain.metrics import Groups, Retrieval
from mmkernels.pretrain.objectives import Correlation
from mmkernels.pretrain.recipes import load
clip = load("clip")
METRICS = (Retrieval(), Retrieval(through="correlation"))
OBJECTIVES = {**clip.objectives, "correlation": Correlation("image", "text")}
RECIPE = dataclasses.replace(clip, objectives=OBJECTIVES, metrics=METRICS)
"""


def test_figures_through_several_objectives_have_names_of_their_own(tmp_path: Path) -> None:
    """Where one compares a pair, its name is not said."""
    (tmp_path / "both.py").write_text(BOTH, encoding="utf-8")
    config = small(str(tmp_path / "both.py"), tmp_path / "run")
    trainer = trainer_of(dataclasses.replace(config, parts={**config.parts, "model.embed_dim": 4}))
    train = next(iter(trainer.held_out.values())).train
    of = Subject(trainer.recipe, trainer.model, train, (), ("group",))
    split, held_out = next(iter(trainer.held_out.items()))
    metrics = measures(of, ("retrieval", "alignment", "groups"))
    names_ = [figure.name for figure in evaluate(trainer.model, metrics, {split: held_out})[split]]
    assert len(set(names_)) == len(names_)
    for name in ("image → text R@10", "image, text: alignment", "text: uniformity"):
        assert name in names_ and f"correlation: {name}" in names_
    of, trainer = subject("cca", tmp_path)
    held_out = next(iter(trainer.held_out.values()))
    assert (
        evaluate(trainer.model, [Retrieval(through="correlation")], {"x": held_out})["x"][0].name == "image → text R@1"
    )


def test_what_the_recipe_measures_is_not_measured_again(tmp_path: Path) -> None:
    """Though with other settings, or a pair the other way round."""
    of, _ = subject("caption", tmp_path)
    assert [metric for metric in measures(of) if isinstance(metric, Captioning)] == [
        metric for metric in of.recipe.metrics if isinstance(metric, Captioning)
    ]
    assert [m.limit for m in measures(of, ("captions",))] == [500]
    of, _ = subject("audioclip", tmp_path)
    pairs = [{m.a, m.b} for m in measures(of) if isinstance(m, Retrieval)]
    assert len(pairs) == 3 and all(pairs.count(pair) == 1 for pair in pairs)
    of, _ = subject("vqa", tmp_path)
    own = (Predictions("answer"), Groups(Predictions("answer"), "kind", least=3), LinearProbe("image", limit=9))
    found = measures(dataclasses.replace(of, recipe=dataclasses.replace(of.recipe, metrics=own), labels=("kind",)))
    assert found[:3] == list(own) and Groups(Predictions("answer"), "kind") not in found
    assert [m.label for m in found if isinstance(m, LinearProbe) and m.stream == "image"] == ["", "kind"]
    assert Predictions("words") in found, "of another objective"


def test_a_limit_reaches_what_judges_pair_by_pair(tmp_path: Path) -> None:
    """Recalls of one table are among as many answers."""
    of, trainer = subject("albef", tmp_path)
    assert [m.limit for m in measures(of) if isinstance(m, Reranked)] == [Reranked().limit], "of the recipe's own"
    assert [m.limit for m in measures(of, (), 300) if isinstance(m, Reranked)] == [300]
    assert [m.limit for m in measures(of, ("retrieval",), 9) if isinstance(m, Reranked)] == [9]
    split, held_out = next(iter(trainer.held_out.items()))
    trainer.begin()
    few = {split: dataclasses.replace(held_out, limit=300, source=held_out.train)}
    chances = {
        f.name: f.chance
        for metric in measures(of, ("retrieval",), 300)
        for f in evaluate(trainer.model, [metric], few)[split]
    }
    assert chances["image → text, re-ranked R@1"] == chances["image → text R@1"]
    of, _ = subject("uniter", tmp_path)
    assert {m.limit for m in measures(of, (), 600) if isinstance(m, Matched)} == {600}


def test_texts_are_known_by_the_first_sample_that_has_one(tmp_path: Path) -> None:
    of, _ = subject("clip", tmp_path)
    rows: list[dict[str, Any]] = [{"image": ...}] * 30 + [{"image": ..., "text": "a cat"}]
    assert dataclasses.replace(of, train=Samples(rows)).reads_text("text")
    assert not dataclasses.replace(of, train=Samples(rows)).reads_text("image")
    for none in (rows[:30], []):
        assert not dataclasses.replace(of, train=Samples(none)).reads_text("text")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vqa of one step."""
    path = tmp_path_factory.mktemp("run") / "vqa"
    train(small("vqa", path, steps=1))
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    status = main(["evaluate", *map(str, args)])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    status, out, _ = evaluated(
        capsys, run, "--task", "predictions", "groups", "--split", "drawings", "--groups", "kind", "--limit", "60",
        "--json", path, "--threads", "1",
    )  # fmt: skip
    assert status == 0
    assert out.splitlines()[0] == "drawings" and "combinations" not in out
    assert "answer: accuracy, kind where" in out and "vendor" not in out
    stored = json.loads(path.read_text("utf-8"))
    assert stored["options"]["limit"] == 60
    figures = {figure["name"]: figure for figure in stored["figures"]["drawings"]}
    kinds = [f for name, f in figures.items() if name.startswith("answer: accuracy, kind ")]
    assert len(kinds) == 5 and all(f["low"] <= f["value"] <= f["high"] for f in kinds)
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--task", "recall"), "task: expected some of retrieval, zero-shot"),
        (("--task", "retrieval"), r"task: expected some that fit the recipe and its data \(probe, .*\), got retrieval"),
        (("--split", "A"), "split: expected some of held_out, combinations, drawings, got A"),
        (("--groups", "vendor"), r"groups: expected labels of the data \(.*kind.*\), got 'vendor'"),
        (("--labels", "colour"), "labels: expected labels of the data"),
        (("--data", "emoji"), "data: expected a data set with the field 'question'"),
        (("--data", "motion"), "data: expected a data set with the field 'image'"),
    ],
)
def test_refusals(run: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str) -> None:
    status, _, err = evaluated(capsys, run, *args)
    assert status == 1
    assert err.startswith("mmkernels evaluate: ")
    assert re.search(message, err), err


def test_classes_that_were_not_learned(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    classes = json.loads((other / "classes.json").read_text("utf-8"))
    classes["answer"][0] = "maybe"
    (other / "classes.json").write_text(json.dumps(classes), "utf-8")
    _, _, err = evaluated(capsys, other)
    assert "data: expected the classes of 'answer' that the run has learned" in err


def test_a_device_that_is_not_here(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("abacus", *([] if torch.cuda.is_available() else ["cuda"])):
        status, _, err = evaluated(capsys, run, "--device", device)
        assert status == 1
        assert err.startswith(f"mmkernels evaluate: device: expected auto, or one that is here, got {device} (")
        assert main(["pretrain", "--recipe", "clip", "--device", device, "--run", str(tmp_path / "run")]) == 1
        assert (
            f"mmkernels pretrain: device: expected auto, or one that is here, got {device} (" in capsys.readouterr().err
        )
        assert not (tmp_path / "run").exists()


def test_figures_that_are_no_numbers_are_null(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Figure("loss", math.nan, math.inf, low=0.5, high=1.0)]
    monkeypatch.setattr("mmkernels.pretrain.evaluate_cli.evaluate_run", lambda options: {"held_out": found})
    path = tmp_path / "figures.json"
    assert evaluated(capsys, run, "--json", path)[0] == 0

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (figure,) = json.loads(path.read_text("utf-8"), parse_constant=refused)["figures"]["held_out"]
    assert (figure["value"], figure["chance"], figure["low"], figure["high"]) == (None, None, 0.5, 1.0)


@pytest.fixture
def captioned(pictures: Path) -> Path:
    """Each picture in three rows, with a caption and two labels each."""
    rows = [json.loads(line) for line in (pictures / "captions.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["colour"] = row["caption"].split()[1]
    views = [
        {**row, "caption": f"{row['caption']}, view {i}", "view": i, "sure": row["colour"] if i else None}
        for row in rows
        for i in range(3)
    ]
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, views)), "utf-8")
    return pictures


def figures_of(run: Path, **options: Any) -> dict[str, Figure]:
    return {figure.name: figure for figure in evaluate_run(Evaluation(run, **options))["held_out"]}


def test_labels_leave_the_samples_as_they_are(captioned: Path, tiny: Callable[..., Config]) -> None:
    """An image with all of its captions stays one, with the label that its rows agree in."""
    train(tiny(steps=1, eval_fraction=0.5))
    run = tiny().folder
    plain = figures_of(run)
    for options in ({"labels": ("colour",)}, {"labels": ("sure",)}, {"groups": ("colour",)}):
        found = figures_of(run, **options)
        assert plain.items() <= found.items()
    found = figures_of(run, labels=("colour",), groups=("colour",))
    assert found["image: colour by a linear probe"].chance is not None
    assert "image → text R@10, colour red" in found
    with pytest.raises(
        ValueError, match=r"labels: expected one view of each image, .* got '0' and '1' in rows of red-"
    ):
        figures_of(run, labels=("view",))
    with pytest.raises(ValueError, match=r"captions.jsonl: expected values .* got none in 'weight'"):
        figures_of(run, labels=("weight",))


def test_rows_that_a_run_has_learned_from_stay_rows(captioned: Path, tiny: Callable[..., Config]) -> None:
    """It has read a label itself: each row is a sample, and may differ in others."""
    train(tiny(steps=1, eval_fraction=0.5, labels=("colour",)))
    run = tiny().folder
    plain, found = figures_of(run, labels=("colour",)), figures_of(run, labels=("view",))
    assert found["image → text R@10"] == plain["image → text R@10"]
    assert "image: view by a linear probe" in found


def test_a_mixture_whose_samples_would_change(captioned: Path, tiny: Callable[..., Config]) -> None:
    run = tiny().folder
    train(tiny(steps=1, data=f"emoji::folder:{captioned}", eval_limit=12))
    with pytest.raises(ValueError, match=r"labels: expected none .* samples of emoji::.* got colour; --data"):
        evaluate_run(Evaluation(run, labels=("colour",), limit=12))
    found = evaluate_run(Evaluation(run, labels=("group",), task=("zero-shot",), split=("emoji: A",), limit=12))
    assert "image: group by its name" in [figure.name for figure in found["emoji: A"]]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = evaluated(capsys, tmp_path)
    assert status == 1 and "holds no run" in err


def test_validation_holds_out_training_concepts(tiny: Callable[..., Config]) -> None:
    """Settings are chosen without a look at what they will be judged by."""
    whole, tuned = open_source(tiny()), open_source(tiny(validate=True))
    learned, held = set(tuned.train.concepts.tolist()), set(tuned.held_out["validation"].concepts.tolist())
    assert list(tuned.held_out) == ["validation"] and held and not held & learned
    assert held | learned == set(whole.train.concepts.tolist())
    assert open_source(tiny(validate=True, eval_limit=1)).held_out["validation"].concepts.shape == (1,)
    mixed = open_source(Config.of("clip", data="emoji::scenes", data_weights=(3.0, 1.0), validate=True))
    assert mixed.train.shares is not None
    assert not set(mixed.train.concepts.tolist()) & set(mixed.held_out["validation"].concepts.tolist())


@pytest.mark.parametrize(
    ("recipe", "without", "parts", "message"),
    [
        ("clip", ("audio",), {}, "expected some of the streams image, text, got 'audio'"),
        ("clip", ("text",), {}, r"some objective does not need, got text \(contrast reads image, text\)"),
        ("vqa", ("question", "text"), {}, r"got question, text \(answer reads question; words reads text\)"),
        ("vqa", ("question",), {"objectives.words.weight": 0.0}, r"got question \(answer reads question\)"),
    ],
)
def test_what_cannot_learn_without(recipe: str, without: tuple[str, ...], parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"without: .*{message}"):
        open_source(Config.of(recipe, without=without, parts=parts))
    open_source(Config.of("vqa", without=("image",)))


def test_questions_without_captions_or_kinds(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Your own questions need no captions, said so, and no column that only a metric would read."""
    images = sorted(path.name for path in pictures.glob("*.png"))
    rows = [{"image": name, "question": f"what is {name}?", "answer": name[:3]} for name in images]
    table = pictures / "captions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    config = small("vqa", tmp_path / "run", steps=1, data=f"folder:{pictures}", eval_fraction=0.3)
    with pytest.raises(ValueError, match=r"the field 'text', which .* has image, question, .*: --without text\)"):
        open_source(config)
    config = dataclasses.replace(config, without=("text",))
    figures = {f["name"] for record in train(config).folder.records("eval") for f in record["figures"]}
    assert "answer: accuracy" in figures and not any("kind" in name for name in figures)
    assert "has no label 'kind': metrics.Groups is not measured" in capsys.readouterr().err
    table.write_text("\n".join(json.dumps({**row, "answer": None}) for row in rows), "utf-8")
    with pytest.raises(ValueError, match=r"the label 'answer', which objectives\.answer of recipe vqa reads"):
        open_source(config)

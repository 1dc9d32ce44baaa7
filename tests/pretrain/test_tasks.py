"""Tasks: what each keeps of every recipe, what it adds, what learns, and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch

from mmkernels.pretrain import Recipe, Stage, Transfer, recipes
from mmkernels.pretrain.encoders import Adapted
from mmkernels.pretrain.fusion import AdaptedFusion, Cross, Merged
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objectives import Answer, Contrast, Matching, NextToken
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.schedule import check_stages, learning
from mmkernels.pretrain.tasks import TASKS
from mmkernels.pretrain.transfer import transferred
from mmkernels.pretrain.unfreezing import stages_of


def on_meta(recipe: Recipe) -> Model:
    """For any data and vocabulary."""
    with torch.device("meta"):
        return Model(recipe, Facts(recipe.model, 300, defaultdict(lambda: ("a", "b", "c")), recipe.streams))


@cache
def given(name: str) -> dict[str, torch.Size]:
    """The parameters that a run of a recipe has."""
    return {key: parameter.shape for key, parameter in on_meta(recipes.load(name)).named_parameters()}


FITS = [
    ("albef", Transfer("answer"), {"image", "text"}),
    ("albef", Transfer("match"), {"image", "text"}),
    ("albef", Transfer("retrieve"), {"image", "text"}),
    ("mae", Transfer("classify", "tag"), {"image"}),
    ("mae", Transfer("classify", "tag", unfreeze="head:5,image"), {"image"}),
    ("clip", Transfer("retrieve", unfreeze="head:5,image:9,all"), {"image", "text"}),
    ("siglip", Transfer("classify", "tag", ("text",)), {"text"}),
    ("moco", Transfer("classify", "tag"), {"query"}),
    ("simclr", Transfer("classify", "tag"), {"a"}),
    ("simclr", Transfer("retrieve", unfreeze="head : 5, all"), {"a", "b"}),  # whose objective has no parameters
    ("cca", Transfer("retrieve", unfreeze="head:5,all"), {"image", "text"}),
    ("vqa", Transfer("answer", "colour"), {"image", "question"}),  # which learns without captions
    ("vqa", Transfer("caption"), {"image", "text"}),
    ("uniter", Transfer("answer", unfreeze="head:5,fusion:9,regions+text"), {"text", "regions"}),
    ("uniter", Transfer("match"), {"text", "regions"}),
    ("flamingo", Transfer("caption"), {"image", "text"}),
    ("gpt", Transfer("caption"), {"text"}),
    ("video", Transfer("answer", "action"), {"video", "question"}),
    ("audioclip", Transfer("retrieve", read=("audio", "text")), {"audio", "text"}),
    ("caption", Transfer("retrieve"), {"image", "text"}),  # whose projections are new
]


@pytest.mark.parametrize(("name", "transfer", "streams"), FITS)
def test_what_a_task_keeps(name: str, transfer: Transfer, streams: set[str]) -> None:
    made = transferred(recipes.load(name), transfer)
    model = on_meta(made)
    assert {stream for stream in made.streams if not (name == "moco" and made.streams[stream].tied)} == streams
    assert all(stream.teacher is None for stream in made.streams.values())
    check_stages(made, model)
    counts = [len(learning(model, stage)) for stage in made.stages]
    everything = len(list(model.parameters()))
    assert counts == sorted(counts) and (counts[0] == everything) == (transfer.unfreeze is None)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_goes_on_with_its_weights(name: str) -> None:
    """For each task that it allows: what is not the base's, by name and shape, is a head, a projection or an adapter;
    these and norms are all that learns; and the same task fits what has come of it."""
    base, allowed = recipes.load(name), 0
    for task in TASKS:
        alone = [(key,) for key, stream in base.streams.items() if not stream.tied]
        for read in alone if task == "classify" else [()]:
            for way in ({"probe": True}, {"adapters": 8}):
                transfer = Transfer(task, "tag" if task == "classify" else "", read, **way)  # type: ignore[arg-type]
                try:
                    made = transferred(base, transfer)
                except ValueError:
                    continue
                allowed, model = allowed + 1, on_meta(made)
                check_stages(made, model)
                own = {key: parameter.shape for key, parameter in model.named_parameters()}
                new = {key for key in own if own[key] != given(name).get(key)}
                assert all(
                    key.startswith("objectives.") or ".adapter." in key or key.split(".")[2] in ("norm", "project")
                    for key in new
                )
                (stage,) = made.stages
                learned = set(learning(model, stage))
                assert learned >= new
                assert len(learned) < len(own) or name == "devise", "all but the vectors of devise have weights"
                assert transfer.adapters is None or any(".adapter." in key for key in own)
                assert transferred(made, transfer).streams.keys() == made.streams.keys()
    assert allowed


def test_answer_keeps_streams_and_fusion() -> None:
    """albef: the masked twin of the text is gone, the text reads the question, momentum and masks are gone."""
    made = transferred(recipes.load("albef"), Transfer("answer"))
    kept = {name: (stream.field, stream.tied, stream.teacher) for name, stream in made.streams.items()}
    assert kept == {"image": ("", "", None), "text": ("question", "", None)}
    assert made.fusion == Cross(into=("text",), context="image", layers=2)
    assert made.objectives == {"answer": Answer("text", label="answer")}
    assert [type(v).__name__ for s in made.streams.values() for v in s.views] == ["Augment", "Captions"]
    assert made.stages == (Stage(),) and not made.draw


def test_what_the_other_tasks_learn() -> None:
    def objectives(name: str, *args: Any, **way: Any) -> dict[str, Any]:
        return dict(transferred(recipes.load(name), Transfer(*args, **way)).objectives)

    assert objectives("mae", "classify", "tag") == {"classes": Answer("image", label="tag", head="linear")}
    assert objectives("albef", "retrieve") == {"contrast": Contrast("image", "text")}
    assert objectives("audioclip", "retrieve", read=("audio", "text")) == {"audio_text": Contrast("audio", "text")}
    assert objectives("caption", "caption") == {"words": NextToken("text")}
    swapped = Matching("regions", "text", read="merged", negatives="swapped")
    assert objectives("uniter", "match") == {"matching": swapped}
    assert objectives("video", "answer")["answer"].read == "question"
    words = transferred(recipes.load("caption"), Transfer("caption")).fusion
    assert words == Merged(("image", "text"), layers=4, mask="prefix")
    other = transferred(recipes.load("clip"), Transfer("retrieve", field=("text=title",)))
    assert other.streams["text"].field == "title"


def test_what_the_run_measures_of_the_same_objective_is_measured_again() -> None:
    def measured(name: str, task: Any) -> list[str]:
        return [type(metric).__name__ for metric in transferred(recipes.load(name), Transfer(task)).metrics]

    assert measured("vqa", "answer") == ["Predictions", "Groups"]
    assert measured("caption", "caption") == ["Predictions", "Captioning"]
    assert measured("flamingo", "caption") == ["Predictions", "Ablation", "Shots"]
    assert measured("uniter", "match") == ["Predictions", "Matched"]
    assert measured("albef", "match") == ["Predictions"]  # no re-ranking without embeddings to compare
    assert measured("clip", "retrieve") == ["Retrieval"]


def test_a_probe_sees_samples_as_they_are() -> None:
    def views(name: str, **way: Any) -> dict[str, list[str]]:
        made = transferred(recipes.load(name), Transfer(**way))
        return {key: [type(view).__name__ for view in stream.views] for key, stream in made.streams.items()}

    assert views("mae", task="classify", label="tag") == {"image": ["RandomCrop"]}, "nothing is hidden"
    assert views("mae", task="classify", label="tag", probe=True) == {"image": []}
    assert views("uniter", task="match") == {"text": ["Captions", "Swap"], "regions": []}
    assert views("uniter", task="match", probe=True) == {"text": ["Swap"], "regions": []}  # which makes the wrong pairs


def test_adapters_once() -> None:
    albef = recipes.load("albef")
    once = transferred(albef, Transfer("answer", adapters=4))
    again = transferred(once, Transfer("answer", adapters=4))
    assert again.streams["image"].encoder == Adapted(albef.streams["image"].encoder, 4)
    assert again.fusion == AdaptedFusion(Cross(into=("text",), context="image", layers=2), 4)
    with pytest.raises(ValueError, match="adapters: expected 4, as the run has already, got 8"):
        transferred(once, Transfer("answer", adapters=8))


@pytest.mark.parametrize(
    ("name", "transfer", "message"),
    [
        ("mae", Transfer("answer"), "task: answer: expected a run with a fusion, got one without; its streams are ima"),
        ("mae", Transfer("retrieve"), "task: retrieve: expected a run with two streams, got one with image"),
        ("audioclip", Transfer("retrieve"), "expected two of the streams image, text, audio, got no choice"),
        ("devise", Transfer("retrieve", read=("text", "text")), "two of the streams image, text, got text, text"),
        (
            "uniter",
            Transfer("match", read=("text", "image", "regions")),
            "expected two of the streams text, regions, go",
        ),
        ("clip", Transfer("caption"), "task: caption: expected a run with one causal stream, got one without"),
        ("clip", Transfer("classify", "tag"), "read: task classify: expected one of the streams image, text, got no c"),
        ("clip", Transfer("classify", "tag", ("imag",)), "expected one of the streams image, text, got imag"),
        ("moco", Transfer("classify", "tag", ("key",)), "read: task classify: expected one of the streams query, got"),
        ("clip", Transfer("classify"), "label: expected the field of the data with the class"),
        ("clip", Transfer("retrieve", "tag"), "label: expected none for task retrieve"),
        ("clip", Transfer("retrieve", field=("texts=title",)), "field: expected a stream of the task .image, text., g"),
        ("adapters", Transfer("retrieve", adapters=4), "adapters: expected 8, as the run has already, got 4"),
        ("albef", Transfer("answer", unfreeze="masked:2,all"), "expected one of head, fusion, image, text, all"),
        ("devise", Transfer("classify", "tag", ("text",), adapters=8), "adapters: expected a run with transformer bl"),
    ],
)
def test_what_does_not_fit(name: str, transfer: Transfer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transferred(recipes.load(name), transfer)


def test_wrong_transfers() -> None:
    with pytest.raises(ValueError, match="probe, adapters, unfreeze: expected one of them at most, got --probe, --unf"):
        Transfer("answer", probe=True, unfreeze="all")
    with pytest.raises(ValueError, match="adapters: expected at least 1, got 0"):
        Transfer("answer", adapters=0)
    with pytest.raises(ValueError, match="field: expected STREAM=FIELD, such as text=title, got 'text'"):
        Transfer("answer", field=("text",))
    with pytest.raises(ValueError, match=r"task: expected one of answer, .*, got 'vqa'"):
        Transfer("vqa")  # type: ignore[arg-type]


def test_a_class_is_one_of_several() -> None:
    made = transferred(recipes.load("mae"), Transfer("classify", "tag"))
    with pytest.raises(ValueError, match="label: expected a field with several classes, got 'tag', which has 1"):
        Model(made, Facts(made.model, 300, {"tag": ("a",)}, made.streams))


NAMED = {"head": ("objectives.x.*",), "fusion": ("fusion.*",), "image": ("streams.image.*",)}


def test_a_schedule_of_unfreezing() -> None:
    head, fusion, image, more = stages_of("head:100, fusion+*norm*:300,image:301,all", NAMED)
    assert [stage.until for stage in (head, fusion, image, more)] == [100, 300, 301, None]
    assert head.trainable == ("objectives.x.*",)
    assert fusion.trainable == ("objectives.x.*", "fusion.*", "*norm*")
    assert image.trainable == (*fusion.trainable, "streams.image.*")
    assert more.trainable == (*image.trainable, "*")
    assert stages_of("head", NAMED) == stages_of("head+head", NAMED)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("head:100", "expected the last item without a step, since it lasts, got 'head:100'"),
        ("head,all", "expected PARTS:STEP with a step after 0, got 'head' in 'head,all'"),
        ("head:0,all", "with a step after 0, got 'head:0'"),
        ("head:5,fusion:5,all", "with a step after 5, got 'fusion:5'"),
        ("head:five,all", "with a step after 0, got 'head:five'"),
        ("head:²,all", "with a step after 0"),
        ("text:5,all", "expected one of head, fusion, image, all, or a pattern with a \"[*]\", got 'text'"),
        ("", "got ''"),
        ("head:5,", "got ''"),
        ("head+:5,all", "got ''"),
    ],
)
def test_wrong_schedules(schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"unfreeze: .*{message}"):
        stages_of(schedule, NAMED)

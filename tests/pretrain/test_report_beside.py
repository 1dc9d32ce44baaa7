"""What a report shows beside what the model says is what the model has, and it says when that is not all of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pretrain.small_model import Samples, built, held_out, recipe
from pretrain.small_report import CAPTIONS, run_of, samples, section

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.data import Text
from mmkernels.pretrain.encoders import HashedWords, Patches, Regions, Words
from mmkernels.pretrain.fusion import Co, Cross, Gated, Late, Merged, Weighted
from mmkernels.pretrain.metrics import Captioning, Figure, Retrieval
from mmkernels.pretrain.mixing import Mixing
from mmkernels.pretrain.objectives import (
    Answer,
    Contrast,
    MaskedPatches,
    MaskedRegions,
    MaskedTokens,
    Matching,
    NextToken,
)
from mmkernels.pretrain.recipe import Ramp, Stage, Stream
from mmkernels.pretrain.report.charts import figure_chart, loss_chart
from mmkernels.pretrain.report.page import _facts, _older, headlines
from mmkernels.pretrain.report.pieces import words_of
from mmkernels.pretrain.report.sections import sections_of
from mmkernels.pretrain.schedule import had_steps, reached, unreached
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.views import MaskPatches, MaskRegions, MaskWords, Swap

Make = Callable[..., Config]

IMAGE, TEXT = Stream(Patches(1, 16, 8)), Stream(Words(layers=0))
HASHED = Stream(HashedWords(layers=0), field="text")


def without(run: Any, *streams: str) -> Any:
    """A run that withholds some streams."""
    (one,) = run.held_out.values()
    one.collator.without = frozenset(streams)
    return run


@pytest.mark.parametrize(
    ("fusion", "read", "question", "picture"),
    [
        (None, "text", True, False),
        (None, "image", False, True),
        (None, "hashed", True, False),
        (Cross(("text",), "image"), "text", True, True),
        (Cross(("text",), "image"), "image", False, True),
        (Cross(("text",), "image", layers=0), "text", True, True),
        (Gated("text", "image", layers=1), "text", True, True),
        (Gated("text", "image", layers=1, shut=True), "text", True, False),
        (Co("text", "image", layers=1), "image", True, True),
        (Merged(("text", "image")), "merged", True, True),
        (Merged(("text", "image")), "text", True, True),
        (Merged(("text", "hashed"), everywhere="image"), "text", True, True),
        (Late(("image", "text"), into="text"), "text", True, True),
        (Weighted(("image", "hashed"), into="hashed"), "hashed", True, True),
    ],
)
def test_an_answer_has_what_was_read_beside_it(fusion: Any, read: str, question: bool, picture: bool) -> None:
    """The texts and the picture that the pooled tokens tell of, and no others of the sample."""
    streams = {"image": IMAGE, "text": TEXT, "hashed": HASHED}
    run = run_of(streams=streams, fusion=fusion, objectives={"answer": Answer(read)})
    shown = section(run, "answers").content
    assert [bool(each.question) for each in shown] == [question] * 6
    assert [each.question for each in shown if question] == list(CAPTIONS if question else ())
    assert [each.picture is not None for each in shown] == [picture] * 6


def test_what_is_withheld_is_not_shown() -> None:
    streams = {"image": IMAGE, "text": Stream(Words(layers=0, causal=True))}
    parts: dict[str, Any] = {"streams": streams, "fusion": Cross(("text",), "image")}
    run = run_of(**parts, objectives={"words": NextToken(), "answer": Answer("text")})
    assert all(each.picture for name in ("answers", "next_words") for each in section(run, name).content)
    without(run, "image")
    assert not any(each.picture for name in ("answers", "next_words") for each in section(run, name).content)
    late = run_of(streams=parts["streams"], fusion=Late(("image", "text"), "image"), objectives={"a": Answer("image")})
    assert section(late, "answers").content[0].question == CAPTIONS[0]
    assert not any(each.question for each in section(without(late, "text"), "answers").content)


def test_a_picture_that_no_stream_reads_is_not_shown() -> None:
    """The data has one."""
    run = run_of(streams={"text": Stream(Words(causal=True))}, objectives={"words": NextToken()})
    assert not any(each.picture for each in section(run, "next_words").content)
    run = run_of(streams={"text": Stream(Words(), views=(MaskWords(0.5),))}, objectives={"words": MaskedTokens()})
    assert not any(each.picture for each in section(run, "words").content)


def test_captions_written_without_the_image() -> None:
    """It is not shown, and need not be there."""
    streams = {"image": IMAGE, "text": Stream(Words(layers=0, causal=True))}
    of: dict[str, Any] = {"streams": streams, "fusion": Merged(("image", "text"), mask="prefix")}
    run = run_of(**of, objectives={"words": NextToken()}, metrics=(Captioning("words", most_tokens=3),))
    shown = section(run, "captions")
    assert "of each picture;" in shown.about and all(card["picture"] for card in shown.content)
    shown = section(without(run, "image"), "captions")
    assert "of each sample without its image;" in shown.about and not any(card["picture"] for card in shown.content)
    for value in run.held_out["held_out"].source.values:
        del value["image"]
    assert len(section(run, "captions").content) == 6


def test_a_swapped_sample_has_no_picture_of_its_own() -> None:
    """The model had another's: of samples alike a view swaps none."""
    swapped = Stream(Words(layers=0, causal=True), views=(Swap(share=1.0),))
    run = run_of(streams={"image": IMAGE, "text": swapped}, fusion=Cross(), objectives={"words": NextToken()})
    assert not any(each.picture for each in section(run, "next_words").content)
    images = Stream(Patches(1, 16, 8), views=(Swap(share=1.0),))
    run = run_of(streams={"image": images, "text": TEXT}, fusion=Cross(), objectives={"answer": Answer("text")})
    assert not any(each.picture for each in section(run, "answers").content)
    run.held_out["held_out"].source.concepts[:] = 0
    assert all(each.picture for each in section(run, "answers").content)


@pytest.mark.parametrize("swapped", ["text", "regions"])
def test_pairs_of_merged_streams_are_those_of_training(swapped: str) -> None:
    """A third stream stays with the one that no view swaps."""
    plain = {"image": Patches(1, 16, 8), "text": Words(layers=0), "regions": Regions(side=4)}
    streams = {name: Stream(part, views=(Swap(),) if name == swapped else ()) for name, part in plain.items()}
    matching = Matching("regions", "text", read="merged", negatives="swapped")
    run = run_of(streams=streams, fusion=Merged(tuple(streams)), objectives={"matching": matching})
    table, one = section(run, "pairs").content, run.held_out["held_out"]
    shown = [0, 1, 3, 4, 5]
    for row, likely in zip(shown, table.likely, strict=True):
        for column, probability in zip(shown, likely, strict=True):
            of = {"regions": column, "text": row, "image": column if swapped == "text" else row}
            values = {name: one.source.values[i][name] for name, i in of.items()}
            batch = one.collator([replace(one.source[0], values=values)], [0], mode="plain")
            fused = run.trained.whole(batch, "matching").fused["merged"].x
            logits = run.trained.objectives["matching"].head(fused.mean(0))
            assert probability == pytest.approx(logits.softmax(0)[1].item(), abs=1e-5)


def test_what_has_not_learned_is_not_shown() -> None:
    streams = {"image": IMAGE, "text": TEXT, "masked": Stream(Words(layers=0), views=(MaskWords(0.5),), field="text")}
    objectives = {"matching": Matching(), "words": MaskedTokens("masked"), "answer": Answer("text")}
    run = run_of(streams=streams, fusion=Cross(("text", "masked")), objectives=objectives)
    templates = [each.template for each in sections_of(run)]
    assert templates == ["answers", "words", "attention", "attention", "pairs"]
    run.learned = {"words"}
    assert [each.template for each in sections_of(run)] == ["words", "attention", "attention"]


def test_objectives_that_had_steps() -> None:
    stages = (Stage(until=10, objectives=("a", "late")), Stage(until=10), Stage(objectives=("b", "never", "falls")))
    weights: dict[str, Any] = {"a": 1.0, "late": Ramp(0.0, 1.0, 40), "b": 2.0, "never": 0.0, "falls": Ramp(1.0, 0.0, 5)}
    of: Any = SimpleNamespace(
        stages=stages, objectives={name: SimpleNamespace(weight=each) for name, each in weights.items()}
    )
    assert had_steps(of, 0) == set()
    assert had_steps(of, 1) == {"a"}, "the ramp begins at 0"
    assert had_steps(of, 10) == {"a", "late"}
    assert had_steps(of, 11) == {"a", "late", "b"}


def test_a_stage_without_steps_is_not_reached() -> None:
    stages = (Stage(until=0), Stage(until=5), Stage(until=5), Stage(until=7), Stage())
    of: Any = SimpleNamespace(stages=stages, mixing=Mixing())
    assert reached(of, 3) == stages[1:2]
    assert reached(of, 7) == (stages[1], stages[3])
    assert reached(of, 8) == (stages[1], stages[3], stages[4])
    assert "before 3 of its 5 stages begin" in unreached(of, 5)[0] and not unreached(of, 8)
    last: Any = SimpleNamespace(stages=(Stage(until=4), Stage(until=6)))
    assert reached(last, 9) == last.stages, "the last one lasts"


def test_the_page_names_what_has_not_learned(tiny: Make) -> None:
    config = tiny(
        recipe="uniter", data="scenes", steps=3, batch=4, eval_limit=8, parts={"objectives.words.weight": 0.0}
    )
    page = train(config).folder.report.read_text(encoding="utf-8")
    assert "words: no step has taught this: its figures are those of random weights" in page
    assert "Masked words" not in page


LETTERS = "кот и пёс ест שלום עולם"


@pytest.mark.parametrize("size", [300, 330, 420])
@pytest.mark.parametrize("text", ["кот и пёс ест", "שלום עולם", "日本 語", "a 🙂 cat", "naïve café"])
def test_a_word_has_its_own_tokens(text: str, size: int) -> None:
    """Those too that begin with a space and some bytes of a character."""
    tokenizer = TextTokenizer.train([LETTERS, "日本 語", "a cat"] * 3, size)
    ids = tokenizer.encode(text)
    words = words_of(tokenizer, ids)
    assert [word for word, _ in words] == text.split()
    assert [place for _, places in words for place in places] == list(range(len(ids))), "each of them once"
    assert [tokenizer.decode([ids[place] for place in places]) for _, places in words] == text.split()


def test_a_masked_character_is_in_its_box() -> None:
    """All of its tokens together."""
    run = run_of(streams={"text": Stream(Words(), views=(MaskWords(share=1.0),))}, objectives={"words": MaskedTokens()})
    (text,) = [each for each in section(run, "words").content if any("🙂" in p for _, p, _ in each.pieces)]
    assert text.pieces[-1][1] == "🙂" and len(text.pieces[-1][2]) == len("🙂".encode())
    assert [place.number for *_, places in text.pieces for place in places] == list(range(1, 7 + text.more))


def many(values: list[dict[str, Any]], **parts: Any) -> Any:
    """An untrained model of a recipe, and these samples held out."""
    of, source = recipe(**parts), Samples(values, classes={"answer": ("no", "yes", "three"), "tag": ("a", "b", "c")})
    one = replace(held_out(of, source, source), samples=len(values))
    model = built(of, source).float().eval()
    return SimpleNamespace(recipe=of, trained=model, held_out={"held_out": one}, learned=set(of.objectives))


def test_examples_are_spread_over_the_set() -> None:
    """Evenly: a set may be sorted."""
    values = [
        {**each, "text": Text((f"a cat {number:03d}",))}
        for number, each in enumerate(each for _ in range(20) for each in samples().values)
    ]
    masked = Stream(Words(layers=0), views=(MaskWords(0.9),), field="text")
    regions = Stream(Regions(side=4), views=(MaskRegions(0.9, keep=0.0),))
    objectives = {
        "answer": Answer("text"), "words": MaskedTokens("masked"), "matching": Matching(), "regions": MaskedRegions(),
    }  # fmt: skip
    streams = {"image": IMAGE, "text": TEXT, "masked": masked, "regions": regions}
    run = many(values, streams=streams, fusion=Cross(("text", "masked")), objectives=objectives)
    shown: dict[str, Any] = {each.template: each.content for each in sections_of(run)}
    asked = [int(each.question[-3:]) for each in shown["answers"]]
    told = ["".join(space + piece for space, piece, _ in each.pieces) for each in shown["words"]]
    said = [int(each[-3:]) for each in told]
    paired = [int(item.label[-3:]) for item in shown["pairs"].rows]
    for found, count in ((asked, 12), (said, 6), (paired, 5)):
        assert len(found) == count and found == sorted(found)
        assert found[0] < 120 / count and found[-1] >= 120 - 120 / count and max(np.diff(found)) < 2 * 120 / count
    assert len(shown["regions"]) == 12


def test_the_first_set_that_has_some_is_shown() -> None:
    """Of a mixture, say, whose first set has no images."""
    streams = {
        "image": Stream(Patches(1, 16, 4, "linear"), views=(MaskPatches(when=("patches",)),)), "text": TEXT,
    }  # fmt: skip
    objectives = {"patches": MaskedPatches(), "matching": Matching(), "contrast": Contrast()}
    run = run_of(streams=streams, fusion=Cross(), objectives=objectives, metrics=(Retrieval(),))
    full = run.held_out["held_out"]
    texts = Samples([{"text": Text((caption,))} for caption in CAPTIONS], classes=full.source.classes)
    empty = replace(full, name="texts", source=texts)
    run.held_out = {"texts": empty, **{name: replace(full, name=name) for name in ("A", "B", "C", "D")}}
    found = sections_of(run)
    assert [each.template for each in found] == ["patches", "attention", "pairs", *3 * ["retrieved"]]
    assert all("split A" in each.about.replace("Split", "split") for each in found[:3])
    assert [each.title.split(":")[0] for each in found[3:]] == ["Split A", "Split B", "Split C"]
    assert all("The first 3 of the splits are shown." in each.about for each in found[3:])
    del run.held_out["D"]
    assert not any("The first" in each.about for each in sections_of(run)[3:])


def test_two_streams_of_one_field_have_maps_each() -> None:
    """Unless they are tied."""
    streams = {"image": IMAGE, "text": TEXT, "other": Stream(Words(layers=0), field="text")}
    objectives = {"answer": Answer("text"), "again": Answer("other")}
    of: dict[str, Any] = {"fusion": Cross(("text", "other")), "objectives": objectives}
    titles = [each.title for each in sections_of(run_of(streams=streams, **of)) if each.template == "attention"]
    assert titles == ["Attention: text to image", "Attention: other to image"]
    streams["other"] = replace(streams["other"], tied="text")
    titles = [each.title for each in sections_of(run_of(streams=streams, **of)) if each.template == "attention"]
    assert titles == ["Attention: text to image"]


def dashes(svg: str) -> list[list[tuple[float, float]]]:
    """The points of the dashed lines."""
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke-dasharray', svg)
    return [[tuple(map(float, point.split()[1:])) for point in re.findall(r"[ML] [\d.]+ [\d.]+", d)] for d in lines]  # type: ignore[misc]


def test_chance_is_that_of_each_step() -> None:
    """Not the last one's: a stage may add objectives."""
    steps = [{"step": n, "loss": 4.0, "chance": 2.0 if n <= 50 else 8.0} for n in range(1, 101)]
    (line,) = dashes(loss_chart(steps))
    heights = [y for _, y in line]
    assert heights[0] > heights[-1] + 20, "SVG counts downwards"
    (flat,) = dashes(loss_chart([{**step, "chance": 2.0} for step in steps]))
    assert len(flat) == 2 and flat[0][1] == flat[1][1]
    some = [{**step, "chance": None} if step["step"] > 50 else step for step in steps]
    assert len(dashes(loss_chart(some))) == 1 and not dashes(loss_chart([{"step": 1, "loss": 2.0}]))


def test_the_loss_at_the_top_is_of_the_same_objectives() -> None:
    own = {"seconds": 1.0, "data_wait": 0.0, "tokens_per_s": 1.0, "peak_memory": 1.0}
    steps = [{"step": n, "loss": 2.0, "chance": 3.0, "a/loss": 2.0, **own} for n in range(1, 16)]
    steps += [{"step": n, "loss": 9.0, "chance": 10.0 + n % 2, "a/loss": 2.0, "b/loss": 7.0, **own} for n in (16, 17)]
    start = {"parameters": 10, "samples": 5}
    tile = headlines({}, steps, start)[0]
    assert (tile["value"], tile["note"]) == ("9.00", "10.50 at chance")


def test_figures_older_than_the_rest_say_so(tiny: Make) -> None:
    folder = train(tiny(steps=4, eval_every=4)).folder
    page = folder.report.read_text(encoding="utf-8")
    assert "Measured after step" not in page and "no step has taught" not in page
    newest = {"A": {"step": 2, "figures": []}, "B": {"step": 4, "figures": []}}
    assert _older(newest, 4) == "Measured after step 2, before the last of the 4."
    figures = [Figure("words", 0.5, 0.1, headline=True).to_dict()]
    (tile, *_) = headlines({"A": {"step": 2, "figures": figures}}, folder.records("step"), folder.records("start")[0])
    assert tile["note"].endswith("after step 2")


def test_a_split_has_the_colour_that_it_has_in_the_tables() -> None:
    """Also where the one before it lacks the figure."""
    record = {"step": 1, "figures": [Figure("words", 0.5, None).to_dict()]}
    both = figure_chart([{**record, "split": split} for split in ("A", "B")], ["A", "B"], "words")
    second = figure_chart([{**record, "split": "B"}], ["A", "B"], "words")
    assert "#2563eb" in both and "#2563eb" not in second and "#d97706" in second


def test_why_a_run_stopped_is_told_until_it_goes_on(tiny: Make) -> None:
    folder = train(tiny(steps=3)).folder
    run: Any = SimpleNamespace(recipe=tiny().wiring(), learned={"contrast"})
    stopped = {"kind": "warning", "message": "after step 2: the loss is nan", "stopped": True}
    records = folder.records()
    told = [
        _facts(SimpleNamespace(path=folder.path, records=lambda each=each: each), run)["warnings"]  # type: ignore[arg-type, misc]
        for each in ([*records, stopped], [*records[:2], stopped, *records[2:]])
    ]
    assert told[0][0] == stopped["message"] and stopped["message"] not in told[1]

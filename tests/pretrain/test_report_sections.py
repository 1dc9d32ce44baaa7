"""What a report shows of held-out samples is what the model says of them."""

from __future__ import annotations

import base64
import html
import logging
import re
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain import small_report
from pretrain.small_model import TOKENIZER, Samples
from pretrain.small_report import CAPTIONS, NAMES, NO_FIGURES, run_of, section

from mmkernels.pretrain.encoders import Patches, Regions, Words
from mmkernels.pretrain.fusion import Cross, Merged
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import (
    Answer,
    Contrast,
    MaskedPatches,
    MaskedRegions,
    MaskedTokens,
    Matching,
    NextToken,
)
from mmkernels.pretrain.pages import data_url
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.report import sections
from mmkernels.pretrain.report.pieces import pieces_of, words_of
from mmkernels.pretrain.report.render import rendered
from mmkernels.pretrain.report.retrieved import _query
from mmkernels.pretrain.report.sections import sections_of
from mmkernels.pretrain.report.shown import Item, laid_out
from mmkernels.pretrain.tokenizer import BOS, EOS, MASK, SPECIAL, TextTokenizer
from mmkernels.pretrain.views import CorruptSpans, MaskPatches, MaskRegions, MaskWords, Swap


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_masked_words() -> None:
    """The text is whole again, and every guess is the model's."""
    run = run_of(
        streams={"text": Stream(Words(layers=1), views=(MaskWords(share=0.4),))}, objectives={"words": MaskedTokens()}
    )
    texts, one = section(run, "words").content, run.held_out["held_out"]
    assert [("".join(s + p for s, p, _ in text.pieces)).strip() for text in texts] == list(CAPTIONS)
    (batch,) = replace(one, samples=6).batches("loss")
    logits, targets = run.trained.objectives["words"].logits(run.trained.whole(batch, "words"))
    every = [[place for _, _, places in text.pieces for place in places] for text in texts]
    assert [text.places for text in texts] == [each[:6] for each in every]
    assert [text.more for text in texts] == [max(0, len(each) - 6) for each in every]
    places = [place for each in every for place in each]
    assert [place.number for place in every[1]] == list(range(1, len(every[1]) + 1))
    packed, rows = batch["text"].tokens, run.trained.objectives["words"].masked(run.trained.whole(batch, "words"))[0]
    seen = packed[rows].tolist()
    assert [place.left for place in places] == [i == target for i, target in zip(seen, targets.tolist(), strict=True)]
    assert [place.saw != "" for place in places] == [
        i not in (MASK, target) for i, target in zip(seen, targets.tolist(), strict=True)
    ]
    for place, row, target in zip(places, logits.softmax(1), targets.tolist(), strict=True):
        best = row.argsort(descending=True)[:3]
        assert [guess.name for guess in place.guesses] == [TOKENIZER.piece(int(i)) for i in best]
        assert [guess.probability for guess in place.guesses] == pytest.approx(row[best].tolist())
        assert place.right == (int(best[0]) == target) and place.word == TOKENIZER.piece(target)


def test_next_words() -> None:
    """Probabilities of the true words, and the text is whole."""
    streams = {"image": Stream(Patches(1, 16, 8)), "text": Stream(Words(layers=1, causal=True))}
    run = run_of(streams=streams, fusion=Cross(("text",), "image"), objectives={"words": NextToken()})
    texts, one = section(run, "next_words").content, run.held_out["held_out"]
    for text, caption, batch in zip(texts, CAPTIONS, replace(one, samples=1).batches(), strict=True):
        *tokens, last = text.tokens
        assert "".join(t.space + t.piece for t in tokens).strip() == caption and last.piece == "[EOS]"
        logits = run.trained.objectives["words"].logits(run.trained.whole(batch, "words"))[0]
        ids = batch["text"].tokens[1:]
        likely, best = logits.softmax(1)[torch.arange(len(ids)), ids], logits.argmax(1)
        places = [places for _, places in pieces_of(TOKENIZER, ids.tolist())]
        assert [t.probability for t in text.tokens] == pytest.approx([likely[p].prod().item() for p in places])
        wrong = [[n for n in each if best[n] != ids[n]] for each in places]  # of a character's tokens the first
        assert [t.likeliest for t in text.tokens] == [TOKENIZER.piece(int(best[n[0]])) if n else "" for n in wrong]
        assert text.right == pytest.approx((best == ids).double().mean().item())
        assert text.picture and not text.read


def test_next_words_of_missing_spans() -> None:
    """What is read has the gaps that are to be filled."""
    views = [CorruptSpans(share=0.3, mean=2.0, part=part) for part in ("input", "target")]
    streams = {
        "text": Stream(Words(layers=0), views=(views[0],)),
        "target": Stream(Words(layers=0, causal=True), field="text", views=(views[1],)),
    }
    run = run_of(streams=streams, fusion=Cross(("target",), "text"), objectives={"spans": NextToken("target")})
    for text, caption in zip(section(run, "next_words").content, CAPTIONS, strict=True):
        read, wanted = text.read[0], "".join(t.space + t.piece for t in text.tokens).removesuffix("[EOS]")
        for sentinel, span in re.findall(r"(\[S\d+\])([^\[]*)", wanted):
            read = read.replace(sentinel, span)
        if caption.isascii():  # a gap may begin inside another character
            assert read.split() == caption.split()


@pytest.mark.parametrize("target", ["class", "features"])
def test_masked_regions(target: Any) -> None:
    streams = {"regions": Stream(Regions(side=4, layers=1), views=(MaskRegions(share=0.4, keep=0.0),))}
    run = run_of(streams=streams, objectives={"regions": MaskedRegions(target=target)})
    found, one = section(run, "regions").content, run.held_out["held_out"]
    (batch,) = replace(one, samples=6).batches("loss")
    objective = run.trained.objectives["regions"]
    chunk = run.trained.whole(batch, "regions")
    owners = objective.owners(chunk).tolist()
    assert len(found) == len(set(owners)), "one of each image"
    for region, sample in zip(found, sorted(set(owners)), strict=True):
        value, n = one.source[sample].values["regions"], owners.index(sample)
        tag = int(batch["regions"].labels[batch["regions"].labels >= 0][n])
        assert region.tag == ("cat", "dog", "sun")[tag]
        assert np.abs(pixels(region.crop).astype(int) - value.crops[tag]).max() <= 1, "the crop that was hidden"
        assert not np.array_equal(pixels(region.picture), laid_out(value)), "which the image lacks"
        if target == "class":
            row = objective.logits(chunk)[0][n].softmax(0)
            assert region.guesses[0].probability == pytest.approx(row.max().item())
            assert region.guesses[0].right == (int(row.argmax()) == tag)
        else:
            painted = objective.vectors(chunk)[0][n].reshape(3, 4, 4).clamp(-1, 1).detach()
            assert np.abs((painted.permute(1, 2, 0).numpy() + 1) * 127.5 - pixels(region.painted)).max() < 1


@pytest.mark.parametrize("normalize", [True, False])
def test_masked_patches(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who paints what was there gets the whole image back; what is visible is never painted."""
    streams = {"image": Stream(Patches(1, 16, 4, "linear"), views=(MaskPatches(),), project="none")}
    run = run_of(streams=streams, objectives={"patches": MaskedPatches(normalize=normalize)})
    objective, one = run.trained.objectives["patches"], run.held_out["held_out"]
    for image, visible in zip(section(run, "patches").content, one.source.values, strict=True):
        whole, painted, seen = pixels(image.whole), pixels(image.painted), pixels(image.visible)
        assert np.abs(whole.astype(int) - visible["image"]).max() <= 1
        shown = ~(seen == 223).all(-1)
        assert 0 < shown.mean() <= 0.3 and np.array_equal(painted[shown], whole[shown])
        assert not np.array_equal(painted, whole)
    monkeypatch.setattr(objective, "painted", lambda chunk: (objective.targets(chunk.batch["image"]),) * 2)
    for image in section(run, "patches").content:
        assert np.abs(pixels(image.painted).astype(int) - pixels(image.whole)).max() <= 1


CROSSED: dict[str, Any] = {
    "streams": {"image": Stream(Patches(1, 16, 8)), "text": Stream(Words(layers=0))},
    "fusion": Cross(("text",), "image", layers=2),
}


def test_answers() -> None:
    run = run_of(**CROSSED, objectives={"answer": Answer("text")})
    questions, one = section(run, "answers").content, run.held_out["held_out"]
    assert [q.question for q in questions] == list(CAPTIONS)
    assert [q.answer for q in questions] == [NAMES[i % 3] for i in range(6)]
    for question, batch in zip(questions, replace(one, samples=1).batches("loss"), strict=True):
        (row,) = run.trained.objectives["answer"].logits(run.trained.whole(batch, "answer"))[0].softmax(1)
        assert {g.name: pytest.approx(g.probability, abs=1e-5) for g in question.guesses} == {
            name: row[i].item() for i, name in enumerate(NAMES)
        }
        assert [g.name for g in question.guesses if g.right] == [question.answer]
        assert question.picture == data_url(one.source[batch.numbers[0]].values["image"])


@pytest.mark.parametrize("negatives", ["sampled", "swapped"])
def test_matched_pairs(negatives: Any) -> None:
    """Each pair as if it were a sample of its own; swapped pairs keep their other streams."""
    words = Stream(Words(layers=0), views=(Swap(),) if negatives == "swapped" else ())
    streams = {**CROSSED["streams"], "text": words}
    run = run_of(streams=streams, fusion=CROSSED["fusion"], objectives={"matching": Matching(negatives=negatives)})
    table, one = section(run, "pairs").content, run.held_out["held_out"]
    shown = [0, 1, 3, 4, 5]
    assert [item.label for item in table.rows] == [CAPTIONS[i] for i in shown] == [i.label for i in table.columns]
    for row, likely in zip(shown, table.likely, strict=True):
        for column, probability in zip(shown, likely, strict=True):
            values = {"image": one.source.values[column]["image"], "text": one.source.values[row]["text"]}
            batch = one.collator([replace(one.source[0], values=values)], [0], mode="plain")
            fused = run.trained.whole(batch, "matching").fused["text"].x
            logits = run.trained.objectives["matching"].head(fused.mean(0))
            assert probability == pytest.approx(logits.softmax(0)[1].item(), abs=1e-5)


def test_attention_to_regions() -> None:
    """Of each sample alone, word by word: the pieces of a word are averaged."""
    streams = {"text": Stream(Words(layers=0), views=(MaskWords(),)), "regions": Stream(Regions(side=4))}
    run = run_of(streams=streams, fusion=Merged(layers=2), objectives={"words": MaskedTokens()})
    found, one = section(run, "attention").content, run.held_out["held_out"]
    assert len(found) == 6
    for sample, batch in zip(found, replace(one, samples=1).batches(), strict=True):
        weights = run.trained.fusion.attention(run.trained.whole(batch, "words").tokens)["text", "regions"]
        words = words_of(TOKENIZER, batch["text"].tokens.tolist())
        assert [look.word for look in sample.looks] == [word for word, _ in words]
        assert [w for w, _ in words] == one.source[batch.numbers[0]].values["text"].captions[0].split()
        for look, (_, places) in zip(sample.looks, words, strict=True):
            assert look.shares == pytest.approx((100 * weights[places].mean(0)).tolist(), abs=1e-4)
        assert len(sample.crops) == weights.shape[1]


def test_attention_to_patches() -> None:
    """The picture is clear where the word looks, and white where it does not."""
    run = run_of(**CROSSED, objectives={"answer": Answer("text")})

    def attention(tokens: Any) -> Any:
        weights = torch.zeros(len(tokens["text"].x), len(tokens["image"].x))
        weights[:, 3::4] = 1.0  # the last of four patches
        return {("text", "image"): weights}

    run.trained.fusion.attention = attention
    for sample in section(run, "attention").content:
        whole = pixels(sample.picture).astype(int)
        for look in sample.looks:
            seen, half = pixels(look.picture).astype(int), len(whole) // 2
            corner = slice(half + half // 2, None)
            assert np.abs(seen[corner, corner] - whole[corner, corner]).max() <= 1
            assert seen[: half // 2, : half // 2].min() >= 225
            assert look.shares == [100.0]


def test_a_fusion_without_attention_has_no_maps() -> None:
    run = run_of(**{**CROSSED, "fusion": Cross(("text",), "image", layers=0)}, objectives={"answer": Answer("text")})
    assert [each.template for each in sections_of(run)] == ["answers"]


def test_what_was_retrieved_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long text some lines are shown, not the beginning of one; the whole is its title."""
    monkeypatch.setattr(small_report, "CAPTIONS", tuple(f"{caption}, {'and so on ' * 20}" for caption in CAPTIONS))
    run = run_of(**CROSSED, objectives={"contrast": Contrast()}, metrics=(Retrieval(),))
    (found,) = (each for each in sections_of(run) if each.template == "retrieved")
    page = rendered("report.html.jinja", **NO_FIGURES, sections=[found])
    assert [way for way, _ in found.content] == ["image → text", "text → image"]
    queries = [query for _, each in found.content for query in each]
    shown = [query.item for query in queries if query.item.picture] + [a.item for q in queries for a in q.found]
    titles = [html.unescape(title) for title in re.findall(r'title="([^"]*)"', page)]
    assert sorted(titles) == sorted(item.label for item in shown) and min(map(len, titles)) > 200
    css = page[page.index("<style>") : page.index("</style>")]
    for part in ("ol li span", ".strip small", ".query > figure figcaption"):
        rules = "".join(rule for names, rule in re.findall(r"([^{}]+){([^{}]*)}", css) if part in names)
        assert "nowrap" not in rules and int(re.findall(r"-webkit-line-clamp: (\d+)", rules)[-1]) >= 3


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ((0.1, 0.9, 0.3), 3),
        ((0.9, 0.1, 0.3), 1),
        ((0.3, 0.3, 0.3), 3),
        ((float("nan"),) * 3, 3),
        ((0.3, float("nan"), 0.1), 2),
    ],
)
def test_the_rank_of_an_answer(scores: tuple[float, ...], rank: int) -> None:
    """The first of three is right. A model that says the same of all, or NaN, has found nothing."""
    right = torch.tensor([True, False, False])
    assert _query(Item("q"), torch.tensor(scores), right, lambda i: Item(str(i))).rank == rank


def test_a_section_that_fails_says_why_and_the_others_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_pictures(run: Any) -> Any:
        raise KeyError("no <such> thing")

    monkeypatch.setattr(sections, "MAKERS", [broken_pictures, *sections.MAKERS])
    run = run_of(**CROSSED, objectives={"answer": Answer("text"), "contrast": Contrast()}, metrics=(Retrieval(),))
    with caplog.at_level(logging.ERROR):
        found = sections_of(run)
    assert [each.template for each in found] == ["failed", "answers", "attention", "retrieved"]
    assert found[0].title == "Broken pictures" and "KeyError: 'no <such> thing'" in found[0].about
    assert "broken_pictures" in caplog.text and "Traceback" in caplog.text
    page = rendered("report.html.jinja", **NO_FIGURES, sections=found)
    assert "no &lt;such&gt; thing" in page


def test_an_empty_held_out_set_shows_nothing() -> None:
    run = run_of(**CROSSED, objectives={"answer": Answer("text"), "matching": Matching()})
    empty = replace(run.held_out["held_out"], source=Samples([]))
    assert sections_of(SimpleNamespace(**{**vars(run), "held_out": {"x": empty}})) == []
    assert sections_of(SimpleNamespace(**{**vars(run), "held_out": {}})) == []


@pytest.mark.parametrize("text", ["a red cat, a dog", "naïve café", "日本語と🙂🏽 dog", "  ", ""])
def test_pieces_make_the_text(text: str) -> None:
    ids = [BOS, *TOKENIZER.encode(text), EOS]
    first, *pieces, last = TOKENIZER.pieces(ids)
    assert (first, last) == (SPECIAL[BOS], SPECIAL[EOS])
    assert len(pieces) == len(ids) - 2
    assert "".join(pieces).strip() == TOKENIZER.decode(ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(word for word, _ in words_of(TOKENIZER, ids)) == "".join(TOKENIZER.decode(ids).split())


def test_a_character_that_is_cut_off() -> None:
    ids = TOKENIZER.encode("é")
    assert TOKENIZER.pieces([*ids[:-1], EOS])[-2:] == ["\ufffd", "[EOS]"]
    assert "".join(TOKENIZER.pieces([*ids[:-1], *TOKENIZER.encode("a cat")])).strip() == "\ufffd a cat"


def test_a_piece_by_itself() -> None:
    assert TOKENIZER.piece(BOS) == "[BOS]"
    larger = TextTokenizer.train(["a red cat, a red dog"] * 3, 400)
    assert [larger.piece(i) for i in larger.encode("red, redx")] == ["red", ",", "red", "##x"]
    assert TOKENIZER.piece(TOKENIZER.encode(" ")[0]) == "␣"
    bytes_of = [TOKENIZER.piece(i) for i in TOKENIZER.encode("é")]
    assert "".join(bytes_of).replace("##", "").endswith("\\xc3\\xa9")

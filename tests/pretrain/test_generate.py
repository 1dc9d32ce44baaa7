"""Texts written token by token, against the logits of the whole text at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.small_model import TOKENIZER, Samples, built, collated, collator, recipe

from mmkernels import PackedBatch
from mmkernels.pretrain.data import Document
from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Patches, Words
from mmkernels.pretrain.fusion import Cross, Gated, Merged
from mmkernels.pretrain.generate import generate, go_on
from mmkernels.pretrain.load import Pretrained
from mmkernels.pretrain.objectives import MaskedTokens, NextToken
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.tokenizer import BOS, EOS
from mmkernels.pretrain.views import MaskWords

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
PATCHES, CAUSAL = Patches(layers=1, size=16), Words(layers=0, causal=True)
CAPTION = {"image": Stream(PATCHES), "text": Stream(CAUSAL)}
WORDS = {"words": NextToken("text")}
SYSTEMS: dict[str, Recipe] = {
    "prefix": recipe(streams=CAPTION, fusion=Merged(("image", "text"), layers=2, mask="prefix"), objectives=WORDS),
    "decoder": recipe(streams=CAPTION, fusion=Cross(into=("text",), context="image"), objectives=WORDS),
    "documents": recipe(
        streams={
            "text": Stream(DocumentWords(CAUSAL), field="document"),
            "image": Stream(DocumentImages(PATCHES), field="document"),
        },
        fusion=Gated(layers=2),
        objectives=WORDS,
    ),
    "alone": recipe(streams={"text": Stream(Words(layers=2, causal=True))}, objectives=WORDS),
    "translation": recipe(
        streams={"source": Stream(Words(layers=1), field="question"), "text": Stream(CAUSAL)},
        fusion=Cross(into=("text",), context="source"),
        objectives=WORDS,
    ),
}
# Samples begin a text, or do not; two lack what is read beside it.
SAMPLES = Samples(
    [
        {"image": IMAGES[0], "text": "a red", "question": "a blue dog", "document": Document((IMAGES[0],))},
        {"image": IMAGES[1], "question": "cat", "document": Document((IMAGES[1], "a red cat", IMAGES[2]))},
        {"text": "dog a", "document": Document(("a blue",))},
        {"image": IMAGES[3], "text": "blue", "question": "a a a a", "document": Document(("cat", IMAGES[3]))},
        {},
        {"image": IMAGES[4], "question": "dog", "document": Document((IMAGES[4], "dog", IMAGES[5], "cat", IMAGES[0]))},
    ]
)
MOST = 7


def begun(name: str) -> tuple[Any, Any]:
    """(model, batch whose texts have no end token)"""
    of = SYSTEMS[name]
    model, batch = built(of, SAMPLES), collated(of, SAMPLES)
    for parameter, value in model.named_parameters():
        if parameter.endswith(".gate"):
            torch.nn.init.ones_(value)  # they begin shut
    packed = batch["text"]
    ids = [packed.tokens[begin:end] for begin, end in pairwise(packed.cu_seqlens_host)]
    ids = [each[:-1] if len(each) and each[-1] == EOS and name != "documents" else each for each in ids]
    return model, replace(batch, streams={**batch.streams, "text": PackedBatch.from_samples(ids)})


def prompts_of(batch: Any) -> list[list[int]]:
    packed = batch["text"]
    return [packed.tokens[a:b].tolist() or [BOS] for a, b in pairwise(packed.cu_seqlens_host)]


@torch.no_grad()
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_token_is_the_likeliest_after_those_before_it(name: str) -> None:
    model, batch = begun(name)
    endings: set[Any] = set()
    for bias in np.linspace(0, 1, 21):  # until it is such that some texts end
        if {True, "cut"} <= endings:
            break
        model.objectives["words"].head.project.bias[EOS] = bias
        found, prompts = generate(model, "words", batch, MOST), prompts_of(batch)
        assert [len(each) for each in generate(model, "words", batch, 1)] == [1] * 6
        assert found == [generate(model, "words", one, MOST)[0] for one in batch.split(1)], "whatever the batch"
        whole = [torch.tensor(a + b) for a, b in zip(prompts, found, strict=True)]
        text = PackedBatch.from_samples(whole, labels=whole)
        chunk = model.whole(replace(batch, streams={**batch.streams, "text": text}), "words")
        likeliest = model.objectives["words"].logits(chunk)[0].argmax(1).tolist()
        for prompt, written in zip(prompts, found, strict=True):
            of_this, likeliest = likeliest[: len(prompt + written) - 1], likeliest[len(prompt + written) - 1 :]
            assert of_this[len(prompt) - 1 :] == written
            assert EOS not in written[:-1] and (written[-1] == EOS or len(written) == MOST)
            endings.add(written[-1] == EOS and 1 < len(written) < MOST)
            endings.add("cut" if written[-1] != EOS else "")
    assert {True, "cut"} <= endings, "some end, some are cut"


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix", "decoder", "documents", "translation"])
def test_what_is_read_matters(name: str) -> None:
    """Without this the oracle would agree with a model that reads nothing."""
    model, batch = begun(name)
    read = next(stream for stream in model.encoded if stream != "text")
    emptied = PackedBatch.from_samples([torch.zeros(0, dtype=torch.int64)] * 6)
    blind = replace(batch, streams={**batch.streams, read: emptied})
    assert generate(model, "words", batch, MOST) != generate(model, "words", blind, MOST)


def test_a_loaded_model_writes_words() -> None:
    of = SYSTEMS["prefix"]
    model = built(of, SAMPLES).float()
    loaded, images = Pretrained(model, collator(of, SAMPLES)), list(IMAGES[:3])
    assert loaded.write("words", {"image": []}) == []
    written = loaded.write("words", {"image": images}, most_tokens=4)
    ids = generate(model, "words", loaded.batch({"image": images}), 4)
    assert written == [TOKENIZER.decode(each) for each in ids] and len(written) == 3


def test_a_loaded_model_goes_on_with_words() -> None:
    """Not after their end token."""
    of = SYSTEMS["alone"]
    model = built(of, SAMPLES).float()
    written = Pretrained(model, collator(of, SAMPLES)).write("words", {"text": ["a red", "dog"]}, most_tokens=3)
    prompts = [[BOS, *TOKENIZER.encode(text)] for text in ("a red", "dog")]
    assert written == [TOKENIZER.decode(ids) for ids in go_on(model, "words", {}, prompts, 3)]


@pytest.mark.parametrize("name", ["alone", "documents"])
def test_a_beginning_that_would_be_cut_is_refused(name: str) -> None:
    """The end of a document is the image whose caption is asked for."""
    of = SYSTEMS[name]
    loaded = Pretrained(built(of, SAMPLES).float(), collator(of, SAMPLES))
    long = [(IMAGES[0], "dog a red cat") * 40 + (IMAGES[1],), ("a red dog " * 80,)]
    values = [Document(each) for each in long] if name == "documents" else [" ".join(["a red dog"] * 80)] * 2
    short = Document((IMAGES[0],)) if name == "documents" else "a red"
    fields = [each for each in of.streams if each == "text" or name == "documents"]
    assert len(loaded.write("words", {key: [short] for key in fields}, most_tokens=2)) == 1
    for value in values:
        with pytest.raises(ValueError, match=r"values: expected beginnings of text of fewer than 128 tokens, .* at 1,"):
            loaded.write("words", {key: [short, value] for key in fields}, most_tokens=2)
    with pytest.raises(ValueError, match="values: expected one of text each, got None at 1"):
        loaded.embed("text", [short, None])


@torch.no_grad()
def test_no_samples_and_wrong_arguments() -> None:
    model, batch = begun("prefix")
    none = replace(batch, streams={n: p._samples(0, 0) for n, p in batch.streams.items()}, names=[], numbers=[])
    assert generate(model, "words", none, MOST) == []
    with pytest.raises(ValueError, match="most_tokens: expected at least 1, got 0"):
        generate(model, "words", batch, 0)
    with pytest.raises(
        ValueError, match=r"objective: expected one of the objectives of next tokens \(words\), got 'w'"
    ):
        generate(model, "w", batch, 1)
    masked = recipe(streams={"text": Stream(Words(), views=(MaskWords(),))}, objectives={"gaps": MaskedTokens("text")})
    with pytest.raises(ValueError, match=r"\(there are none\), got 'gaps'"):
        generate(built(masked, SAMPLES), "gaps", collated(masked, SAMPLES), 1)

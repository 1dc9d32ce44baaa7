"""Documents: which tokens there are, which image each belongs to, and that images see themselves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretrain.packed import facts, shaken

from mmkernels import PackedBatch
from mmkernels.pretrain.data import Document
from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Patches, Words
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import BOS, EOS, IMAGE, TextTokenizer

WORDS = DocumentWords(Words(layers=0, causal=True, max_tokens=24))
IMAGES = DocumentImages(Patches(layers=1, size=16))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 20, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["a cat", "two dogs"], 320)


DOCUMENTS: list[Any] = [
    Document((picture(0), "a cat", picture(1), "two dogs")),
    None,
    Document(("a cat",)),
    Document(("two dogs", picture(2), picture(3))),
]


def packed(part: Any, values: list[Any], tokenizer: TextTokenizer) -> PackedBatch:
    pieces = part.prepare(values, tokenizer)
    labels = None if pieces[0].labels is None else [piece.labels for piece in pieces]
    return PackedBatch.from_samples([piece.tokens for piece in pieces], labels=labels)


def module(part: Any) -> Any:
    return shaken(part.build(facts({"text": Stream(part)}))).float()


def test_words(tokenizer: TextTokenizer) -> None:
    cat, dogs = tokenizer.encode("a cat"), tokenizer.encode("two dogs")
    first, none, text, last = WORDS.prepare(DOCUMENTS, tokenizer)
    assert first.tokens.tolist() == [BOS, IMAGE, *cat, EOS, IMAGE, *dogs, EOS]
    assert first.labels.tolist() == [BOS, -100, *cat, EOS, -100, *dogs, EOS]
    assert none.tokens.tolist() == none.labels.tolist() == []
    assert text.tokens.tolist() == [BOS, *cat, EOS]
    assert last.tokens.tolist() == [BOS, *dogs, EOS, IMAGE, IMAGE]
    assert [WORDS.length(value, tokenizer) for value in DOCUMENTS] == [len(p.tokens) for p in (first, none, text, last)]
    assert WORDS.causal and WORDS.reads_text


def test_words_know_the_last_image(tokenizer: TextTokenizer) -> None:
    batch = packed(WORDS, DOCUMENTS, tokenizer)
    layout = module(DocumentWords(Words(layers=1, causal=True))).layout(batch)
    cat, dogs = len(tokenizer.encode("a cat")) + 2, len(tokenizer.encode("two dogs")) + 1
    expected = [-1, *[0] * cat, *[1] * (dogs + 1), *[-1] * cat, *[-1] * (dogs + 1), 0, 1]
    assert layout.media.tolist() == expected
    assert layout.media.dtype == torch.int32 and layout.causal


def test_long_texts_are_cut(tokenizer: TextTokenizer) -> None:
    part, value = DocumentWords(Words(max_tokens=5)), DOCUMENTS[0]
    (piece,) = part.prepare([value], tokenizer)
    assert len(piece.tokens) == part.length(value, tokenizer) == 5


def test_images(tokenizer: TextTokenizer) -> None:
    """An image's tokens are what the encoder of images makes of it alone."""
    batch, encoder = packed(IMAGES, DOCUMENTS, tokenizer), module(IMAGES)
    assert batch.lengths == (8, 0, 0, 8)
    assert encoder.layout(batch).media.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    features = encoder(batch)
    alone = [encoder(packed(IMAGES, [Document((picture(i),))], tokenizer)) for i in range(4)]
    torch.testing.assert_close(features, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert [IMAGES.length(value, tokenizer) for value in DOCUMENTS] == [8, 0, 0, 8]
    assert IMAGES.length(Document((..., "undrawn")), tokenizer) == 4


def test_one_sample_with_two_images_beside_one_without(tokenizer: TextTokenizer) -> None:
    """As many images as samples."""
    batch = packed(IMAGES, [DOCUMENTS[0], None], tokenizer)
    assert module(IMAGES).layout(batch).media.tolist() == [0] * 4 + [1] * 4


def test_no_images_at_all(tokenizer: TextTokenizer) -> None:
    batch, encoder = packed(IMAGES, [None, DOCUMENTS[2]], tokenizer), module(IMAGES)
    assert encoder(batch).shape == (0, 16)
    assert encoder.layout(batch).media.tolist() == []


def test_a_chunk_counts_its_own_images(tokenizer: TextTokenizer) -> None:
    batch, encoder = packed(IMAGES, DOCUMENTS, tokenizer), module(IMAGES)
    chunks = [encoder.layout(chunk).media for chunk in batch.split(2)]
    assert torch.equal(torch.cat(chunks), encoder.layout(batch).media)


def test_something_else_than_a_document(tokenizer: TextTokenizer) -> None:
    for part in (WORDS, IMAGES):
        with pytest.raises(ValueError, match="value: expected a Document, got 'text'"):
            part.prepare(["text"], tokenizer)

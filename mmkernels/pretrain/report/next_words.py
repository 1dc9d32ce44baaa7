"""Next words: how likely the model holds each word of a held-out text, after the true words before it."""

from __future__ import annotations

from dataclasses import dataclass

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.next_token import NextTokenLoss
from mmkernels.pretrain.report.section import Run, Section, first_set, objectives_of, some, titled
from mmkernels.pretrain.report.shown import picture_of
from mmkernels.pretrain.tokenizer import BOS, EOS, TextTokenizer

__all__ = ["next_words"]

_TEXTS = 6
_SURE = 0.1  # the least probability of another token that is shown


@dataclass(frozen=True)
class Next:
    """A token of a text."""

    space: str  # before it
    piece: str
    probability: float | None  # None: it is not predicted
    likeliest: str  # another token, if one is likelier; else empty
    sure: bool  # that one has at least _SURE


@dataclass(frozen=True)
class Predicted:
    picture: str | None
    read: list[str]  # the other texts that the model reads
    tokens: list[Next]
    right: float  # share of the predicted tokens that are the likeliest


def next_words(run: Run) -> list[Section]:
    held_out, sections = first_set(run), []
    for name, objective in objectives_of(run, NextTokenLoss) if held_out is not None else ():
        assert held_out is not None
        if found := _predicted(run, held_out, name, objective):
            about = (
                f"Split {held_out.name}: the greener a word, the likelier the model held it after the true words "
                f"before it; in small print what it held for likelier, with at least {100 * _SURE:.0f}%."
            )
            sections.append(Section("next_words", titled("Next words", name, run, NextTokenLoss), about, found))
    return sections


def _predicted(run: Run, held_out: HeldOut, name: str, objective: NextTokenLoss) -> list[Predicted]:
    batch = some(held_out, _TEXTS, "loss", name)
    if batch is None:
        return []
    chunk, packed, tokenizer = run.trained.whole(batch, name), batch[objective.stream], held_out.collator.tokenizer
    (rows, targets), (logits, _) = objective.followed(chunk), objective.logits(chunk)
    likely = logits.float().softmax(1)
    most, best = likely.max(1)
    columns = (rows + 1, likely.gather(1, targets[:, None]).flatten(), best, best == targets, most)
    # A row predicts the token after it: row -> (its probability, the first guess, whether that is it, how likely).
    after = {row: tuple(rest) for row, *rest in zip(*(column.tolist() for column in columns), strict=True)}
    found = []
    for sample in range(batch.samples):
        begin, end = packed.cu_seqlens_host[sample : sample + 2]
        texts = enumerate(tokenizer.pieces(packed.tokens[begin:end].tolist()), begin)
        tokens = []
        for row, text in texts:
            probability, guess, right, most = after.get(row, (None, 0, True, 0.0))
            likeliest = "" if right else tokenizer.piece(guess)
            tokens.append(Next(" " * text[:1].isspace(), text.lstrip(), probability, likeliest, most >= _SURE))
        if predicted := [token for token in tokens if token.probability is not None]:
            picture = picture_of(held_out.source[batch.numbers[sample]])
            share = sum(not token.likeliest for token in predicted) / len(predicted)
            found.append(Predicted(picture, _read(run, batch, sample, objective.stream, tokenizer), tokens[1:], share))
    return found


def _read(run: Run, batch: Batch, sample: int, written: str, tokenizer: TextTokenizer) -> list[str]:
    """The texts of the other streams, as the model has them."""
    texts = []
    for name, stream in run.recipe.streams.items():
        if name != written and stream.encoder.reads_text:
            begin, end = batch[name].cu_seqlens_host[sample : sample + 2]
            ids = [i for i in batch[name].tokens[begin:end].tolist() if i not in (BOS, EOS)]
            texts.append("".join(tokenizer.pieces(ids)).strip())
    return [text for text in texts if text]

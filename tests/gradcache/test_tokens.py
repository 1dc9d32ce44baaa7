"""Losses over tokens in the second pass: their means are over the whole batch, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradcache.toys import Encoder, assert_same, clear, gradients
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce


class Captioner(nn.Module):
    """Text tower with words, and a decoder that also sees the picture."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.pool, self.dropout = nn.Embedding(9, 6), Encoder(), nn.Dropout(dropout)
        self.mlm, self.caption = nn.Linear(6, 9), nn.Linear(14, 9)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        states = self.dropout(self.words(batch["ids"]))  # [B, T, 6]
        return self.pool(states.mean(1)), states

    def token_loss(self, outputs: list[Any], inputs: list[Any]) -> dict[str, tuple[Tensor, Tensor]]:
        picture, (_, states) = outputs
        labels = inputs[1]["labels"]
        both = torch.cat([states, picture[:, None].expand(-1, states.shape[1], -1)], 2)
        weight = inputs[1]["weight"]
        each = F.cross_entropy(self.caption(self.dropout(both)).mT, inputs[1]["ids"], reduction="none")
        masked = F.cross_entropy(self.mlm(states).mT, labels, reduction="sum", ignore_index=-100)
        return {"mlm": (0.3 * masked, (labels != -100).sum()), "caption": ((each * weight).sum(), weight.sum())}


def batch(rows: int = 10) -> tuple[Tensor, dict[str, Tensor]]:
    """Masked words cluster at the end: chunks differ widely in them, and some have none."""
    ids = torch.randint(9, (rows, 5))
    labels = torch.where(torch.arange(rows)[:, None] < rows - 3, -100, ids)
    return torch.randn(rows, 6), {"ids": ids, "labels": labels, "weight": torch.rand(rows, 5)}


@pytest.mark.parametrize("size", [1, 3, 4, 10, 64])
def test_equals_the_full_batch(size: int) -> None:
    image, text = Encoder(), Captioner()
    x, words = batch()
    contrast = plain_infonce(image(x), text(words)[0])
    terms = text.token_loss([image(x), text(words)], [x, words])
    expected_parts = {name: (total / count).detach() for name, (total, count) in terms.items()}
    (contrast + sum(total / count for total, count in terms.values())).backward()
    expected = gradients(image, text)
    clear(image, text)
    step = GradCache([image, text], plain_infonce, chunk_size=size, token_loss_fn=text.token_loss)
    loss, parts = step(x, words)
    torch.testing.assert_close(parts, expected_parts)
    torch.testing.assert_close(loss, contrast.detach() + sum(expected_parts.values()))
    assert_same(gradients(image, text), expected, 2e-6)


def test_dropout_of_encoder_and_head_is_replayed() -> None:
    image, text = Encoder(dropout=0.3), Captioner(dropout=0.3)
    x, words = batch()
    chunks = [(x[i : i + 4], {k: v[i : i + 4] for k, v in words.items()}) for i in (0, 4, 8)]
    torch.manual_seed(5)
    outputs, terms = [], []
    for part in chunks:
        outputs.append([image(part[0]), text(part[1])])
        terms.append(text.token_loss(outputs[-1], list(part)))
    whole = plain_infonce(torch.cat([a for a, _ in outputs]), torch.cat([b[0] for _, b in outputs]))
    for name in ("mlm", "caption"):
        whole = whole + sum(term[name][0] for term in terms) / sum(term[name][1] for term in terms)
    whole.backward()
    expected, following = gradients(image, text), torch.rand(2)
    clear(image, text)
    torch.manual_seed(5)
    loss, _ = GradCache([image, text], plain_infonce, chunk_size=4, token_loss_fn=text.token_loss)(x, words)
    assert torch.equal(following, torch.rand(2))
    torch.testing.assert_close(loss, whole.detach())
    assert_same(gradients(image, text), expected, 2e-6)


def test_frozen_picture_tower_and_scaled_loss() -> None:
    image, text = Encoder().requires_grad_(False), Captioner()
    x, words = batch()

    def total() -> Tensor:
        terms = text.token_loss([image(x), text(words)], [x, words])
        return plain_infonce(image(x), text(words)[0]) + sum(a / b for a, b in terms.values())

    total().backward()
    expected = gradients(text)
    clear(text)
    step = GradCache([image, text], plain_infonce, chunk_size=3, token_loss_fn=text.token_loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, _ = step(x, words, scale_loss=scaler.scale)
    torch.testing.assert_close(loss, total().detach())
    assert_same([grad / 1024 for grad in gradients(text)], expected, 2e-6)


def test_token_loss_alone_and_further_output() -> None:
    text = Captioner()
    x, words = batch()
    image = Encoder().requires_grad_(False)
    terms = text.token_loss([image(x), text(words)], [x, words])
    sum(a / b for a, b in terms.values()).backward()
    expected = gradients(text)
    clear(text)
    step = GradCache([image, text], lambda a, b: (torch.zeros(()), "more"), chunk_size=4, token_loss_fn=text.token_loss)
    loss, more, parts = step(x, words)
    assert more == "more"
    torch.testing.assert_close(loss, sum(parts.values()))
    assert_same(gradients(text), expected, 2e-6)


def test_no_token_at_all_is_zero() -> None:
    image, text = Encoder(), Captioner()
    x, words = batch()
    words["labels"] = torch.full_like(words["labels"], -100)
    _, parts = GradCache([image, text], plain_infonce, chunk_size=4, token_loss_fn=text.token_loss)(x, words)
    assert parts["mlm"] == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(image, text))


def _wrong(out: Any, **options: Any) -> Any:
    image, text = Encoder(), Captioner()
    x, words = batch()
    options = {"chunk_size": 4, "token_loss_fn": lambda outputs, inputs: out, **options}
    return GradCache([image, text], plain_infonce, **options)(x, words)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(()), TypeError, r"token_loss_fn: token_loss: expected \(sum, count\)"),
        ((1.0, 2), TypeError, "token_loss_fn: token_loss: expected"),
        ((torch.zeros(3), 2), ValueError, "expected a sum, a floating-point scalar tensor, got .3."),
        ((torch.zeros((), dtype=torch.int64), 2), ValueError, "expected a sum"),
        ((torch.zeros(()), "two"), TypeError, "expected a count, a number or a scalar tensor"),
        ({}, ValueError, "token_loss_fn: output"),
        ({"mlm": torch.zeros(())}, TypeError, "token_loss_fn: mlm"),
    ],
)
def test_mistakes(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _wrong(out)


def test_mistakes_between_chunks_and_encoders() -> None:
    with pytest.raises(ValueError, match="chunk_size: expected the same for every encoder"):
        _wrong(None, chunk_size=[4, 3])
    names = iter("abc")
    with pytest.raises(ValueError, match="expected the objectives of the first chunk"):
        _wrong(None, token_loss_fn=lambda outputs, inputs: {next(names): (outputs[0].sum(), 1)})
    image, text = Encoder(), Captioner()
    x, words = batch()
    step = GradCache([image, text], plain_infonce, chunk_size=4, token_loss_fn=text.token_loss)
    with pytest.raises(ValueError, match=r"inputs\[1\]\['ids'\]: expected 9 samples like inputs\[0\]"):
        step(x[:9], words)
    with pytest.raises(TypeError, match=r"encoders\[0\]: output: expected .* or a tuple that begins with one"):
        GradCache([lambda x: [x], text], plain_infonce, chunk_size=4, token_loss_fn=text.token_loss)(x, words)

"""Write a text token by token: each time the token that a next-token objective holds for the most likely.

The other streams are encoded once; the fusion runs again for each token, over the samples that have not ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.tokenizer import BOS, EOS
from mmkernels.pretrain.tokens import Tokens

__all__ = ["context_of", "generate", "go_on", "prompts_of", "writer"]


def generate(model: Any, objective: str, batch: Batch, most_tokens: int) -> list[list[int]]:
    """Go on with a text of each sample, greedily.

    Args:
        model: a `Model` in evaluation mode, without gradients.
        objective: name of a `NextToken`, whose stream is written.
        batch: of S samples. Their tokens of that stream are what the text begins with; a text without tokens begins
            with the begin token. The other streams are read.
        most_tokens: the longest that is written.

    Returns:
        for each sample the ids that follow, up to the end token and with it. One that does not end with it has reached
        `most_tokens`.

    Raises:
        ValueError: the model has no such objective, or `most_tokens` is not positive.
    """
    prompts = prompts_of(model, batch, objective)
    return go_on(model, objective, context_of(model, batch, objective), prompts, most_tokens)


def writer(model: Any, objective: str) -> Any:
    """The objective that writes. Raises ValueError if the model has none of this name, or one that cannot."""
    able = [name for name, each in model.objectives.items() if hasattr(each, "following")]
    if objective not in able:
        have = f"one of the objectives of next tokens ({', '.join(able) or 'there are none'})"
        raise ValueError(f"objective: expected {have}, got {objective!r}")
    return model.objectives[objective]


def prompts_of(model: Any, batch: Batch, objective: str) -> list[list[int]]:
    """The ids of each sample in the stream that the objective writes."""
    packed = batch[writer(model, objective).stream]
    ids = packed.tokens.tolist()
    return [ids[begin:end] for begin, end in pairwise(packed.cu_seqlens_host)]


def context_of(model: Any, batch: Batch, objective: str) -> dict[str, Tokens]:
    """The tokens, before fusion, of all streams but the one that the objective writes."""
    written = writer(model, objective).stream
    return {name: _encoded(model, name, batch[name]) for name in model.encoded if name != written}


def go_on(
    model: Any, objective: str, context: Mapping[str, Tokens], prompts: Sequence[Sequence[int]], most_tokens: int
) -> list[list[int]]:
    """As `generate`, from the tokens of the other streams.

    Args:
        context: of S samples, see `context_of`; none for a model of the one stream.
        prompts: S lists of ids; an empty one stands for the begin token.
    """
    if most_tokens < 1:
        raise ValueError(f"most_tokens: expected at least 1, got {most_tokens}")
    part = writer(model, objective)
    device = next(part.parameters()).device
    texts = [list(prompt) or [BOS] for prompt in prompts]
    begun = [len(text) for text in texts]
    going = list(range(len(texts)))
    for _ in range(most_tokens):
        if not going:
            break
        packed = PackedBatch.from_samples([torch.tensor(texts[sample]) for sample in going]).to(device)
        chosen = _following(model, part, context, packed).argmax(1).tolist()
        for sample, token in zip(going, chosen, strict=True):
            texts[sample].append(token)
        kept = [place for place, token in enumerate(chosen) if token != EOS]
        if len(kept) < len(going):
            going = [going[place] for place in kept]
            samples = torch.tensor(kept, dtype=torch.int64, device=device)
            context = {name: tokens.take(samples) for name, tokens in context.items()}
    return [text[begin:] for text, begin in zip(texts, begun, strict=True)]


def _following(model: Any, part: Any, context: Mapping[str, Tokens], packed: PackedBatch) -> Tensor:
    """[S, V]: logits of the token after each text."""
    tokens = {**context, part.stream: _encoded(model, part.stream, packed)}
    fused = {**tokens, **(model.fusion(tokens) if model.fusion is not None else {})}
    logits: Tensor = part.following(fused[part.stream])
    return logits


def _encoded(model: Any, stream: str, packed: PackedBatch) -> Tokens:
    encoder = model.encoder(stream)
    return Tokens(encoder(packed), encoder.encoder.layout(packed))

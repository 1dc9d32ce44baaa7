"""Pairing across a batch that lies on several ranks: who is paired, and the tokens of samples that others hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import sample_negatives
from mmkernels.pretrain.roster import Roster
from mmkernels.pretrain.tokens import Layout, Tokens

__all__ = ["partners"]


def partners(
    streams: Mapping[str, tuple[Tensor, Tokens]], roster: Roster, scale: float, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tokens]]:
    """Draw for each sample a wrong partner in either of two streams, by similarity.

    Args:
        streams: of both, embeddings [S, E] and tokens of this rank's samples.
        roster: the samples to draw from.
        scale, generator: as in `hard_negatives`.

    Returns:
        by stream: int64 [S], where the partner of each of this rank's samples is in the tokens, -1 for none; and the
        tokens of this rank's samples and of the partners that others hold.
    """
    rows = {name: roster.rows(embeddings.detach()) for name, (embeddings, _) in streams.items()}
    x, y = rows.values()
    every = hard_negatives(((y, x), (x, y)), roster, roster.present(*streams), scale, generator)
    wrong, pool = {}, {}
    for (name, (_, tokens)), chosen in zip(streams.items(), every, strict=True):
        pool[name], places = pooled(tokens, roster, chosen)
        wrong[name] = _or_none(places, _or_none(chosen, roster.mine)).to(rows[name].device)
    return wrong, pool


def _or_none(values: Tensor, at: Tensor) -> Tensor:
    """Values at some places; at place -1, for none, -1."""
    return F.pad(values, (0, 1), value=-1)[at]


@torch.no_grad()
def hard_negatives(
    ways: Sequence[tuple[Tensor, Tensor]],
    roster: Roster,
    present: Tensor,
    scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Draw for each sample others by similarity, the same on all ranks.

    Args:
        ways: n pairs (queries, keys) [B, E] of the whole batch.
        roster: its samples; those of the same concept are never drawn.
        present: bool [B] on the host: the samples that take part.
        scale: factor of the similarities.
        generator: on the host, in the same state on all ranks.

    Returns:
        int64 [n, B] on the host: whose key each query gets, -1 for a sample without any.
    """
    wrong, both = torch.full((len(ways), roster.samples), -1), torch.nonzero(present).flatten()
    concepts = roster.concepts[both]
    for row, (queries, keys) in zip(wrong, ways, strict=True):
        if bool((concepts != concepts[:1]).any()):
            at, ids = both.to(keys.device), concepts.to(keys.device)
            drawn = sample_negatives(queries[at], keys[at], scale, query_ids=ids, key_ids=ids, generator=generator)
            chosen = drawn.cpu()
            row[both] = torch.where(chosen >= 0, both[chosen.clamp(min=0)], -1)
    return roster.ranks.of_rank_0(wrong)  # where similarities are rounded otherwise, ranks could draw others


def pooled(tokens: Tokens, roster: Roster, wanted: Tensor) -> tuple[Tokens, Tensor]:
    """This rank's samples of a stream, and after them those of others that it wants. Gradients go back to their ranks.

    Args:
        tokens: of this rank's S samples.
        roster: the B samples of the batch.
        wanted: int64 [B] on the host: for every sample of the batch the one that its rank wants, -1 for none; the same
            on all ranks, so that nobody has to ask.

    Returns:
        the tokens, and int64 [B]: where each sample of the batch is among them, -1 for those that are not there.
    """
    ranks, places = roster.ranks, torch.full((roster.samples,), -1)
    own = roster.mine >= 0
    places[roster.mine[own]] = torch.nonzero(own).flatten()
    if ranks.group is None:
        return tokens, places
    asking = torch.nonzero(wanted >= 0).flatten()
    pairs = torch.stack([roster.owners[asking], wanted[asking]], 1).unique(dim=0)  # (who wants, which), sorted
    wants, which = pairs.unbind(1)
    holds = roster.owners[which]
    lengths = roster.rows(tokens.cu_seqlens.diff().cpu().long())  # of what the encoder returned

    leaving = (holds == ranks.rank) & (wants != ranks.rank)
    arriving = (wants == ranks.rank) & (holds != ranks.rank)
    sent = tokens.take(places[which[leaving]].to(tokens.cu_seqlens.device))
    order = holds[arriving].argsort(stable=True)  # rows come rank by rank
    here = which[arriving][order]

    def dealt(rows: Tensor) -> Tensor:
        to = _totals(wants[leaving], lengths[which[leaving]], ranks.size)
        return ranks.dealt(rows, to, _totals(holds[arriving], lengths[which[arriving]], ranks.size))

    ends = lengths[here].cumsum(0) + tokens.layout.cu_seqlens_host[-1]
    host = (*tokens.layout.cu_seqlens_host, *ends.tolist())
    media = tokens.layout.media
    layout: Layout = replace(
        tokens.layout,
        cu_seqlens=torch.tensor(host, dtype=torch.int32, device=tokens.cu_seqlens.device),
        cu_seqlens_host=host,
        media=None if media is None else torch.cat([media, dealt(sent.layout.media)]),  # type: ignore[arg-type]
    )
    places[here] = tokens.samples + torch.arange(len(here))
    return Tokens(torch.cat([tokens.x, dealt(sent.x)]), layout), places


def _totals(ranks: Tensor, numbers: Tensor, size: int) -> list[int]:
    """The sum of the numbers that belong to each of so many ranks."""
    found: list[int] = torch.zeros(size, dtype=torch.int64).index_add_(0, ranks, numbers).tolist()
    return found

"""Embeddings that go to other ranks while this one encodes its other streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmkernels import Machine, gather_keys
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.ranks import Ranks

__all__ = ["Ahead"]

_SHARE = 0.25  # of the memory that these may take with their gradients: as when `infonce` chooses


class Ahead:
    """Begins the exchange of the keys of a model's contrastive objectives as soon as their stream is encoded.

    Args:
        model: one that embeds its streams alone; in others, embeddings come with the loss.
        ranks: who train together.
        device: of this rank.
    """

    def __init__(self, model: Model, ranks: Ranks, device: torch.device) -> None:
        self.model = model
        self._most = _SHARE * float(ranks.table([Machine.of(device).memory]).min())

    def of(self, batch: Batch, objectives: Iterable[str]) -> Callable[[int, Tensor], None] | None:
        """What gradient caching tells of the encoders of a step; None if there is nothing to send.

        Args:
            batch: of the step.
            objectives: names of those in use.
        """
        roster, sent = batch.roster, set()
        for name in objectives:
            part: Any = getattr(self.model.objectives[name], "part", None)
            sent |= {(stream, *part.compares) for stream in getattr(part, "keys", ())}
        if roster.ranks.group is None or not sent:
            return None

        def embedded(number: int, rows: Tensor) -> None:
            stream = self.model.encoded[number]
            for key in sorted(sent):
                if key[0] == stream and self.model.encoder(stream).pooled:
                    there = roster.present(*key[1:])
                    counts = torch.bincount(roster.owners[there], minlength=roster.ranks.size).tolist()
                    size = 2 * len(counts) * max(counts) * rows.shape[1] * rows.element_size()
                    if size <= self._most and any(counts):
                        own = (roster.mine >= 0) & there[roster.mine]  # on the host: nobody waits for the encoder
                        mine = rows if own.all() else rows[torch.nonzero(own).flatten().to(rows.device)]
                        roster.sent[key] = gather_keys(mine, roster.ranks.group, counts=counts)

        return embedded

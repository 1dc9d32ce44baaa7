"""Pack the samples of a batch in a recipe of torchtune, in the form of its `PackedDataset` and `padded_collate_packed`.

DataLoader(dataset, batch_size=64, collate_fn=PackedCollator(4096), shuffle=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch, plan_packing

__all__ = ["PackedCollator"]


class PackedCollator:
    """Samples {"tokens", "labels"} to rows of `max_seq_len` tokens, as few as the plan finds.

    Tokens, labels, input_pos and what follows from seq_lens are those of torchtune, with two differences. torchtune
    shifts the labels of a whole row, so that the last token of a sample would be trained to predict the first of the
    next: the first label of each sample is -100 here. And positions in padding begin again, as padding is a sample of
    its own; nothing attends to it.

    Args:
        max_seq_len: tokens of every row.
        padding_idx: token of the padding.
        strategy, oversize: of `plan_packing`; "own_pack" is an error, since rows are equally long. With
            oversize="drop", `dropped` counts the samples that were left out.
        mask: give "mask" [rows, T, T] bool, True where a query sees a key: the samples' own, causal. False: give
            "seq_lens" instead, for torchtune's `packed_block_causal_mask`, which makes a BlockMask of it on a GPU.
    """

    def __init__(
        self,
        max_seq_len: int,
        *,
        padding_idx: int = 0,
        strategy: str = "auto",
        oversize: str = "error",
        mask: bool = True,
    ) -> None:
        if oversize not in ("error", "drop"):
            raise ValueError(f"oversize: expected 'error' or 'drop', got {oversize!r}")
        plan_packing([], max_seq_len, strategy=strategy)  # checks them
        self.max_seq_len, self.padding_idx, self.strategy = max_seq_len, padding_idx, strategy
        self.oversize, self.mask, self.dropped = oversize, mask, 0

    def __call__(self, samples: Sequence[Mapping[str, Any]], items: Sequence[int] | None = None) -> dict[str, Any]:
        """A batch of rows: tokens, labels and input_pos [rows, T] int64, and mask or seq_lens.

        As `collate` of a `PackedDataset` it gets a planned pack and its item numbers, which fit in one row.

        Raises:
            KeyError: a sample without tokens or labels.
            ValueError: one that is too long, with oversize="error"; labels that are not as many as the tokens; no
                samples.
        """
        tokens, labels = ([_ids(sample[key]) for sample in samples] for key in ("tokens", "labels"))
        plan = plan_packing(
            [len(each) for each in tokens], self.max_seq_len, strategy=self.strategy, oversize=self.oversize
        )
        self.dropped += len(plan.dropped)
        if not plan.num_packs:
            raise ValueError(
                f"samples: expected at least one to pack, got {len(samples)}, {len(plan.dropped)} too long"
            )
        rows = [
            PackedBatch.from_samples(
                [tokens[item] for item in pack.tolist()],
                labels=[_without_first(labels[item]) for item in pack.tolist()],
                capacity=self.max_seq_len,
                pad_token=self.padding_idx,
            )
            for pack in plan
        ]
        batch: dict[str, Any] = {
            "tokens": torch.stack([row.tokens for row in rows]),
            "labels": torch.stack([row.labels for row in rows if row.labels is not None]),
            "input_pos": torch.stack([row.position_ids for row in rows]),
        }
        if self.mask:
            batch["mask"] = torch.stack([_block_causal(row) for row in rows])
        else:
            batch["seq_lens"] = [torch.tensor(row.lengths) for row in rows]
        return batch


def _ids(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _without_first(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[:1] = -100
    return labels


def _block_causal(row: PackedBatch) -> Tensor:
    """[T, T]: the token's own segment up to itself."""
    begins = torch.tensor(row.cu_seqlens_host[:-1]).repeat_interleave(torch.tensor(row.lengths))
    at = torch.arange(row.num_tokens)
    return (at <= at[:, None]) & (at >= begins[:, None])

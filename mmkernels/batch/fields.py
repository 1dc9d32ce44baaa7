"""The fields of a packed batch, on which build, check, loss and export work; `PackedBatch` adds methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mmkernels.batch.media import PackedMedia

__all__ = ["IGNORE_LABEL", "NO_SAMPLE", "NO_SPAN", "PackedFields"]

# F.cross_entropy's default ignore_index; the sample id of padding; the span id of text.
IGNORE_LABEL = -100
NO_SAMPLE = -1
NO_SPAN = -1


@dataclass(frozen=True, eq=False)
class PackedFields:
    """The fields of a `PackedBatch`, whose docstring describes them, and the counts that follow from them."""

    tokens: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]
    sample_ids: Tensor
    position_ids: Tensor
    modality_ids: Tensor
    span_ids: Tensor
    padding: int = 0
    labels: Tensor | None = None
    loss_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    media: Mapping[int, PackedMedia] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.shape[0]

    @property
    def num_segments(self) -> int:
        """Samples, plus one if there is padding."""
        return len(self.cu_seqlens_host) - 1

    @property
    def num_samples(self) -> int:
        """S."""
        return self.num_segments - (self.padding > 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        host = self.cu_seqlens_host
        return tuple(end - begin for begin, end in itertools.pairwise(host))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment, padding included; 0 in an empty batch."""
        return max(self.lengths, default=0)

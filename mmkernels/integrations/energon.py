"""Packing in the task encoder of Megatron-Energon, over `plan_packing` and `PackedBatch`.

class Encoder(PackingMixin, DefaultTaskEncoder):
    def encode_sample(self, sample): ...  # -> a Sample with tokens

get_train_dataset(path, task_encoder=Encoder(capacity=4096), packing_buffer_size=1000, batch_size=None, ...)
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from megatron.energon import Sample, stateless
from megatron.energon.edataclass import edataclass
from megatron.energon.errors import FatalSampleError
from torch import Tensor

from mmkernels import plan_packing
from mmkernels.integrations.torch_collate import Collate, PackCollator, as_tokens

__all__ = ["PackedSample", "PackingMixin"]


@edataclass
class PackedSample(Sample):
    """What `PackingMixin` makes of a pack. Its `__key__` lists those of its samples.

    Attributes:
        batch: what `collate` returned, by default a `PackedBatch`.
    """

    batch: Any


class PackingMixin:
    """`select_samples_to_pack` and `pack_selected_samples` of a task encoder; to be named before its other bases.

    A sample as `encode_sample` returns it is a mapping, or a dataclass such as Energon's `Sample`, which `collate` and
    `length` get as a mapping of its fields. A buffer of `packing_buffer_size` samples is planned at a time. Packs come
    one by one with `batch_size=None`, or, as with `batch_size=1`, in a batch of one, which is the pack itself.

    Energon logs most errors of the hooks and goes on without the buffer. Those of the plan and of collating are fatal
    here, because they concern every sample of it.

    Args:
        capacity: most tokens in a pack, and tokens of every batch of the default collator.
        collate: (samples, their numbers in the pack) -> batch; default `PackCollator(capacity)`. It must be
            deterministic, so that Energon can restore packs.
        length: the tokens of a sample; default that of its field "tokens".
        strategy, max_samples, oversize, seed: of `plan_packing`. With oversize="drop" a warning counts and names what
            is left out.
        *args, **kwargs: of the task encoder.
    """

    def __init__(
        self,
        *args: Any,
        capacity: int,
        collate: Collate | None = None,
        length: Callable[[Any], int] | None = None,
        strategy: str = "auto",
        max_samples: int | None = None,
        oversize: str = "error",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.capacity = capacity
        self._plan: Any = {"strategy": strategy, "max_samples": max_samples, "oversize": oversize, "seed": seed}
        plan_packing([], capacity, **self._plan)  # checks the arguments before there are samples
        self._collate: Collate = PackCollator(capacity, oversize=oversize == "own_pack") if collate is None else collate
        self._length = _tokens_of if length is None else length

    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        """The packs of a buffer.

        Raises:
            FatalSampleError: a sample that is too long, with oversize="error", or whose length cannot be told.
        """
        try:
            lengths = [int(self._length(_fields(sample))) for sample in samples]
            plan = plan_packing(lengths, self.capacity, **self._plan)
        except Exception as error:
            raise FatalSampleError(f"select_samples_to_pack: {error}") from error
        if len(plan.dropped):
            keys = [_fields(samples[item]).get("__key__") for item in plan.dropped[:3].tolist()]
            warnings.warn(
                f"left out {len(plan.dropped)} of {len(samples)} samples, longer than capacity={self.capacity} tokens, "
                f"such as {keys}",
                stacklevel=2,
            )
        return [[samples[item] for item in pack.tolist()] for pack in plan]

    @stateless
    def pack_selected_samples(self, samples: list[Any]) -> PackedSample:
        """One pack.

        Raises:
            FatalSampleError: samples that cannot be collated.
        """
        fields = [_fields(sample) for sample in samples]
        try:
            batch = self._collate(fields, range(len(samples)))
        except Exception as error:
            raise FatalSampleError(f"pack_selected_samples: {error}") from error
        return PackedSample(
            __key__=",".join(str(each.get("__key__")) for each in fields),
            __restore_key__=(),
            __sources__=tuple(source for each in fields for source in each.get("__sources__") or ()) or None,
            batch=batch,
        )

    def batch(self, samples: list[PackedSample]) -> PackedSample:
        """The pack itself.

        Raises:
            FatalSampleError: several packs.
        """
        if len(samples) != 1:
            raise FatalSampleError(f"batch: expected packs one by one (batch_size=1 or None), got {len(samples)}")
        return samples[0]


def _fields(sample: Any) -> Mapping[str, Any]:
    if isinstance(sample, Mapping):
        return sample
    if not dataclasses.is_dataclass(sample):
        raise FatalSampleError(f"expected samples that are mappings or dataclasses, got {type(sample).__name__}")
    return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}


def _tokens_of(sample: Mapping[str, Any]) -> int:
    if "tokens" not in sample:
        raise KeyError(f"expected a field 'tokens', or length= and collate=, got {sorted(sample)}")
    tokens = as_tokens(sample["tokens"])
    if not isinstance(tokens, Tensor):
        raise TypeError(f"length: expected a function of the sample, as its tokens are a {type(tokens).__name__}")
    return len(tokens)

"""How a model lies on several ranks, and when its gradients are reduced: whole on each, or in shards.

A step of a sharded model gathers all of it once, since gradient caching runs every encoder several times, and an
all-gather per chunk would cost more than it saves. Weights, gradients and the optimizer's state are in shards between
steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.launch import shards_of
from mmkernels.pretrain.layers import Block
from mmkernels.pretrain.ranks import Ranks

__all__ = ["Placed", "placed"]


class Placed:
    """A model on one rank.

    Args:
        model: that learns.
        ranks: who train it together.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def encoders(self, modules: Sequence[nn.Module]) -> list[Callable[..., Any]]:
        """Some modules of the model, as gradient caching is to run them."""
        return list(modules)

    def learn_others(self) -> None:
        """Other parameters learn from here on, and `encoders` has to be asked again."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every parameter of the model and of what follows it can be read, in the precision of the run."""
        yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward of a step; afterwards gradients are those of the whole batch."""
        yield

    def traffic(self) -> float:
        """Bytes that a rank receives of others' gradients and weights in a step."""
        return 0.0

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Parameters that one call of an optimizer can take together."""
        return [list(parameters)]

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale gradients down to a norm of at most `most`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, most)


class Replicated(Placed):
    """Whole on each rank, with DistributedDataParallel."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self.learn_others()

    def learn_others(self) -> None:
        """A reducer knows the parameters that learnt when it was made. After its first backward it arranges them anew,
        by the order in which they came, and how sums over ranks are rounded depends on that. So the first backward is
        always this one: a run that is resumed has the same sums."""
        known = inspect.signature(DistributedDataParallel).parameters
        synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # up to torch 2.12
        options: dict[str, Any] = {synced: False, "gradient_as_bucket_view": True}
        self._wrapper = DistributedDataParallel(_Through(self.model), process_group=self.ranks.group, **options)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._wrapper(partial(_nothing_of, learning)).backward()
        self.model.zero_grad(set_to_none=True)

    def encoders(self, modules: Sequence[nn.Module]) -> list[Callable[..., Any]]:
        return [partial(self._wrapper, module) for module in modules]

    def traffic(self) -> float:
        return (
            2 * (self.ranks.size - 1) / self.ranks.size * _bytes(p for p in self.model.parameters() if p.requires_grad)
        )


class Sharded(Placed):
    """In shards over the ranks of a mesh, with `fully_shard`.

    Args:
        model, ranks: as for `Placed`.
        mesh: one dimension to shard over; or two, to replicate over the first.
        followers: modules that follow it, in shards too.
        low: dtype of the gathered parameters; None: as they are. Gradients are reduced in float32.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, mesh: Any, followers: Sequence[nn.Module], low: torch.dtype | None
    ) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes a second

        super().__init__(model, ranks)
        self._across, self._within = [1, *mesh.shape][-2:]
        self._narrowed = 1.0 if low is None else low.itemsize / torch.float32.itemsize
        self._followers, self._low, self._device = followers, low, next(model.parameters()).device.type
        # Inputs stay as they are: autocast takes what it wants in low precision, and rotary tables must be in float32.
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False
        )
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": False, "mp_policy": policy}
        self._through = _Through(model)
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block, **options, ignored_params=_scalars(block))
        for module in (self._through, *followers):
            fully_shard(module, **options, ignored_params=_scalars(module))
        self._shards: list[Any] = [
            module for top in (self._through, *followers) for module in top.modules() if isinstance(module, FSDPModule)
        ]
        self._learning = [module for module in self._through.modules() if isinstance(module, FSDPModule)]

    def encoders(self, modules: Sequence[nn.Module]) -> list[Callable[..., Any]]:
        return [partial(self._through, module) for module in modules]

    @contextmanager
    def whole(self) -> Iterator[None]:
        for module in self._shards:
            module.unshard(async_op=True)
        for module in self._shards:
            module.unshard()
        try:
            with torch.autocast(self._device, self._low, enabled=self._low is not None):
                yield
        finally:
            for module in self._shards:
                module.reshard()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Gradients add up until the end, where all ranks reduce them in the same order, whatever each has used."""
        with self.whole():
            self._reduce(False)
            try:
                yield
            finally:
                self._reduce(True)
            self._close()

    def traffic(self) -> float:
        across, within = self._across, self._within
        every = (p for module in (self.model, *self._followers) for p in module.parameters())
        gathered = _bytes(every) * self._narrowed * (within - 1) / within
        learning = _bytes(p for p in self.model.parameters() if p.requires_grad)
        return gathered + learning * ((within - 1) / within + 2 * (across - 1) / across / within)

    def _reduce(self, on: bool) -> None:
        for module in self._learning:
            module.set_requires_gradient_sync(on, recurse=False)
            module.set_reshard_after_backward(on, recurse=False)

    def _close(self) -> None:
        parameters = [p for p in self._through.parameters() if p.requires_grad]
        waiting = self._accumulated()
        used = torch.tensor([p.grad is not None or id(p) in waiting for p in parameters], dtype=torch.int64)
        anyone = (self.ranks.total(used) > 0).tolist()
        if any(anyone):  # what another rank has used gets zeros; what none has, nothing
            wanted = [p for p, so in zip(parameters, anyone, strict=True) if so]
            self._through(partial(_nothing_of, wanted)).backward()
        for parameter in parameters:
            if parameter.ndim == 0 and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.ranks.group)
                parameter.grad /= self.ranks.size

    def _accumulated(self) -> set[int]:
        """The parameters whose gradient waits in the dtype of the reduction."""
        groups = [module._get_fsdp_state()._fsdp_param_group for module in self._learning]
        shards = [shard for group in groups if group is not None for shard in group.fsdp_params]
        return {id(shard._unsharded_param) for shard in shards if shard.unsharded_accumulated_grad is not None}

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        every = list(parameters)
        split = [[p for p in every if p.ndim], [p for p in every if not p.ndim]]
        return [group for group in split if group]

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        norms = []
        for group in self.groups(p for p in parameters if p.grad is not None):
            norm: Any = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        for group in self.groups(parameters):
            nn.utils.clip_grads_with_norm_(group, most, total)
        return total


class _Through(nn.Module):
    """Runs any part of a model as its own forward, so that one wrapper serves them all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Callable[..., Any], *inputs: Any) -> Any:
        return part(*inputs)


def _nothing_of(parameters: Sequence[Tensor]) -> Tensor:
    """A 0 that gives each a gradient of zeros."""
    return torch.stack([parameter.reshape(-1)[:0].sum().float() for parameter in parameters]).sum()


def _bytes(parameters: Iterable[Tensor]) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _scalars(module: nn.Module) -> set[nn.Parameter]:
    """They cannot be sharded."""
    return {parameter for parameter in module.parameters() if parameter.ndim == 0}


def placed(
    model: nn.Module, ranks: Ranks, config: Config, device: torch.device, followers: Sequence[nn.Module]
) -> Placed:
    """A model on its ranks, before an optimizer is made for its parameters.

    Args:
        model: the same on all ranks.
        ranks: who train it together.
        config: how.
        device: of this rank.
        followers: modules that follow the model's weights.
    """
    if ranks.group is None:
        return Placed(model, ranks)
    if config.parallel == "ddp":
        return Replicated(model, ranks)
    from torch.distributed.device_mesh import init_device_mesh

    shards = shards_of(config, ranks)
    shape = (shards,) if shards == ranks.size else (ranks.size // shards, shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    low = torch.bfloat16 if config.precision == "bfloat16" else None
    return Sharded(model, ranks, mesh, followers, low)

"""Keep fully_shard modules gathered for a whole step, so that no chunk communicates with other ranks.

Memory may run out on one rank alone, and peers that wait in an all-gather cannot be interrupted. So all ranks gather
the shards once, and everything is local until the last backward reduces gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mmkernels.ops.checks import not_yet

__all__ = ["Shards"]


class Shards:
    """The FSDP2 state of modules. FSDP2's private names are used only here.

    Args:
        modules: those that `fully_shard` was applied to, outer ones first, in the same order on every rank.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        self._states = list({id(s): s for s in (m._get_fsdp_state() for m in modules)}.values())

    def gather(self) -> None:
        """All-gather the parameters that are not gathered yet. Ranks must agree on which these are.

        Raises:
            NotImplementedError: parameters are also sharded in another way, so that every forward communicates.
        """
        from torch.distributed.tensor import DTensor  # takes a second to import: only where something is sharded

        for module in self._modules:
            module.unshard()
        if any(isinstance(p, DTensor) for module in self._modules for p in module.parameters()):
            not_yet("chunk_size", "auto, with fully_shard over tensor parallelism")

    def stay_gathered(self) -> bool:
        """Whether no forward communicates: everything is gathered, and is not sharded again after a forward."""
        return all(group.is_unsharded and group.post_forward_mesh_info is None for _, group in self._groups())

    def syncing(self) -> list[tuple[bool, bool]]:
        """Of each module: (whether its backward reduces gradients, whether it shards again after that)."""
        of = {id(state): (group.reduce_grads, group.reshard_after_backward) for state, group in self._groups()}
        return [of.get(id(module._get_fsdp_state()), (True, True)) for module in self._modules]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a forward does not reshard; afterwards everything is sharded again."""
        before = [(state, group, group.post_forward_mesh_info) for state, group in self._groups()]
        for _, group, _ in before:
            group.post_forward_mesh_info = None
        try:
            yield
        finally:
            for state, group, mesh in before:
                # The first forward determines the root module, whose parameters it leaves gathered.
                if not (state._is_root and getattr(state, "_auto_reshard_after_forward", True)):
                    group.post_forward_mesh_info = mesh
            self.reset()
            for module in self._modules:
                module.reshard()

    def reset(self) -> None:
        """Prepare for a forward after an interrupted pass. FSDP2's own reset would drop gathered parameters."""
        if not self._states:
            return
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        for _, group in self._groups():
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()
        for state in self._states:
            state._training_state = TrainingState.IDLE
            getattr(state, "_modules_to_run_forward", set()).clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each parameter, sharded and, once gathered, unsharded; a module exposes one of the two at a time."""
        for shard in self._sharded():
            yield shard.sharded_param
            if hasattr(shard, "_unsharded_param"):
                yield shard._unsharded_param

    def meshes(self) -> set[Any]:
        """The device meshes that parameters are sharded over, gathered or not (as an evaluation leaves a root)."""
        return {shard.sharded_param.device_mesh for shard in self._sharded()}

    def accumulated(self) -> list[tuple[Any, Any]]:
        """[(shard, gradient or None)]: unsharded gradients that await reduction, in the reduction's dtype."""
        return [(shard, shard.unsharded_accumulated_grad) for shard in self._sharded()]

    def _sharded(self) -> Iterable[Any]:
        return (shard for _, group in self._groups() for shard in group.fsdp_params)

    def _groups(self) -> list[tuple[Any, Any]]:
        found = []
        for state in self._states:
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
            found += [(state, group) for group in groups]
        return found

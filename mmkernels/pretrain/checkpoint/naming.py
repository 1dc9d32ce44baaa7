"""The tensors of a module and of its optimizer by name: the same however they are wrapped, ordered or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["moments_of", "named", "put_moments", "room_for_moments", "weights_of"]

_WRAPPED = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_HOW = ("foreach", "fused", "capturable", "differentiable")  # of how to compute, not what: an optimizer keeps its own
_SHOWN = 5  # names in a message


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, which share its memory, by the names they have without DDP and `compile`.

    Args:
        module: plain, or any part of it wrapped in DistributedDataParallel, compiled or sharded by `fully_shard`, which
            gives DTensors.

    Raises:
        TypeError: its state has something else than tensors.
    """
    found: dict[str, Tensor] = {}
    wrappers = _wrappers(module)
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"module: expected tensors alone in its state, got {type(value).__name__} as {name}")
        found[_plain(name, wrappers)] = value
    return found


def moments_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer by the names of its parameters.

    Args:
        module: which has all of the parameters.
        optimizer: of some.

    Returns:
        (tensors by parameter and key, such as "model.bias.exp_avg"; what else it has: "groups" with the names and the
        settings of each, and "state" with the values that are not tensors, by parameter).

    Raises:
        ValueError: a parameter that the module lacks.
    """
    names = _names(module, optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        name = names[parameter]
        tensors |= {f"{name}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
        if others := {key: value for key, value in entries.items() if not isinstance(value, Tensor)}:
            values[name] = others
    groups = [{**_settings(group), "names": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "state": values}


def room_for_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> dict[str, Tensor]:
    """Tensors of undefined values for a stored state: on the device of the parameter and sharded as it is if they have
    its shape, else whole, on the CPU; and so is a number, which may count steps.

    Args:
        module, optimizer: as in `moments_of`.
        shapes: of the stored tensors, by the names that `moments_of` gives.

    Raises:
        ValueError: a state of a parameter that the optimizer lacks.
    """
    parameters = {name: parameter for parameter, name in _names(module, optimizer).items()}
    if unknown := [name for name in shapes if name.rpartition(".")[0] not in parameters]:
        raise ValueError(f"optimizer: expected the parameters of the checkpoint, got none for {_some(unknown)}")
    found = {}
    for name, (shape, dtype) in shapes.items():
        parameter = parameters[name.rpartition(".")[0]].detach()
        alike = parameter.shape == shape and parameter.ndim > 0
        found[name] = torch.empty_like(parameter, dtype=dtype) if alike else torch.empty(shape, dtype=dtype)
    return found


def put_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], others: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that `moments_of` returned of another one, whose groups may be in another order.

    Args:
        module, optimizer: as in `moments_of`.
        tensors, others: what it returned; tensors sharded as `room_for_moments` has them.

    Raises:
        ValueError: parameters of one group were in groups of different settings.
    """
    names = _names(module, optimizer)
    number = {name: i for i, name in enumerate(names.values())}
    state: dict[int, dict[str, Any]] = {number[name]: dict(more) for name, more in others["state"].items()}
    for name, tensor in tensors.items():
        of, _, key = name.rpartition(".")
        state.setdefault(number[of], {})[key] = tensor
    groups = []
    for group in optimizer.param_groups:
        settings = _stored_settings([names[p] for p in group["params"]], others["groups"]) or _settings(group)
        how = {key: group[key] for key in _HOW if key in group}
        groups.append({**settings, **how, "params": [number[names[p]] for p in group["params"]]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _stored_settings(names: list[str], groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the stored groups with these names; None if there is none."""
    members = set(names)
    found = [group for group in groups if members.intersection(group["names"])]
    settings = [{key: value for key, value in _settings(group).items() if key != "names"} for group in found]
    if any(each != settings[0] for each in settings):
        raise ValueError(
            f"optimizer: expected the groups of the checkpoint, got one of {_some(names)}, which had different settings"
        )
    return settings[0] if settings else None


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Any, str]:
    """Names of an optimizer's parameters, in its order."""
    known = {parameter: name for name, parameter in named(module).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := [parameter for parameter in parameters if parameter not in known]:
        shapes = _some([str(list(parameter.shape)) for parameter in strangers])
        raise ValueError(
            f"optimizer: expected parameters of the module, got {len(strangers)} others, of shape {shapes}"
        )
    return {parameter: known[parameter] for parameter in parameters}


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that `weights_of` gives."""
    wrappers = _wrappers(module)
    return {_plain(name, wrappers): parameter for name, parameter in module.named_parameters()}


def _wrappers(module: nn.Module) -> list[tuple[str, str]]:
    """(Prefix of names below a wrapper, the same without it), outermost first."""
    found = []
    for path, part in module.named_modules():
        if inner := _WRAPPED.get(type(part).__name__):
            stem = f"{path}." if path else ""
            found.append((f"{stem}{inner}.", stem))
    return found


def _plain(name: str, wrappers: list[tuple[str, str]]) -> str:
    for prefix, stem in reversed(wrappers):  # the inner ones first: their prefixes have those of the outer ones
        if name.startswith(prefix):
            name = stem + name[len(prefix) :]
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

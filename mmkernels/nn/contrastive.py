"""The contrastive losses with their learnable scale (and bias)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.ops.checks import deprecated_deterministic, real
from mmkernels.ops.contrastive import FalseNegatives, infonce, siglip

__all__ = ["InfoNCELoss", "SigLIPLoss"]


class _ContrastiveLoss(nn.Module):
    """Shared base of both losses: `log_scale`, its upper bound, normalisation, options of the function.

    The learnt scalars stay float32 under `.to(torch.bfloat16)`, `.half()` and the like: near log 14 = 2.66 bfloat16 has
    a spacing of 1/64, so optimizer steps of 1/1000 would be lost.
    """

    log_scale: Tensor

    def __init__(
        self,
        function: Callable[..., Any],
        init_scale: float,
        max_scale: float | None,
        learnable: bool,
        normalize: bool,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        init_scale = _positive("init_scale", init_scale)
        if max_scale is not None:
            max_scale = _positive("max_scale", max_scale)
            if max_scale < init_scale:
                raise ValueError(f"max_scale: expected None or at least init_scale={init_scale!r}, got {max_scale!r}")
        for name, value in (("learnable", learnable), ("normalize", normalize)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")
        self._accepted = [
            name for name, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY
        ]
        self._expect_known(options)
        deprecated_deterministic(options.pop("deterministic", None))
        self.max_scale = max_scale
        self.learnable = learnable
        self.normalize = normalize
        self.options = options
        self._starts: dict[str, float] = {}
        self._scalar("log_scale", math.log(init_scale))

    def _scalar(self, name: str, value: float) -> None:
        """Register a parameter, or a buffer if not learnable; both have the same name in the state dict."""
        self._starts[name] = value
        tensor = torch.tensor(value, dtype=torch.float32)
        if self.learnable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def reset_parameters(self) -> None:
        """Reset scale (and bias) to their initial values, as after `to_empty` from the meta device."""
        for name, value in self._starts.items():
            nn.init.constant_(getattr(self, name), value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Every move and cast of a module goes through here; scalars are never cast below float32."""

        def but_wide(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor.ndim == 0 and out.is_floating_point() and torch.finfo(out.dtype).bits < 32:
                return tensor.to(out.device, torch.float32)
            return out

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(but_wide, recurse=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Keep float32: with `assign=True` a bfloat16 checkpoint would bring its dtype along."""
        for name in self._starts:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point() and torch.finfo(value.dtype).bits < 32:
                state_dict[prefix + name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def scale(self) -> Tensor:
        """The factor of the similarities: exp(log_scale), at most `max_scale`; a differentiable scalar.

        Above the bound the value is the bound and the gradient is the one at the bound, so the scale can shrink again.
        `clamp` has a zero gradient there, which would trap the optimizer.
        """
        if self.max_scale is None:
            return self.log_scale.exp()
        beyond = (self.log_scale - math.log(self.max_scale)).clamp(min=0)
        return (self.log_scale - beyond.detach()).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp `log_scale` to its bound; call it after `optimizer.step()`.

        Without it the loss is the same, but the parameter may drift far above the bound and be slow to return.
        """
        if self.max_scale is not None:
            self.log_scale.clamp_(max=math.log(self.max_scale))

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        learnable = "" if self.learnable else "learnable=False, "
        return f"max_scale={self.max_scale}, {learnable}normalize={self.normalize}{options}"

    def _expect_known(self, options: dict[str, Any]) -> None:
        for name in options:
            if name not in self._accepted:
                raise TypeError(f"{name}: expected one of {', '.join(self._accepted)}, got an unknown argument")

    def _features(self, features: Tensor) -> Tensor:
        if not self.normalize:
            return features
        if not isinstance(features, Tensor) or features.ndim not in (2, 3) or not features.is_floating_point():
            return features  # the function will reject it by name
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(wide, dim=-1).to(features.dtype)

    def _arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The module's options and those of a call, with further features treated like queries and keys."""
        self._expect_known(arguments)
        deprecated_deterministic(arguments.pop("deterministic", None))
        merged = {**self.options, **arguments}
        filtered = merged.get("false_negatives")
        if isinstance(filtered, FalseNegatives):
            queries, keys = (self._features(x) for x in (filtered.guide_queries, filtered.guide_keys))
            negatives = None if filtered.guide_negatives is None else self._features(filtered.guide_negatives)
            merged["false_negatives"] = FalseNegatives(queries, keys, filtered.margin, filtered.kind, negatives)
        if merged.get("negatives") is not None:
            merged["negatives"] = self._features(merged["negatives"])
        teacher = merged.get("teacher")
        if isinstance(teacher, tuple) and len(teacher) == 3:
            merged["teacher"] = (self._features(teacher[0]), self._features(teacher[1]), teacher[2])
        return merged


class InfoNCELoss(_ContrastiveLoss):
    """`mmkernels.infonce` with a learnable scale: the CLIP loss.

    With `x̂ = x / |x|` (or x itself) and `s_ij = min(exp(log_scale), max_scale) · <x̂_i, ŷ_j>`:

        loss = 1/2N · sum_i [log sum_j exp(s_ij) - s_ii] + [log sum_j exp(s_ji) - s_ii]

    Args:
        init_scale: exp(log_scale) at the start, an inverse temperature.
        max_scale: the largest scale the loss uses, or None; call `clamp_()` after each optimizer step to hold the
            parameter itself to it.
        learnable: False keeps the initial scale: `log_scale` is then a buffer, not a parameter.
        normalize: divide every row (of queries, keys, `negatives`, the teacher's and the guide's features) by its
            Euclidean norm, taken in float32 (float64 for float64 features); the result has the features' dtype again. A
            row of zeros stays zero.
        **options: keyword arguments of `mmkernels.infonce` for every call, such as `label_smoothing=0.1`,
            `symmetric=False`, `group=...` or `backend="triton"`.

    Attributes:
        log_scale: a float32 scalar, in the state dict whether learnable or not. It stays float32 when the module is
            cast to bfloat16 or float16. Keep it out of weight decay, in its own parameter group (which DeepSpeed
            requires for another dtype), and in the `ignored_params` of fully_shard, which takes no scalars.
        scale: the scale in use.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or an option that the function does not have.

    Source: Radford et al. 2021 (arXiv:2103.00020).
    """

    def __init__(
        self,
        *,
        init_scale: float = 1 / 0.07,
        max_scale: float | None = 100.0,
        learnable: bool = True,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(infonce, init_scale, max_scale, learnable, normalize, options)

    def forward(self, queries: Tensor, keys: Tensor, **arguments: Any) -> Any:
        """The loss of a batch.

        Args:
            queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i unless `targets` or ids say
                otherwise.
            keys: [M, E], same dtype and device.
            **arguments: keyword arguments of `mmkernels.infonce` for this call; they win over the module's.

        Returns:
            what `mmkernels.infonce` returns: the loss, a scalar in float32 (float64 for float64 features).

        Raises what `mmkernels.infonce` raises.
        """
        return infonce(self._features(queries), self._features(keys), self.scale, **self._arguments(arguments))


class SigLIPLoss(_ContrastiveLoss):
    """`mmkernels.siglip` with a learnable scale and bias.

    With `x̂ = x / |x|` (or x itself) and `s = min(exp(log_scale), max_scale)`:

        loss = -1/N · sum_ij log sigmoid(z_ij · (s · <x̂_i, ŷ_j> + logit_bias)),  z_ij = +1 if i == j else -1

    Args:
        init_scale: exp(log_scale) at the start.
        init_bias: logit_bias at the start, well below zero because negatives far outnumber positives.
        max_scale: the largest scale the loss uses, or None; call `clamp_()` after each optimizer step to hold the
            parameter itself to it.
        learnable: False keeps the initial scale and bias: both are then buffers, not parameters.
        normalize: divide every row by its Euclidean norm, taken in float32 (float64 for float64 features); the result
            has the features' dtype again. A row of zeros stays zero.
        **options: keyword arguments of `mmkernels.siglip` for every call, such as `group=...` or `backend="triton"`.

    Attributes:
        log_scale, logit_bias: float32 scalars, in the state dict whether learnable or not. They stay float32 when the
            module is cast to bfloat16 or float16. Keep them out of weight decay, in their own parameter group (which
            DeepSpeed requires for another dtype), and in the `ignored_params` of fully_shard, which takes no scalars.
        scale: the scale in use.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or an option that the function does not have.

    Source: Zhai et al. 2023 (arXiv:2303.15343).
    """

    logit_bias: Tensor

    def __init__(
        self,
        *,
        init_scale: float = 10.0,
        init_bias: float = -10.0,
        max_scale: float | None = None,
        learnable: bool = True,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(siglip, init_scale, max_scale, learnable, normalize, options)
        self._scalar("logit_bias", _finite("init_bias", init_bias))

    def forward(self, queries: Tensor, keys: Tensor, **arguments: Any) -> Any:
        """The loss of a batch.

        Args:
            queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i.
            keys: [N, E], same dtype and device.
            **arguments: keyword arguments of `mmkernels.siglip` for this call; they win over the module's.

        Returns:
            what `mmkernels.siglip` returns: the loss, a scalar in float32 (float64 for float64 features).

        Raises what `mmkernels.siglip` raises.
        """
        x, y = self._features(queries), self._features(keys)
        return siglip(x, y, self.scale, self.logit_bias, **self._arguments(arguments))


def _finite(name: str, value: Any) -> float:
    number = real(name, value, "a number")
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def _positive(name: str, value: Any) -> float:
    number = _finite(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


# torch.load with weights_only=True then accepts whole loss modules too; they contain no other modules.
torch.serialization.add_safe_globals([InfoNCELoss, SigLIPLoss])

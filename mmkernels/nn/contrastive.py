"""The contrastive losses with their learnable scale (and bias)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.ops.contrastive import infonce, siglip

__all__ = ["InfoNCELoss", "SigLIPLoss"]


class _ContrastiveLoss(nn.Module):
    """What both losses share: `log_scale`, its upper bound, normalisation, options of the function."""

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
        _expect_positive("init_scale", init_scale)
        if max_scale is not None:
            _expect_positive("max_scale", max_scale)
            if max_scale < init_scale:
                raise ValueError(f"max_scale: expected None or at least init_scale={init_scale!r}, got {max_scale!r}")
        for name, value in (("learnable", learnable), ("normalize", normalize)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")
        self._accepted = [
            name for name, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY
        ]
        self._expect_known(options)
        self.max_scale = max_scale
        self.learnable = learnable
        self.normalize = normalize
        self.options = options
        self._scalar("log_scale", math.log(init_scale))

    def _scalar(self, name: str, value: float) -> None:
        """A parameter, or a buffer when nothing is learnt: in the state dict under the same name."""
        tensor = torch.tensor(value, dtype=torch.float32)
        if self.learnable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    @property
    def scale(self) -> Tensor:
        """What multiplies the similarities: exp(log_scale), at most `max_scale`; a scalar, differentiable.

        Above the bound the value stays and the gradient is the one at the bound, so that a smaller scale can be learnt
        again; `clamp`'s own gradient is zero there, from which no optimizer returns.
        """
        if self.max_scale is None:
            return self.log_scale.exp()
        beyond = (self.log_scale - math.log(self.max_scale)).clamp(min=0)
        return (self.log_scale - beyond.detach()).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put `log_scale` back to its bound when a step went beyond: to be called after `optimizer.step()`.

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
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or not features.is_floating_point():
            return features  # for the function to refuse, by its argument's name
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(wide, dim=1).to(features.dtype)

    def _arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The module's options and those of a call, with further features treated like queries and keys."""
        self._expect_known(arguments)
        merged = {**self.options, **arguments}
        if merged.get("negatives") is not None:
            merged["negatives"] = self._features(merged["negatives"])
        teacher = merged.get("teacher")
        if isinstance(teacher, tuple) and len(teacher) == 3:
            merged["teacher"] = (self._features(teacher[0]), self._features(teacher[1]), teacher[2])
        return merged


class InfoNCELoss(_ContrastiveLoss):
    """`mmkernels.infonce` with a learnable scale: the CLIP loss.

    With `x̂ = x / |x|` (or x itself) and `s_ij = min(exp(log_scale), max_scale) · <x̂_i, ŷ_j>`::

        loss = 1/2N · sum_i [log sum_j exp(s_ij) - s_ii] + [log sum_j exp(s_ji) - s_ii]

    Args:
        init_scale: exp(log_scale) at the start, an inverse temperature.
        max_scale: the largest scale the loss uses, or None; call `clamp_()` after each optimizer step to hold the
            parameter itself to it.
        learnable: False keeps the scale where it starts: `log_scale` is then a buffer, not a parameter.
        normalize: divide every row (of queries, keys, `negatives` and the teacher's features) by its Euclidean norm,
            taken in float32 (float64 for float64 features); the result has the features' dtype again. A row of zeros
            stays zero.
        **options: keyword arguments of `mmkernels.infonce` for every call, such as `label_smoothing=0.1`,
            `symmetric=False`, `group=...` or `backend="triton"`.

    Attributes:
        log_scale: a float32 scalar, in the state dict whether learnable or not. It is best kept out of weight decay.
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

        Raises:
            what `mmkernels.infonce` raises.
        """
        return infonce(self._features(queries), self._features(keys), self.scale, **self._arguments(arguments))


class SigLIPLoss(_ContrastiveLoss):
    """`mmkernels.siglip` with a learnable scale and bias.

    With `x̂ = x / |x|` (or x itself) and `s = min(exp(log_scale), max_scale)`::

        loss = -1/N · sum_ij log sigmoid(z_ij · (s · <x̂_i, ŷ_j> + logit_bias)),  z_ij = +1 if i == j else -1

    Args:
        init_scale: exp(log_scale) at the start.
        init_bias: logit_bias at the start; with far more negatives than positives it begins well below zero.
        max_scale: the largest scale the loss uses, or None; call `clamp_()` after each optimizer step to hold the
            parameter itself to it.
        learnable: False keeps scale and bias where they start: both are then buffers, not parameters.
        normalize: divide every row by its Euclidean norm, taken in float32 (float64 for float64 features); the result
            has the features' dtype again. A row of zeros stays zero.
        **options: keyword arguments of `mmkernels.siglip` for every call, such as `group=...` or `backend="triton"`.

    Attributes:
        log_scale, logit_bias: float32 scalars, in the state dict whether learnable or not. They are best kept out of
            weight decay.
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
        _expect_finite("init_bias", init_bias)
        self._scalar("logit_bias", init_bias)

    def forward(self, queries: Tensor, keys: Tensor, **arguments: Any) -> Any:
        """The loss of a batch.

        Args:
            queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i.
            keys: [N, E], same dtype and device.
            **arguments: keyword arguments of `mmkernels.siglip` for this call; they win over the module's.

        Returns:
            what `mmkernels.siglip` returns: the loss, a scalar in float32 (float64 for float64 features).

        Raises:
            what `mmkernels.siglip` raises.
        """
        x, y = self._features(queries), self._features(keys)
        return siglip(x, y, self.scale, self.logit_bias, **self._arguments(arguments))


def _expect_finite(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _expect_positive(name: str, value: Any) -> None:
    _expect_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


# The losses have no modules inside, so that they can be loaded whole as well.
torch.serialization.add_safe_globals([InfoNCELoss, SigLIPLoss])

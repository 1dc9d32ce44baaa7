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
    """What both losses share: the parameter `log_scale`, its upper bound, normalisation, options of the function."""

    def __init__(
        self,
        function: Callable[..., Any],
        init_scale: float,
        max_scale: float | None,
        normalize: bool,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        _expect_positive("init_scale", init_scale)
        if max_scale is not None:
            _expect_positive("max_scale", max_scale)
            if max_scale < init_scale:
                raise ValueError(f"max_scale: expected None or at least init_scale={init_scale!r}, got {max_scale!r}")
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected True or False, got {normalize!r} ({type(normalize).__name__})")
        self._accepted = [
            name for name, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY
        ]
        self._expect_known(options)
        self.max_scale = max_scale
        self.normalize = normalize
        self.options = options
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale), dtype=torch.float32))

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
        return f"max_scale={self.max_scale}, normalize={self.normalize}{options}"

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
        self._expect_known(arguments)
        return {**self.options, **arguments}


class InfoNCELoss(_ContrastiveLoss):
    """`mmkernels.infonce` with a learnable scale: the CLIP loss.

    With `x̂ = x / |x|` (or x itself) and `s_ij = min(exp(log_scale), max_scale) · <x̂_i, ŷ_j>`::

        loss = 1/2N · sum_i [log sum_j exp(s_ij) - s_ii] + [log sum_j exp(s_ji) - s_ii]

    Args:
        init_scale: exp(log_scale) at the start, an inverse temperature.
        max_scale: the largest scale the loss uses, or None; call `clamp_()` after each optimizer step to hold the
            parameter itself to it.
        normalize: divide every row by its Euclidean norm, taken in float32 (float64 for float64 features); the result
            has the features' dtype again. A row of zeros stays zero.
        **options: keyword arguments of `mmkernels.infonce` for every call, such as `backend="triton"`.

    Attributes:
        log_scale: the parameter, a float32 scalar. It is best kept out of weight decay.
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
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(infonce, init_scale, max_scale, normalize, options)

    def forward(self, queries: Tensor, keys: Tensor, **arguments: Any) -> Any:
        """The loss of a batch.

        Args:
            queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i.
            keys: [N, E], same dtype and device.
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
        normalize: divide every row by its Euclidean norm, taken in float32 (float64 for float64 features); the result
            has the features' dtype again. A row of zeros stays zero.
        **options: keyword arguments of `mmkernels.siglip` for every call, such as `backend="triton"`.

    Attributes:
        log_scale, logit_bias: the parameters, float32 scalars. They are best kept out of weight decay.
        scale: the scale in use.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or an option that the function does not have.

    Source: Zhai et al. 2023 (arXiv:2303.15343).
    """

    def __init__(
        self,
        *,
        init_scale: float = 10.0,
        init_bias: float = -10.0,
        max_scale: float | None = None,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(siglip, init_scale, max_scale, normalize, options)
        _expect_finite("init_bias", init_bias)
        self.logit_bias = nn.Parameter(torch.tensor(init_bias, dtype=torch.float32))

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

"""The losses of open_clip, computed by `mmkernels.infonce` and `mmkernels.siglip`: the logits are never stored.

Each is a subclass of the loss that it replaces, with its constructor and its call. Over several ranks every rank gets
the loss of the whole batch, and encoders whose gradients are averaged over the ranks (DistributedDataParallel, FSDP)
get the gradient of that loss. open_clip's own `ClipLoss` does so with `gather_with_grad=True` alone: without it the
encoders' gradients are 1/W of the true ones (`local_loss=False`), or lack the part of the keys (`local_loss=True`).
"""

from __future__ import annotations

import warnings
from typing import Any

import open_clip.loss
import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels import infonce, siglip

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]

# `dist_impl` of SigLipLoss -> `exchange` of siglip
_EXCHANGES = {"bidir": "ring", "shift": "ring", "gather": "all_gather", "reduce": "all_gather"}


class ClipLoss(open_clip.loss.ClipLoss):
    """The loss of CLIP: symmetric cross entropy over the pairs of all ranks.

    Args:
        local_loss, gather_with_grad: without effect on the result, which is always that of the whole batch with its
            whole gradient, as with `gather_with_grad=True`; with `local_loss=True` open_clip reports the loss of the
            rank's own rows instead. A warning says so where `gather_with_grad=False` would give other gradients.
        cache_labels: without effect: no labels are stored.
        rank, world_size: of the default process group of torch.distributed.
        use_horovod: (open_clip 3.3) must be False.

    Raises:
        ValueError: `use_horovod`, or a `world_size` that is not that of the process group.

    Source: Radford et al. 2021 (arXiv:2103.00020).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "use_horovod", False):
            raise ValueError("use_horovod: expected False (features are exchanged by torch.distributed), got True")
        if self.world_size > 1 and not self.gather_with_grad:
            other = (
                "lack the part that other ranks' features have in them"
                if self.local_loss
                else f"are 1/{self.world_size} of these"
            )
            warnings.warn(
                "gather_with_grad: False gives the same gradients as True here, those of the whole batch; open_clip's "
                f"own {other}. Clipping thresholds, SGD's learning rates and Adam's eps mean something else with them.",
                stacklevel=2,
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, a float32 scalar; with `output_dict` {"contrastive_loss": it}.

        Args:
            image_features, text_features: [N, E], normalised; rows of this rank.
            logit_scale: the exponentiated scale, a tensor of one element.
            logit_bias: cancels out of a softmax: its gradient is 0.
        """
        features = _alike(image_features, text_features)
        loss = infonce(*features, logit_scale, group=_group(self.world_size))
        loss = _constant_in(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(open_clip.loss.CoCaLoss, ClipLoss):
    """The loss of CoCa: `ClipLoss` above, and open_clip's own loss of captions. Arguments as in open_clip."""


class DistillClipLoss(ClipLoss, open_clip.loss.DistillClipLoss):
    """The loss of CLIP, and the cross entropy of the logits against a teacher's, whose softmax is streamed, too.

    Arguments as in `ClipLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:
        """(contrastive loss, distillation loss), or the same in a dictionary.

        Args:
            image_features, text_features, logit_scale: as in `ClipLoss`.
            dist_image_features, dist_text_features: [N, F], the teacher's, without gradient.
            dist_logit_scale: the teacher's exponentiated scale.
        """
        group, (images, texts) = _group(self.world_size), _alike(image_features, text_features)
        given = {"dist_image_features": dist_image_features, "dist_text_features": dist_text_features}
        for name, value in {**given, "dist_logit_scale": dist_logit_scale}.items():
            if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name}: expected a tensor without gradient (compute the teacher under no_grad)")
        contrastive = infonce(images, texts, logit_scale, group=group)
        # infonce multiplies the teacher's similarities by the student's scale.
        factor = _number(dist_logit_scale) / _number(logit_scale)
        teacher = (dist_image_features * factor).to(images.dtype), dist_text_features.to(images.dtype), 1.0
        distillation = infonce(images, texts, logit_scale, teacher=teacher, group=group)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distillation}
        return contrastive, distillation


class SigLipLoss(open_clip.loss.SigLipLoss):
    """The loss of SigLIP: a sigmoid loss of every pair of all ranks, over the number of images.

    Args:
        cache_labels: without effect: no labels are stored.
        rank, world_size: of the default process group of torch.distributed.
        dist_impl: "bidir", "shift": texts go around a ring of ranks; "gather", "reduce": all at once; None: what is
            predicted to be faster. The result does not depend on it.
        chunk_size: (open_clip after 3.3) without effect: logits are never stored, whatever it is.

    open_clip reports the loss of the rank's own images, here it is that of all; gradients averaged over the ranks are
    the same.

    Source: Zhai et al. 2023 (arXiv:2303.15343).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked = kwargs["dist_impl"] if "dist_impl" in kwargs else args[3] if len(args) > 3 else None
        self.exchange = _EXCHANGES[self.dist_impl] if asked else "auto"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, a float32 scalar; with `output_dict` {"contrastive_loss": it}. Arguments as in `ClipLoss`."""
        bias = 0.0 if logit_bias is None else logit_bias
        features, group = _alike(image_features, text_features), _group(self.world_size)
        loss = siglip(*features, logit_scale, bias, group=group, exchange=self.exchange)
        return {"contrastive_loss": loss} if output_dict else loss


def _group(world_size: int) -> Any:
    """The process group of a loss over `world_size` ranks."""
    if world_size == 1:
        return None
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks != world_size:
        raise ValueError(f"world_size: expected {ranks}, the ranks of the default process group, got {world_size}")
    return dist.group.WORLD


def _alike(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """In one dtype, the wider, as a product under autocast would accept them."""
    if images.dtype != texts.dtype and torch.is_autocast_enabled(images.device.type):
        dtype = torch.promote_types(images.dtype, texts.dtype)
        return images.to(dtype), texts.to(dtype)
    return images, texts


def _number(scale: Any) -> Tensor:
    """float64, without dimensions, which would decide the dtype of a product."""
    return torch.as_tensor(scale).detach().double().reshape(())


def _constant_in(loss: Tensor, bias: Tensor | None) -> Tensor:
    """A loss that does not depend on a bias, but gives it its gradient, 0, which DistributedDataParallel waits for."""
    return loss if bias is None else loss + 0.0 * bias.float().sum()

"""SigLIP: every pair of the batch is a yes-or-no question; learned scale and bias start at 10 and -10.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023 (arXiv:2303.15343).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import siglip
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.recipes import Objective

SETTINGS: dict[str, Any] = {}


class SigLip(Objective):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backend, self.max_log_scale = config.backend, math.log(config.max_logit_scale)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return siglip(images, texts, self.log_scale.exp(), self.bias, backend=self.backend)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.log_scale.clamp_(max=self.max_log_scale)

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": self.log_scale.exp().item(), "logit_bias": self.bias.item()}

    def chance_loss(self, n: int) -> float:
        """Every pair positive with probability 1/n."""
        return math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0


def objective(config: Config) -> Objective:
    return SigLip(config)

"""CLIP: symmetric InfoNCE over the batch, with a learned temperature that starts at 0.07.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(arXiv:2103.00020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import infonce
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.recipes import Objective

SETTINGS: dict[str, Any] = {}


class Clip(Objective):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backend, self.max_log_scale = config.backend, math.log(config.max_logit_scale)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return infonce(images, texts, self.log_scale.exp(), backend=self.backend)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.log_scale.clamp_(max=self.max_log_scale)

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": self.log_scale.exp().item()}

    def chance_loss(self, n: int) -> float:
        return math.log(n)


def objective(config: Config) -> Objective:
    return Clip(config)

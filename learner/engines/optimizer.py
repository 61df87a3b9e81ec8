"""The AdamW of all engines: which parameters decay, and no step on gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Make groups for AdamW: matrices decay; biases, norms and other vectors do not (as in transformers' Trainer)."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        # Under ZeRO-3 a parameter is empty outside its gather, and DeepSpeed keeps the full shape beside it.
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        (decaying if matrix or not weight_decay else others).append(parameter)
    groups = ((decaying, weight_decay), (others, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that first clips the norm of all gradients, and takes no step if that norm is not finite.

    Each step sets `grad_norm`, before clipping, and `overflow`, whether the step was refused. The optimizers of
    DeepSpeed's ZeRO stages 1 to 3 do the same."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: LearnerConfig, *, fused: bool = False) -> None:
        groups = parameter_groups(parameters, config.weight_decay)
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, fused=fused)
        self.max_grad_norm = config.max_grad_norm
        self.grad_norm = 0.0
        self.overflow = False

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self.overflow = not math.isfinite(self.grad_norm)
        if self.overflow:
            self.zero_grad()
            return None
        return super().step(closure)


def poisoned_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss. If it is not finite, its gradients will not be finite either, so that the norm of the gradients
    alone decides, over all micro-batches and ranks, whether a step is taken."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

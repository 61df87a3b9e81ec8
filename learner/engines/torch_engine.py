"""TorchEngine: one process, plain PyTorch, float32 or float64. DeepSpeedEngine is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from learner.engines.base import BaseEngine
from learner.engines.optimizer import ClippingAdamW
from learner.engines.protocol import MicroLoss, StepResult
from learner.model.load import load_policy, load_reference
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch


class TorchEngine(BaseEngine):
    """Implements TrainEngine. It ignores ZeRO and offload options."""

    def __init__(self, options: LearnerOptions, adapter: MultimodalAdapter) -> None:
        if options.learner.ranks != 1:
            raise ValueError(f"TorchEngine is one rank, not {options.learner.ranks}")
        super().__init__(options, adapter, options.device)
        self._set_policy(load_policy(options, adapter).to(options.device))
        self._module = self.policy
        if options.algorithm.kl is not None and options.model.lora is None:
            self._reference = load_reference(options, adapter).to(options.device)
        self._optimizer: ClippingAdamW = ClippingAdamW(self._trained.values(), options.learner)

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        if self.options.model.dtype == "bfloat16":
            raise ValueError("TorchEngine keeps no float32 master weights: in bfloat16 it scores, and does not train")
        return super().train_step(batches, micro_loss)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _step(self) -> tuple[bool, float]:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return not self._optimizer.overflow, self._optimizer.grad_norm

    def _restart_optimizer(self, steps: int) -> None:
        self._optimizer.state.clear()
        for parameter in self._trained.values() if steps else ():
            self._optimizer.state[parameter] = {"step": torch.tensor(float(steps))}

    def _read(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        return parameter.detach() if moment is None else self._optimizer.state[parameter][moment]

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        if moment is None:
            parameter.copy_(value)
        else:
            self._optimizer.state[parameter][moment] = value.to(parameter.device)

    def _read_reference(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    @torch.no_grad()
    def _write_reference(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

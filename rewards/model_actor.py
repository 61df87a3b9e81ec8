"""RewardModelActor: a thin Ray shell around one reward model, which all reward actors share.

RewardActor ── score(prompt, completions) ──▶ RewardModelActor        (its child asked for the service `reward_model`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rewards.base import TransientError
from rewards.functions.reward_model import ModelOptions, RewardModel


class RewardModelActor:
    """Scores one group at a time."""

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._model: RewardModel | None = None

    def __repr__(self) -> str:
        return "reward-model"

    def start(self) -> None:
        """Return when the model is loaded. Raises RewardSetupError."""
        self._model = RewardModel(self._options)

    def score(self, prompt: str, completions: Sequence[str]) -> list[float | None]:
        assert self._model is not None, "start() first"
        return self._model.score(prompt, completions)


@dataclass(frozen=True)
class RewardModelService:
    """The service `reward_model`, for a RewardActor."""

    actor: Any
    """Ray's handle of a RewardModelActor."""

    def __call__(self, prompt: str, completions: Sequence[str], timeout: float) -> list[float | None]:
        """Score completions. Raises TransientError if the actor is unavailable for a moment."""
        try:
            return list(ray.get(self.actor.score.remote(prompt, tuple(completions)), timeout=timeout))
        except ray.exceptions.ActorUnavailableError as error:
            raise TransientError(str(error)) from error

"""The sections of a run, each valid by itself; run_config.py checks what they are together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.config import AlgorithmConfig, Auto, Behavior, Current, LearnerConfig, OffPolicy
from rewards.config import RewardConfig
from rollout.config import RolloutConfig
from rollout.data.config import DataConfig
from saccade.config.presets import with_preset
from saccade.config.sections import CheckpointConfig, ClusterConfig, EvalConfig
from vlm.config import ModelConfig


class RunFields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    output_dir: str = Field(..., min_length=1)
    """Folder of checkpoints, logs and the final model."""
    steps: int = Field(..., ge=1)
    """Optimizer steps."""
    seed: int = 0
    """Seed of shuffling and sampling."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, given: Any) -> Any:
        """A section that is left empty, or out, is one whose knobs are not given."""
        if not isinstance(given, Mapping):
            return given
        names = [name for name, info in cls.model_fields.items() if is_dataclass(info.annotation)]
        filled = {**given, **{name: {} for name in names if given.get(name) is None}}
        return {**filled, "algorithm": with_preset(filled["algorithm"])}

    @property
    def off_policy(self) -> OffPolicy:
        """How tokens of another policy are treated, `auto` resolved."""
        chosen = self.algorithm.off_policy
        if not isinstance(chosen, Auto):
            return chosen
        return Behavior() if self.rollout.max_staleness > 0 else Current()

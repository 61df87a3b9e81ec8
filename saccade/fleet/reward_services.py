"""The services that rewards may call during a run: a reward model in an actor of its own, and the engines as a judge.

child of a RewardActor ── asks ──▶ RewardActor ── service ──▶ RewardModelActor | RolloutActor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from rewards.base import ServiceError, TransientError
from rewards.functions.judge import Question
from rewards.functions.reward_model import RewardModelReward
from rewards.model_actor import RewardModelActor, RewardModelService
from rewards.registry import load_reward
from rollout.engines.protocol import SamplingParams
from rollout.types import Prompt, PromptRef, RolloutFailure
from saccade.config.run_config import RunConfig
from saccade.fleet.placement import Placement
from saccade.fleet.protocols import Engine
from saccade.fleet.waiting import first_lines
from vlm.adapter import MultimodalAdapter
from vlm.control_tokens import without


@dataclass
class EngineJudge:
    """The service `generate`: greedy answers of the run's own engines, taken in turn. Travels to reward actors."""

    engines: Sequence[Engine]
    load_adapter: Callable[[], MultimodalAdapter]
    _adapter: MultimodalAdapter | None = None
    _next: int = 0

    def __call__(self, questions: Sequence[Question], max_tokens: int, timeout: float) -> list[str]:
        """An answer to each question. Raises ServiceError, or TransientError where another attempt may succeed."""
        if self._adapter is None:
            self._adapter = self.load_adapter()
        adapter = self._adapter
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            stop_token_ids=adapter.stop_token_ids,
            banned_token_ids=adapter.banned_token_ids,
        )
        pending = []
        for question in questions:
            engine = self.engines[self._next % len(self.engines)]
            self._next += 1
            pending.append(engine.sample(_prompt(question, adapter), sampling))
        try:
            groups = ray.get(pending, timeout=timeout)
        except ray.exceptions.RayActorError as error:
            raise TransientError(f"the engine that judged was lost: {first_lines(error, 1)}") from error
        for group in groups:
            if isinstance(group, RolloutFailure):
                raise (TransientError if group.retryable else ServiceError)(group.reason)
        return [group.completions[0].text for group in groups]


def _prompt(question: Question, adapter: MultimodalAdapter) -> Prompt:
    """A user's message. Control tokens that are spelled out in the text are taken out: in there they could end it."""
    text = without(question.text, adapter.control_tokens.values())
    content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": text}]
    rendered = adapter.render([{"role": "user", "content": content}])
    token_ids = np.array(adapter.tokenize(rendered), np.int32)
    length = adapter.expanded_length(token_ids.tolist(), question.images)
    return Prompt(PromptRef("judge"), rendered, token_ids, length, question.images)


@dataclass
class Services:
    """Everything that the configured rewards call upon, by name, and the actors behind it."""

    by_name: dict[str, Any] = field(default_factory=dict)
    models: list[Any] = field(default_factory=list)


def create_services(
    config: RunConfig, placement: Placement, engines: Sequence[Engine], adapter: Callable[[], MultimodalAdapter]
) -> Services:
    """Creates what the configured rewards need; the models still have to be started."""
    services = Services()
    for spec in config.reward.functions:
        if spec.name == "judge":
            services.by_name["generate"] = EngineJudge(engines, adapter)
        if spec.name == "reward_model":
            reward = load_reward(spec.name, spec.options)
            assert isinstance(reward, RewardModelReward)
            place = placement.options("reward_model", len(services.models))
            actor = ray.remote(RewardModelActor).options(**place).remote(reward.model_options)
            services.models.append(actor)
            services.by_name["reward_model"] = RewardModelService(actor)
    return services

"""The fakes of `fake_fleet.py` as actors: Ray makes the futures. What takes long to import is left out."""

from __future__ import annotations

from typing import Any

from rollout.types import GroupSummary, RolloutFailure, RolloutGroup, StoredPrompt, Verdict
from tests.helpers.fake_fleet import FakeData, FakeEngine, FakeRewards

BYTES = 300_000
"""Of a group's ids: too large to travel in Ray's messages, so that it lies in the object store."""


class Data:
    """FakeData as an actor: Ray makes the futures."""

    def __init__(self) -> None:
        self.fake = FakeData()

    def take(self, n: int) -> tuple[list[StoredPrompt], dict[str, Any]]:
        return self.fake.take(n).result()


class Engine(FakeEngine):
    def sample(self, *given: object) -> RolloutGroup | RolloutFailure:
        answer = super().sample(*given)  # type: ignore[arg-type]
        if isinstance(answer, RolloutGroup):
            object.__setattr__(answer, "prompt_token_ids", answer.prompt_token_ids.repeat(BYTES // 8))
        return answer


class Rewards:
    def score(self, group: RolloutGroup | RolloutFailure) -> tuple[tuple[Verdict, ...], GroupSummary]:
        verdicts, summary = FakeRewards().score(group)
        return verdicts, summary.result()

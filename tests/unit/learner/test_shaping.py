"""The one number per completion, from scores, parts and lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from learner.algorithm.group_rewards import check_rewards, combined_rewards
from learner.config import AlgorithmConfig, Current
from learner.types import LearnerOptions, RewardError
from rollout.config import RolloutConfig
from rollout.types import GroupSummary, PromptRef
from vlm.config import ModelConfig


def summary(
    rewards: tuple[float, ...],
    lengths: tuple[int, ...] = (1, 1, 1),
    valid: tuple[bool, ...] = (True, True, True),
    parts: dict[str, tuple[float, ...]] | None = None,
) -> GroupSummary:
    return GroupSummary(PromptRef("d:0"), rewards, valid, parts or {}, lengths, ("stop",) * len(rewards), 5, 0)


def options(**changes: Any) -> LearnerOptions:
    weights = changes.pop("part_weights", {})
    algorithm, rollout = AlgorithmConfig(off_policy=Current(), **changes), RolloutConfig(max_completion_length=10)
    return LearnerOptions(ModelConfig("m"), 1, algorithm=algorithm, rollout=rollout, part_weights=weights)


def test_the_scores_themselves():
    rewards, valid = combined_rewards([summary((1.0, 0.0, 2.0), valid=(True, False, True))], options())
    assert rewards.tolist() == [[1.0, 0.0, 2.0]] and valid.tolist() == [[True, False, True]]


def test_long_completions_lose_up_to_one():
    rewards, _ = combined_rewards([summary((1.0, 1.0, 1.0), lengths=(5, 8, 10))], options(overlong=0.4))
    assert rewards.tolist() == [[1.0, 0.5, 0.0]]


def test_parts_are_normalised_one_by_one():
    """Scores of 0 and 1, and of 0 and 100, count the same by equal weights; the unscored sibling has neither."""
    group = summary((100.0, 0.0, 1.0), valid=(True, False, True), parts={"a": (0.0, 1.0), "b": (100.0, 0.0)})
    rewards, _ = combined_rewards([group], options(part_weights={"a": 1.0, "b": 1.0}))
    np.testing.assert_allclose(rewards, [[0.0, 0.0, 0.0]], atol=2e-4)
    rewards, _ = combined_rewards([group], options(part_weights={"a": 1.0, "b": 0.0}))
    np.testing.assert_allclose(rewards[0, [0, 2]], [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-3)


def test_rewards_that_give_no_advantage_are_named_with_their_prompt():
    group = summary((0.5, -1.5, 1.0), parts={"mine": (0.5, -1.5, 1.0), "format": (1.0, 1.0, 1.0)})
    rewards, valid = combined_rewards([group], options(advantage="maxrl"))
    with pytest.raises(RewardError, match=r"prompt d:0 .*lowest reward is -1\.5 \(of mine -1\.5\).*maxrl"):
        check_rewards(rewards, valid, [group], options(advantage="maxrl"))
    check_rewards(rewards, valid, [group], options())
    unscored = np.array([[True, False, True]])
    check_rewards(rewards, unscored, [group], options(advantage="maxrl"))  # what has no score is in no mean
    with pytest.raises(RewardError, match=r"prompt d:0 .*\[0\.5, nan, 1\.0\].*must be finite"):
        check_rewards(np.array([[0.5, np.nan, 1.0]]), valid, [group], options())


def test_a_part_that_is_missing_is_named():
    group = summary((1.0, 0.0, 1.0), parts={"a": (1.0, 0.0)})
    with pytest.raises(ValueError, match=r"d:0.*has 2 scores of 'a' for 3 scored completions"):
        combined_rewards([group], options(part_weights={"a": 1.0}))

"""From what the rewards said to the one number per completion that advantages are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.algorithm.advantages import Bools, Floats, normalized_sum, overlong_penalty
from learner.types import LearnerOptions, RewardError
from rollout.types import GroupSummary


def combined_rewards(summaries: Sequence[GroupSummary], options: LearnerOptions) -> tuple[Floats, Bools]:
    """`(rewards [G, K], valid [G, K])`: the scores, or their parts normalised one by one and then summed; minus the
    penalty of overlong completions.

    Raises ValueError for groups of different sizes, or a part that a scored completion lacks."""
    sizes = {len(s.rewards) for s in summaries}
    if len(sizes) > 1:
        raise ValueError(f"groups of different sizes in one batch: {sorted(sizes)} completions")
    rewards = np.array([s.rewards for s in summaries], np.float64)
    valid = np.array([s.valid for s in summaries], bool)
    if options.part_weights:
        weights = np.array(list(options.part_weights.values()))
        rewards = normalized_sum(_parts(summaries, list(options.part_weights), valid), weights, valid)
    limit = options.rollout.max_completion_length
    if buffer := round(options.algorithm.overlong_share * limit):
        lengths = np.array([s.lengths for s in summaries], np.float64)
        rewards = rewards + overlong_penalty(lengths, limit, buffer)
    return rewards, valid


def check_rewards(rewards: Floats, valid: Bools, summaries: Sequence[GroupSummary], options: LearnerOptions) -> None:
    """Raises RewardError where `rewards`, from which advantages are computed, are not finite, or negative for maxrl."""
    for g, summary in enumerate(summaries):
        own = rewards[g, valid[g]]
        if not np.isfinite(own).all():
            raise RewardError(
                f"prompt {summary.ref}: its rewards are {own.tolist()} once weights, penalties and the KL to the "
                "reference are counted in, and these must be finite; look at the scores, and whether the reference's "
                "log-probabilities are finite"
            )
        if options.algorithm.advantage == "maxrl" and own.min(initial=0.0) < 0:
            parts = [f"{name} {min(scores):g}" for name, scores in summary.parts.items() if min(scores, default=0) < 0]
            raise RewardError(
                f"prompt {summary.ref}: its lowest reward is {own.min():g} (of {', '.join(parts) or 'their sum'}), but "
                "algorithm.advantage=maxrl divides by the mean reward, which must not be negative: let rewards be 0 or "
                "more, or use another advantage"
            )


def _parts(summaries: Sequence[GroupSummary], names: Sequence[str], valid: Bools) -> Floats:
    """`[G, K, R]`, 0 where a completion was not scored."""
    parts = np.zeros((*valid.shape, len(names)))
    for g, summary in enumerate(summaries):
        for r, name in enumerate(names):
            values = summary.parts.get(name, ())
            if len(values) != valid[g].sum():
                raise ValueError(
                    f"group {summary.ref} has {len(values)} scores of {name!r} for {valid[g].sum()} scored "
                    "completions; algorithm.advantage=gdpo needs each reward's own score of every completion"
                )
            parts[g, valid[g], r] = values
    return parts

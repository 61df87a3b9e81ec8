"""Group-relative advantages: pure functions from the rewards of G groups of K siblings to one number per completion.

Siblings without a score take no part in any baseline and get 0. A group with fewer than two scored siblings has no
baseline, and one whose scores are all equal has nothing to prefer: both get exactly 0 throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Advantage = Callable[[Floats, Bools], Floats]
"""(rewards `[G, K]`, valid `[G, K]`) -> advantages `[G, K]`."""

STD_EPSILON = 1e-4
"""Added to a standard deviation or mean that is divided by, so that a tiny one does not blow advantages up."""


def grpo(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """(r - mean) / (std + 1e-4) within the group, std over n - 1 (DeepSeekMath, arXiv:2402.03300, section 4.1.2)."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    centred = _centre(rewards, valid, count)
    return np.where(_learns(rewards, valid), centred / (_deviation(centred, count) + STD_EPSILON), 0.0)


def dr_grpo(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """r - mean within the group: dividing by the standard deviation would prefer questions that are nearly always, or
    hardly ever, answered rightly (Dr. GRPO, arXiv:2503.20783, section 3.1)."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    return np.where(_learns(rewards, valid), _centre(rewards, valid, count), 0.0)


def rloo(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """r minus the mean of the *other* siblings (REINFORCE leave-one-out, arXiv:2402.14740, equation 6).

    With n siblings this is n / (n - 1) times the distance from the mean of all."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    centred = _centre(rewards, valid, count)
    return np.where(_learns(rewards, valid), centred * count / np.maximum(count - 1, 1), 0.0)


def reinforce_pp(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """r - mean within the group, over the standard deviation of that in the whole batch (REINFORCE++ with a group
    baseline, arXiv:2501.03262): a group with little spread is not blown up to that of the others.

    The batch is all scored siblings of groups with a baseline; their mean is 0."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    centred = np.where(has_baseline(valid)[:, None], _centre(rewards, valid, count), 0.0)
    batch = (valid & has_baseline(valid)[:, None]).sum()
    deviation = np.sqrt((centred**2).sum() / max(batch - 1, 1))
    return np.where(_learns(rewards, valid), centred / (deviation + STD_EPSILON), 0.0)


def gpg(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """r - mean within the group, times the groups with a baseline over those that contribute: groups without a gradient
    would else make the step smaller (GPG, arXiv:2504.02546)."""
    rewards, valid, _ = _prepare(rewards_GK, valid_GK)
    contributing = contributes(rewards, valid).sum()
    return dr_grpo(rewards, valid) * (has_baseline(valid).sum() / max(contributing, 1))


def maxrl(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """(r - mean) / mean within the group, for rewards that are never negative: the gradient of the logarithm of the
    success rate, which weighs hard questions by its inverse (MaxRL, arXiv:2602.02710).

    Raises ValueError for a negative reward."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    if (rewards[valid] < 0).any():
        raise ValueError(f"maxrl divides by the mean reward, which must not be negative: {rewards[valid].min()}")
    mean = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return np.where(_learns(rewards, valid), _centre(rewards, valid, count) / (mean + STD_EPSILON), 0.0)


ADVANTAGES: dict[str, Advantage] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "gdpo": reinforce_pp,  # on what `normalized_sum` made of the rewards
    "gpg": gpg,
    "maxrl": maxrl,
}


def normalized_sum(parts_GKR: Floats, weights_R: Floats, valid_GK: Bools) -> Floats:
    """One reward `[G, K]` from R: each normalised as `grpo` does within its group, then summed by weight (GDPO,
    arXiv:2601.05242; its normalisation over the batch is `reinforce_pp` on the result).

    Summed before, rewards of a small spread would vanish beside those of a large one."""
    parts = np.asarray(parts_GKR, np.float64)
    weights = np.asarray(weights_R, np.float64)
    if parts.ndim != 3 or parts.shape[2] != len(weights):
        raise ValueError(f"parts {parts.shape} must be [G, K, R] for {len(weights)} weights")
    return np.sum([w * grpo(parts[:, :, r], valid_GK) for r, w in enumerate(weights)], axis=0)


def overlong_penalty(lengths: Floats, limit: int, buffer: int) -> Floats:
    """Soft punishment of long completions, shaped like `lengths`: 0 up to `limit` - `buffer` tokens, from there falling
    linearly to -1 at `limit` (DAPO, arXiv:2503.14476, equation 13). Added to the reward."""
    if not 0 < buffer <= limit:
        raise ValueError(f"the buffer of {buffer} tokens must be positive and at most the limit of {limit}")
    return np.clip((limit - buffer - np.asarray(lengths, np.float64)) / buffer, -1.0, 0.0)


def has_baseline(valid_GK: Bools) -> Bools:
    """`[G]`: groups with at least two scored siblings. The others are dropped, and counted by whoever drops them."""
    return np.asarray(np.sum(np.asarray(valid_GK, bool), axis=1) >= 2, bool)


def contributes(rewards_GK: Floats, valid_GK: Bools) -> Bools:
    """`[G]`: groups with a policy gradient, those with a baseline whose scores are not all equal."""
    rewards, valid, _ = _prepare(rewards_GK, valid_GK)
    return np.any(_learns(rewards, valid), axis=1)


def _prepare(rewards_GK: Floats, valid_GK: Bools) -> tuple[Floats, Bools, Floats]:
    """Checked inputs, and the number of scored siblings `[G, 1]`."""
    rewards, valid = np.asarray(rewards_GK, np.float64), np.asarray(valid_GK, bool)
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards {rewards.shape} and valid {valid.shape} must both be [G, K]")
    if not np.isfinite(rewards[valid]).all():
        raise ValueError("a valid reward is not finite")
    return np.where(valid, rewards, 0.0), valid, valid.sum(axis=1, keepdims=True).astype(np.float64)


def _centre(rewards: Floats, valid: Bools, count: Floats) -> Floats:
    """Distance from the mean of the scored siblings; 0 for the others."""
    mean = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return np.where(valid, rewards - mean, 0.0)


def _deviation(centred: Floats, count: Floats) -> Floats:
    """`[G, 1]`: standard deviation over n - 1."""
    return np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))


def _learns(rewards: Floats, valid: Bools) -> Bools:
    """`[G, K]`: scored siblings of groups that contribute.

    Equal means equal up to rounding: sums of weighted rewards differ in their last bits, and dividing by such a
    "standard deviation" would turn noise into advantages."""
    high = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    low = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    scale = np.maximum(1.0, np.abs(rewards).max(axis=1, keepdims=True, initial=0.0))
    return np.asarray(valid & has_baseline(valid)[:, None] & (high - low > 1e-9 * scale))

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
"""(rewards `[G, K]`, valid `[G, K]`) -> advantages `[G, K]`"""

STD_EPSILON = 1e-4
"""Added to the standard deviation, so that a tiny spread of rewards is not blown up to unit advantages."""


def grpo(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """(r - mean) / (std + 1e-4) within the group, std over n - 1 (DeepSeekMath, arXiv:2402.03300, section 4.1.2)."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    centred = _centre(rewards, valid, count)
    variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
    return np.where(_learns(rewards, valid), centred / (np.sqrt(variance) + STD_EPSILON), 0.0)


def rloo(rewards_GK: Floats, valid_GK: Bools) -> Floats:
    """r minus the mean of the *other* siblings (REINFORCE leave-one-out, arXiv:2402.14740, equation 6).

    With n siblings this is n / (n - 1) times the distance from the mean of all."""
    rewards, valid, count = _prepare(rewards_GK, valid_GK)
    centred = _centre(rewards, valid, count)
    return np.where(_learns(rewards, valid), centred * count / np.maximum(count - 1, 1), 0.0)


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "rloo": rloo}


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


def _learns(rewards: Floats, valid: Bools) -> Bools:
    """`[G, K]`: scored siblings of groups that contribute.

    Equal means equal up to rounding: sums of weighted rewards differ in their last bits, and dividing by such a
    "standard deviation" would turn noise into advantages."""
    high = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    low = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    scale = np.maximum(1.0, np.abs(rewards).max(axis=1, keepdims=True, initial=0.0))
    return np.asarray(valid & has_baseline(valid)[:, None] & (high - low > 1e-9 * scale))

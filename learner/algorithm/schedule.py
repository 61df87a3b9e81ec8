"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from learner.config import Constant, LinearDecay
from learner.types import LearnerOptions


def learning_rate(step: int, options: LearnerOptions) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine, which
    would reach `min_ratio` times the peak one step after the last of `total_steps`: no step has a rate of 0 (as in
    transformers)."""
    peak, warmup = options.learner.learning_rate, options.learner.warmup_steps
    schedule = options.learner.lr_schedule
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return peak
    span = max(1, options.total_steps - warmup)
    done = min(1.0, (step - warmup) / span)
    share = 1.0 - done if isinstance(schedule, LinearDecay) else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * share)

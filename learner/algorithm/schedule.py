"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from learner.types import LearnerOptions


def learning_rate(step: int, options: LearnerOptions) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine, which
    would reach `min_lr_ratio` times the peak one step after the last of `total_steps`: no step has a rate of 0 (as in
    transformers)."""
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.lr_schedule == "constant":
        return peak
    span = max(1, options.total_steps - warmup)
    done = min(1.0, (step - warmup) / span)
    share = 1.0 - done if options.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * share)

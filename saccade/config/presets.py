"""Presets of algorithms: what a name sets.

algorithm: dapo                              everything as in the paper
algorithm: {name: dapo, kl: {weight: 0.01}}  the same but for what is given
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.config import Preset

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "grpo": {"advantage": "grpo", "loss": {"name": "ppo_clip"}, "aggregation": "sequence"},
    "rloo": {
        "advantage": "rloo",
        "loss": {"name": "reinforce"},
        "aggregation": "constant",
        "off_policy": {"name": "tis"},
        "kl": {"estimator": "k1", "where": "reward"},
    },
    "dr_grpo": {"advantage": "dr_grpo", "loss": {"name": "ppo_clip"}, "aggregation": "constant"},
    "dapo": {
        "advantage": "grpo",
        "loss": {"name": "ppo_clip", "high": 0.28},
        "aggregation": "token",
        "refill": 3.0,
        "overlong": 0.2,
    },
    "gspo": {"advantage": "grpo", "loss": {"name": "gspo", "low": 3e-4, "high": 4e-4}, "aggregation": "sequence"},
    "cispo": {"advantage": "grpo", "loss": {"name": "cispo", "low": 1.0, "high": 4.0}, "aggregation": "token"},
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "loss": {"name": "ppo_clip"},
        "aggregation": "token",
        "kl": {"estimator": "k2"},
    },
}
"""Name -> what differs from the defaults of the section, from the papers that docs/algorithms.md names. What it sets of
`kl` counts where a KL is asked for."""

_SHORT = {"loss": "name", "off_policy": "name", "kl": "weight"}
"""The field that a section's short form gives."""


def with_preset(given: Any) -> Any:
    """The section `algorithm` as given, with what its preset sets and nobody gave."""
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        return given
    name = given.get("name", "grpo")
    preset: Mapping[str, Any] = next((values for known, values in PRESETS.items() if known == name), {})
    merged = {**preset, **given}
    for key, first in _SHORT.items():
        usual, own = preset.get(key, {}), given.get(key)
        if isinstance(own, str | int | float):
            own = {first: own}
        if isinstance(own, Mapping) and (key == "kl" or own.get("name", usual.get("name")) == usual.get("name")):
            merged[key] = {**usual, **own}
        elif key == "kl" and own is None:
            merged[key] = None
    return merged

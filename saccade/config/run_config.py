"""RunConfig: every knob of a run, typed, documented, and checked before any process starts.

    config = load_config("run.yaml", ["learner.learning_rate=1e-6", "rollout.engines=4"])

Unknown keys are refused with the nearest known name; all violations are reported at once, as one ConfigError.
"""

from __future__ import annotations

from pydantic import model_validator

from saccade.config.checks import problems
from saccade.config.messages import ConfigError
from saccade.config.run_fields import RunFields


class RunConfig(RunFields):
    """One run. Build it with `load_config` (YAML and overrides) or `parse_config` (a dictionary)."""

    @model_validator(mode="after")
    def _goes_together(self) -> RunConfig:
        if found := problems(self):
            raise ConfigError(found)
        return self

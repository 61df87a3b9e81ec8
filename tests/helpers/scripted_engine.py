"""An engine as an actor that answers as a test says. It imports next to nothing, so that it is there at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout.engines.protocol import SamplingParams
from rollout.types import Completion, Prompt, RolloutFailure, RolloutGroup, Segment


class ScriptedEngine:
    """Answers with what it was asked; as told, not at all."""

    def sample(self, prompt: Prompt, sampling: SamplingParams, *given: Any) -> RolloutGroup | RolloutFailure:
        if "too long" in prompt.text or "later" in prompt.text:
            return RolloutFailure(prompt.ref, "no answer", retryable="later" in prompt.text)
        assert (sampling.n, sampling.temperature, sampling.max_tokens) == (1, 0.0, 50)
        segment = Segment(np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32))
        return RolloutGroup(prompt, prompt.token_ids, (Completion((segment,), prompt.text, "stop", seed=0),))

"""Decides whether a run may continue: steps that were not taken, and engines that disagree with the learner.

UpdateStats ──judge────▶ a line, or MismatchError: before anything of the update is booked
            ──observe──▶ lines, or NotFiniteError: its prompts are booked by then, with the reason
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from learner.types import NotFiniteError, UpdateStats
from saccade.errors import MismatchError

MOST_REFUSED = 3
"""The run ends when so many optimizer steps in a row were not taken: one may be an outlier, three have a cause."""
USUAL_MISMATCH = {"float32": 0.01, "bfloat16": 0.1}
"""A mean |log-probability difference| of engine and learner with the same weights up to this is not mentioned. Kernels
that round differently stay an order of magnitude below it; other pixels, weights or positions do not."""
STOP_FACTOR = 10
"""The run ends at so many times the usual mismatch."""


@dataclass
class Health:
    """The health of one run. Checkpoints keep `refused_in_row`."""

    dtype: Literal["float32", "bfloat16"]
    model: str
    refused_in_row: int = 0
    _judged: bool = False
    """Whether the mismatch was judged; later ones also depend on staleness."""

    def observe(self, update: UpdateStats) -> list[str]:
        """Return a line for each step that was not taken. Raises NotFiniteError after MOST_REFUSED in a row; a resumed
        run then counts anew."""
        refused, longest = {step.position for step in update.refused}, 0
        for position in update.attempted:
            self.refused_in_row = self.refused_in_row + 1 if position in refused else 0
            longest = max(longest, self.refused_in_row)
        if longest >= MOST_REFUSED:
            self.refused_in_row = 0
            raise NotFiniteError(f"{longest} optimizer steps in a row were not taken. The last: {update.refused[-1]}")
        return [str(step) for step in update.refused]

    def judge(self, update: UpdateStats) -> list[str]:
        """Compare engine and learner at the first update that trains the very weights its tokens were sampled with, and
        return a line if they differ too much. Raises MismatchError if the precision cannot explain it."""
        gap, usual = update.metrics.get("mismatch_mean", math.nan), USUAL_MISMATCH[self.dtype]
        if self._judged or update.staleness_max > 0 or math.isnan(gap):
            return []
        self._judged = True
        if gap <= usual:
            return []
        text = (
            f"engine and learner hold the same weights and give the sampled tokens log-probabilities that differ by "
            f"{gap:.3g} on average (mismatch_mean; up to {usual:g} is usual in {self.dtype}). Look at the options that "
            f"only the engine gets (rollout.engine_options), and compare both with: saccade parity {self.model} "
            f"--dtype {self.dtype}"
        )
        if gap > STOP_FACTOR * usual:
            raise MismatchError(text)
        return [text]

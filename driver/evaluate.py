"""Evaluation: greedy completions of held-out prompts through the same engines and rewards as training.

results[file][group][reward name] = mean over scored completions      (group: by evaluation.group_by)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from driver.errors import RunError
from rollout.engine import SamplingParams
from rollout.types import GroupSummary, Prompt, draw_seed

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass
class Evaluator:
    """Holds the held-out prompts; `run` measures the weights that the engines hold now."""

    prompts: Sequence[Prompt]
    engines: Sequence[Any]
    rewards: Sequence[Any]
    sampling: SamplingParams
    group_by: str | None
    timeout: float
    """Seconds without any group finishing before the wait is an error."""

    def run(self, run_seed: int) -> Results:
        """Means per file, group and reward, `n` the prompts counted, `failed` those without a score."""
        summaries = []
        pending: dict[ray.ObjectRef, Prompt] = {}
        for i, prompt in enumerate(self.prompts):
            seed = draw_seed(run_seed, prompt.ref.uid, prompt.ref.epoch)
            group = self.engines[i % len(self.engines)].generate.remote(prompt, replace(self.sampling, seed=seed))
            _, summary = self.rewards[i % len(self.rewards)].score.remote(group)
            pending[summary] = prompt
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=min(len(pending), 64), timeout=self.timeout)
            if not ready:
                raise RunError(f"evaluation: no group finished for {self.timeout:g} s, {len(pending)} still awaited")
            summaries += [(pending.pop(r), s) for r, s in zip(ready, ray.get(ready), strict=True)]
        return summarise(summaries, self.group_by)


def summarise(scored: Iterable[tuple[Prompt, GroupSummary]], group_by: str | None) -> Results:
    """Average by file and by the value of column `group_by`; failures are counted, never averaged in."""
    cells: dict[str, dict[str, list[GroupSummary]]] = {}
    for prompt, summary in scored:
        file = Path(prompt.ref.uid.rpartition(":")[0]).stem
        group = str(prompt.columns.get(group_by, "none")) if group_by else "all"
        cells.setdefault(file, {}).setdefault(group, []).append(summary)
    return {file: {g: _means(s) for g, s in sorted(groups.items())} for file, groups in sorted(cells.items())}


def _means(summaries: Sequence[GroupSummary]) -> dict[str, float]:
    rewards = [r for s in summaries for r, ok in zip(s.rewards, s.valid, strict=True) if ok]
    values: dict[str, list[float]] = {"reward": rewards}
    for summary in summaries:
        for name, scores in summary.parts.items():
            values.setdefault(name, []).extend(scores)
    failed = sum(1 for s in summaries if s.failure is not None or not all(s.valid))
    means = {name: float(np.mean(v)) if v else float("nan") for name, v in values.items()}
    return {**means, "n": float(len(summaries)), "failed": float(failed)}

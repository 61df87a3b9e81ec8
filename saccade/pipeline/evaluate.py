"""Evaluation: greedy completions of held-out prompts through the same engines and rewards as training.

results[file][group][reward name] = mean over scored completions      (group: by data.columns.group)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, Prompt, draw_seed
from saccade.errors import RunError
from saccade.fleet.waiting import POLL_SECONDS, wait_for

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
    report: Callable[[str], None] = lambda text: None
    """Told what could not be scored, and why."""
    check_stop: Callable[[], None] = lambda: None
    """Raises RunStopped when the user asked to stop; called while waiting."""

    def run(self, run_seed: int) -> Results:
        """Means per file, group and reward, `n` the prompts counted, `failed` those without a score."""
        summaries = []
        pending: dict[ray.ObjectRef, Prompt] = {}
        for i, prompt in enumerate(self.prompts):
            seed = draw_seed(run_seed, prompt.ref.uid, prompt.ref.epoch)
            group = self.engines[i % len(self.engines)].generate.remote(prompt, replace(self.sampling, seed=seed))
            _, summary = self.rewards[i % len(self.rewards)].score.remote(group)
            pending[summary] = prompt
        deadline = time.monotonic() + self.timeout
        while pending:
            self.check_stop()
            ready, _ = ray.wait(list(pending), num_returns=min(len(pending), 64), timeout=POLL_SECONDS)
            if ready:
                deadline = time.monotonic() + self.timeout
            elif time.monotonic() > deadline:
                raise RunError(f"evaluation: no group finished for {self.timeout:g} s, {len(pending)} still awaited")
            found: list[GroupSummary] = wait_for(ready, self.timeout, "held-out groups")
            summaries += [(pending.pop(r), s) for r, s in zip(ready, found, strict=True)]
        self._report_failures([summary for _, summary in summaries])
        return summarise(summaries, self.group_by)

    def _report_failures(self, summaries: Sequence[GroupSummary]) -> None:
        """Raises RunError when an engine died: what is left is no evaluation."""
        failures = [s.failure for s in summaries if s.failure is not None]
        for failure in failures:
            if failure.engine_dead:
                raise RunError(f"engine {failure.engine} died during the evaluation: {failure.reason}")
        reasons = [f.reason for f in failures] + [r for s in summaries for r in s.invalid_reasons]
        if reasons:
            first = "; ".join(sorted(set(reasons))[:3])
            self.report(f"evaluation: {len(reasons)} completions without a score, not averaged: {first}")


def summarise(scored: Iterable[tuple[Prompt, GroupSummary]], group_by: str | None) -> Results:
    """Average by file and by the value of column `group_by`; failures are counted, never averaged in."""
    cells: dict[str, dict[str, list[GroupSummary]]] = {}
    scored = list(scored)
    names = short_names({_file(prompt) for prompt, _ in scored})
    for prompt, summary in scored:
        file = names[_file(prompt)]
        group = str(prompt.columns.get(group_by, "none")) if group_by else "all"
        cells.setdefault(file, {}).setdefault(group, []).append(summary)
    return {file: {g: _means(s) for g, s in sorted(groups.items())} for file, groups in sorted(cells.items())}


def _file(prompt: Prompt) -> str:
    """The file in a uid `file:row`; files of one name have parts of their folders in it."""
    return prompt.ref.uid.rpartition(":")[0]


def short_names(files: Iterable[str]) -> dict[str, str]:
    """File -> its name without suffix, or with it where two would be the same."""
    files = set(files)
    bare = Counter(str(Path(file).with_suffix("")) for file in files)
    return {f: str(Path(f).with_suffix("")) if bare[str(Path(f).with_suffix(""))] == 1 else f for f in files}


def _means(summaries: Sequence[GroupSummary]) -> dict[str, float]:
    rewards = [r for s in summaries for r, ok in zip(s.rewards, s.valid, strict=True) if ok]
    values: dict[str, list[float]] = {"reward": rewards}
    for summary in summaries:
        for name, scores in summary.parts.items():
            values.setdefault(name, []).extend(scores)
    failed = sum(1 for s in summaries if s.failure is not None or not all(s.valid))
    means = {name: float(np.mean(v)) for name, v in values.items() if v}
    return {**means, "n": float(len(summaries)), "failed": float(failed)}

"""Evaluation: greedy completions of held-out prompts, through the same engines, rewards and retries as training.

results[file][group][reward name] = mean over scored completions      (group: by data.columns.group)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.groups import GroupBuffer

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass
class Evaluator:
    """Holds references of the held-out prompts; `run` measures the weights that the engines hold now."""

    prompts: Sequence[tuple[StoredPrompt, str]]
    """Each with the name of its group in the results."""
    dispatcher: Dispatcher
    report: Callable[[str], None] = lambda text: None
    """Told what could not be scored, and why."""
    held: Callable[[], Awaitable[Sequence[tuple[StoredPrompt, str]]]] | None = None
    """Returns the prompts, whose contents may have gone with the data actor."""
    groups: GroupBuffer = field(default_factory=GroupBuffer)
    """Where each group of the last evaluation stands."""

    async def run(self) -> Results:
        """Means per file, group and reward; `n` counts the prompts, `failed` those without a score. Raises RunError
        when nothing ends any more. Groups of an engine that dies are sampled by others."""
        await self._refresh()
        self.groups = GroupBuffer()
        dispatcher = replace(self.dispatcher, groups=self.groups, read=self._read)
        groups = dispatcher.groups.issue(0, [prompt for prompt, _ in self.prompts])
        dispatcher.start(groups)
        summaries = await dispatcher.finish(groups, "held-out groups")
        self._report_failures(summaries)
        return summarise(zip((name for _, name in self.prompts), summaries, strict=True))

    async def _refresh(self) -> None:
        if self.held is not None:
            self.prompts = await self.held()

    async def _read(self, refs: Sequence[PromptRef]) -> list[StoredPrompt]:
        """These prompts for another attempt."""
        await self._refresh()
        known = {prompt.ref.uid: prompt for prompt, _ in self.prompts}
        return [replace(known[ref.uid], ref=ref) for ref in refs]

    def _report_failures(self, summaries: Sequence[GroupSummary]) -> None:
        reasons = [s.failure.reason for s in summaries if s.failure is not None]
        reasons += [reason for s in summaries for reason in s.invalid_reasons]
        if reasons:
            first = "; ".join(sorted(set(reasons))[:3])
            self.report(f"evaluation: {len(reasons)} completions without a score, not averaged: {first}")


def summarise(scored: Iterable[tuple[str, GroupSummary]]) -> Results:
    """Average by file and by the name that stands with each summary; failures are counted, never averaged in."""
    cells: dict[str, dict[str, list[GroupSummary]]] = {}
    scored = list(scored)
    names = short_names({_file(summary) for _, summary in scored})
    for group, summary in scored:
        cells.setdefault(names[_file(summary)], {}).setdefault(group, []).append(summary)
    return {file: {g: _means(s) for g, s in sorted(groups.items())} for file, groups in sorted(cells.items())}


def _file(summary: GroupSummary) -> str:
    """The file in a uid `file:row`; files of one name have parts of their folders in it."""
    return summary.ref.uid.rpartition(":")[0]


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

"""Checks the golds of the data before anything starts: each is scored against itself by the rewards of the run.

a few hundred rows, some of every file ──▶ gold ──▶ a completion that says just that ──▶ reward ──▶ full marks?

If a gold does not get full marks for itself, no completion gets them, and training silently teaches nothing: a worked
solution that marks no answer, a letter that is none of the row's choices, a struct. The check needs no engine, image or
tokenizer, and ends after SECONDS for each set of files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from rewards.answers.golds import gold_forms, is_struct
from rewards.answers.reading import read
from rewards.base import RewardFunction, ScoringRequest, as_completion, gold_of, unscorable
from rewards.compose import describe
from rewards.functions.format import answer_text
from rewards.functions.user import RewardSetupError
from rewards.registry import COMPARING, load_reward
from rollout.data.builder import ANSWER_REFUSALS
from rollout.data.rows import shown
from rollout.data.source import DataError, PromptSource, Refusal
from rollout.types import Prompt, Verdict
from saccade.config.run_config import RunConfig
from vlm.media.types import Media

ASKED = COMPARING | {"tool_call", "grounding"}
"""These rewards are asked: their golds alone say what a right completion is (`ideal`). Programs and judges have no gold
to write down, and the full marks of a user's own reward are not known."""
IMAGE = Media("image", "", b"", width=2**16, height=2**16)
"""Stands in for a row's image, which is not read: a box in pixels gets full marks for itself in any image around it."""
ROWS = 256
"""So many rows of one set (data.train, data.eval) are checked, spread over its files."""
SECONDS = 2.0
"""The check of one set takes about this long: the row at hand is finished."""
EXAMPLES = 3
WHOLE = 5
"""If so many golds of one kind in one file all fail, the kind is taken to fail as a whole."""
LONG = 200
"""A gold of more characters is called a long text, whatever it says."""


@dataclass
class Tally:
    """The results of the golds that one reward was asked about."""

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Golds by file and kind."""
    short: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Golds without full marks, by file and kind."""
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """The first examples of each file and kind."""

    def add(self, file: str, kind: str, example: str | None) -> None:
        """Count one gold. `example` shows it and the reason, or is None if it got full marks."""
        self.asked[file, kind] += 1
        if example is not None:
            self.short[file, kind] += 1
            if len(kept := self.examples.setdefault((file, kind), [])) < EXAMPLES:
                kept.append(example)

    def is_fault(self, share: float) -> bool:
        """Return whether too many failed: more than `share` of all, beyond what a sample may show by chance (three
        standard deviations), or all golds of one kind in one file, if they are WHOLE or more."""
        whole = any(self.asked[group] == failed >= WHOLE for group, failed in self.short.items())
        allowed = share * self.asked.total()
        return whole or self.short.total() == self.asked.total() > 0 or self.short.total() > allowed + 3 * allowed**0.5

    def __str__(self) -> str:
        kinds: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        for counted, found in ((kinds, self.asked), (failed, self.short)):
            for (_, kind), n in found.items():
                counted[kind] += n
        parts = ", ".join(f"{n} of {kinds[kind]} {kind}" for kind, n in failed.most_common())
        groups = [self.examples[group] for group, _ in self.short.most_common()]
        turns = [
            example for turn in zip_longest(*groups) for example in turn if example is not None
        ]  # one of each first
        lines = "".join(f"\n      {example}" for example in turns[:EXAMPLES])
        return f"{self.short.total()} of {self.asked.total()} golds checked ({parts}){lines}"


def gold_problems(config: RunConfig, key: str, source: PromptSource) -> list[str]:
    """Find what is wrong with the golds of one set, `data.train` or `data.eval`: one problem for each reward."""
    if not config.reward.check_golds:
        return []
    try:
        refused, tallies = _asked(config, source)
    except DataError as error:
        return [f"{key}: {error}"]
    share, problems = config.data.max_refused_share, []
    way_out = "turn this check off with reward.check_golds=false"
    if refused.is_fault(share) and not _stops_at_answers(source):
        problems.append(f"{key}: no answer can be read from {refused}\n    name another column, or {way_out}")
    for name, tally in tallies.items():
        if tally.is_fault(share):
            problems.append(
                f"{key}: the reward {name!r} gives the gold answer itself less than full marks for {tally}\n"
                f"    name another column (data.columns.answer), change the reward or its options, or {way_out}"
            )
    return problems


def _stops_at_answers(source: PromptSource) -> bool:
    """Whether a run would stop at the rows read so far, some refused for their answers: another check reports it."""
    report = source.report()
    stops = source.excess() or report.refused_total == report.rows
    return bool(stops) and not report.refused.keys().isdisjoint(ANSWER_REFUSALS)


def _asked(config: RunConfig, source: PromptSource) -> tuple[Tally, dict[str, Tally]]:
    """Return the rows whose answer is refused, and what each reward said."""
    rewards = list(_rewards(config, source.columns.answer is not None))
    refused, tallies = Tally(), {name: Tally() for name, _ in rewards}
    place = _place(config)
    end = time.monotonic() + SECONDS
    for file, row in source.golds(ROWS) if rewards else ():
        if isinstance(row, Refusal):
            refused.add(file, row.kind, str(row))
        else:
            refused.add(file, "read", None)
            for name, function in rewards:
                tallies[name].add(file, *_scored(function, row, place))
        if time.monotonic() > end:
            break
    return refused, tallies


def _rewards(config: RunConfig, has_answers: bool) -> Iterator[tuple[str, RewardFunction]]:
    """Load the rewards that can be asked. Another check reports those that cannot be loaded."""
    for spec in config.reward.functions:
        if spec.name in ASKED and spec.weight != 0 and (has_answers or spec.options.get("column") is not None):
            try:
                yield spec.name, load_reward(spec.name, spec.options)
            except RewardSetupError:
                continue


def wrapper(config: RunConfig) -> Callable[[str], str]:
    """Return a function that puts an answer into the format that the run asks for."""
    spec = next((s for s in config.reward.functions if s.name == "format"), None)
    options = {"trace": "visible", **(spec.options if spec else {})}
    line = "\n" if options.get("style") == "newline" else ""
    think = "" if options["trace"] == "stripped" else f"<think>{line}I look at it.{line}</think>{line}"
    return lambda answer: f"{think}<answer>{line}{answer}{line}</answer>"


def with_completions(row: ScoringRequest, texts: Sequence[str]) -> ScoringRequest:
    """Give the row completions that nobody sampled."""
    return replace(row, completions=tuple(texts), raw=tuple(map(as_completion, texts)))


def _place(config: RunConfig) -> Callable[[str], str]:
    """Return a function that puts a right completion into the format of the run, if it has one."""
    wrap = wrapper(config)
    in_format = any(spec.name == "format" for spec in config.reward.functions)

    def place(ideal: str) -> str:
        answer = answer_text(ideal)
        return wrap(ideal if answer is None else answer) if in_format else ideal

    return place


def _scored(function: RewardFunction, row: Prompt, place: Callable[[str], str]) -> tuple[str, str | None]:
    """Return the kind of a row's gold; and the gold with what the reward said of it, unless it got full marks."""
    request = replace(ScoringRequest.of_row(row), media=(IMAGE,))
    try:
        ideal = function.ideal(request)  # type: ignore[attr-defined]
        completed = with_completions(request, ["" if ideal is None else place(ideal)])
        verdict = _only(function(completed), completed)
    except Exception as error:  # as in a run, where it would be an error verdict
        verdict = Verdict("error", reason=describe(error))
    gold = gold_of(request, getattr(function, "column", None))
    kind = _kind(gold)
    if verdict.score is not None and verdict.score >= 1 - 1e-6:
        return kind, None
    said = f"{verdict.status}" if verdict.score is None else f"{verdict.score:g}"
    return kind, f"{row.ref.uid}: gold {shown(gold)}: {said}: {verdict.reason[:160]}"


def _only(verdicts: Sequence[Verdict], request: ScoringRequest) -> Verdict:
    return verdicts[0] if verdicts else unscorable(request, "nothing was returned")[0]


def _kind(gold: Any) -> str:
    """Name what a gold is: number, letter, words, several, ..."""
    if gold is not None and not isinstance(gold, str):
        return "struct"
    forms = gold_forms(gold)
    if not forms:
        return "empty"
    if is_struct(forms[0]):
        return "struct"
    return "long text" if len(forms[0]) > LONG else type(read(forms[0])).__name__.lower()

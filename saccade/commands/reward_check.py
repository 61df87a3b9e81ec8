"""`saccade rewards check`: probe the rewards of a run with completions of known worth.

rows of data.train ──▶ cases (gold, empty, junk, ...) ──▶ each reward alone, and all together ──▶ scores ──▶ findings
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from rewards.answers.golds import gold_forms
from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.functions.format import shown
from rewards.functions.user import RewardSetupError
from rewards.process.worker import RewardWorker
from rewards.registry import REWARDS, UNBOUNDED, check_rewards, load_reward
from rollout.data.source import DataError
from rollout.types import Verdict
from saccade.checks.gold_check import with_completions, wrapper
from saccade.checks.references import WHERE, load_model, open_set
from saccade.config.messages import ConfigError
from saccade.config.options import trace_shown
from saccade.config.run_config import RunConfig
from saccade.observe.screen import say, show

JUNK = "lorem ipsum 7 or 8, who knows; (A) (B) red blue"
OTHER = "4711"
LONG = 100_000
"""Length of the very long completion, in characters."""
TOGETHER = "all together"


@dataclass
class Probe:
    """The verdicts of one reward (or of all together) on every case of every row."""

    name: str
    bounded: bool
    """Whether full marks are known to be 1.0. Otherwise they are the best score that was seen."""
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    """Case -> a verdict per row."""
    disordered: list[str] = field(default_factory=list)
    """Rows in which a completion's verdict changed with its place or its siblings."""
    seconds: list[float] = field(default_factory=list)
    """Seconds for one group of right answers, row by row."""

    def scores(self, *cases: str) -> list[float]:
        return [v.score for case in cases for v in self.verdicts.get(case, ()) if v.score is not None]

    @property
    def full(self) -> float:
        return max([*self.scores(*self.verdicts), *([1.0] if self.bounded else [])], default=0.0)

    @property
    def minimum(self) -> float:
        return min(self.scores(*self.verdicts), default=0.0)


def cases(request: ScoringRequest, wrap: Callable[[str], str], ideal: str | None) -> dict[str, str]:
    """Return case -> completion. Cases whose names begin with `gold` have the right answer. `ideal` is a completion
    that the reward itself calls right, if it has one."""
    gold = next(iter(gold_forms(request.answer)), None)
    found = {
        "empty": "",
        "junk": JUNK,
        "junk in the format": wrap(JUNK),
        "very long": ("a long story, and " * (LONG // 18 + 1))[:LONG],
        "prompt echoed": wrap(request.prompt),
    }
    if gold is not None:
        found |= {
            "gold": gold,
            "gold in the format": wrap(gold),
            "answer repeated": wrap(gold) + wrap(gold),
            "two answers": wrap(f"{gold} or {OTHER}"),
            "both boxes": wrap(f"\\boxed{{{OTHER}}} \\boxed{{{gold}}}"),
        }
    if ideal is not None:
        found["gold as the reward wants it"] = ideal
    return found


def probe(spec: RewardSpec, requests: Mapping[str, ScoringRequest], config: RunConfig) -> Probe:
    """Probe one reward. `requests` is uid -> a row without completions. Raises RewardSetupError."""
    return _probe([replace(spec, weight=1.0, combine="sum")], spec.name, requests, config)


def _probe(specs: Sequence[RewardSpec], name: str, requests: Mapping[str, ScoringRequest], config: RunConfig) -> Probe:
    bounded = len(specs) == 1 and specs[0].name in REWARDS and specs[0].name not in UNBOUNDED
    found = Probe(name, bounded)
    wrap = wrapper(config)
    ideals = [getattr(load_reward(s.name, s.options), "ideal", None) for s in specs] if len(specs) == 1 else []
    worker = RewardWorker(specs, config.reward.timeout)
    try:
        worker.start()
        for uid, row in requests.items():
            ideal = next((ideal(row) for ideal in ideals if ideal is not None), None)
            _probe_row(found, worker, uid, row, cases(row, wrap, ideal), config)
    finally:
        worker.close()
    return found


def _probe_row(
    found: Probe,
    worker: RewardWorker,
    uid: str,
    row: ScoringRequest,
    texts: Mapping[str, str],
    config: RunConfig,
) -> None:
    def ask(names: Sequence[str]) -> dict[str, Verdict]:
        group = with_completions(row, [texts[name] for name in names])
        return dict(zip(names, worker.score(group).verdicts, strict=True))

    names = list(texts)
    first = ask(names)
    for name, verdict in first.items():
        found.verdicts.setdefault(name, []).append(verdict)
    random.Random(uid).shuffle(names)
    again, alone = ask(names), {k: v for name in texts if name.startswith("gold") for k, v in ask([name]).items()}
    if any((first[n].status, first[n].score) != (v.status, v.score) for n, v in [*again.items(), *alone.items()]):
        found.disordered.append(uid)
    right = texts.get("gold in the format", texts["junk in the format"])
    timed = worker.score(with_completions(row, [right] * config.rollout.num_generations))
    found.seconds.append(sum(timed.seconds.values()))


def findings(found: Probe, generation_seconds: float, actors: int, show: Callable[[str], str] = str) -> Iterator[str]:
    """Return the problems of one reward, one line each."""
    gold = [case for case in found.verdicts if case.startswith("gold")]
    best = [_best(verdicts) for verdicts in zip(*(found.verdicts[case] for case in gold), strict=False)]
    short = [v for v in best if v.score is None or v.score < found.full - 1e-9]
    if short:
        reason = show(short[0].reason) or f"{short[0].score}"
        in_rows = f"in {len(short)} of {len(best)} rows"
        yield f"gives the gold answer less than full marks ({found.full:g}) {in_rows}: {reason}"
    if not gold:
        yield "could not be probed with a right answer, since the rows have none"
    for case in ("empty", "junk"):
        highest = max(found.scores(case), default=found.minimum)
        if highest > found.minimum + 1e-9:
            yield f"gives {case} completions up to {highest:g}; its minimum is {found.minimum:g}"
    if found.minimum == found.full:
        yield f"gives every completion the same score ({found.full:g}), so it teaches nothing"
    junk = found.scores("junk in the format")
    judges_content = bool(junk) and statistics.fmean(junk) < found.full - 1e-9
    for case in ("two answers", "both boxes", "prompt echoed", "very long"):
        if judges_content and max(found.scores(case), default=found.minimum) >= found.full - 1e-9:
            yield f"gives full marks to: {case}"
    if found.disordered:
        rows = f"{len(found.disordered)} rows, first {found.disordered[0]}"
        yield f"depends on the order of calls, or on a completion's siblings: {rows}"
    seconds = statistics.median(found.seconds) / actors if found.seconds else 0.0
    if seconds > generation_seconds:
        yield (
            f"is slower than generation: {seconds:.3g} s a group with {actors} reward actor(s), against "
            f"{generation_seconds:.3g} s; raise reward.actors"
        )


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda v: float("-inf") if v.score is None else v.score)


def generation_seconds(config: RunConfig, token_ms: float) -> float:
    """Return the share of engine time that one group takes on fully loaded engines: L steps for K of the `max_num_seqs`
    sequences that run side by side, divided by the number of engines."""
    rollout = config.rollout
    share = rollout.num_generations / max(rollout.max_num_seqs, rollout.num_generations)
    return float(rollout.max_completion_length * token_ms / 1000 * share / rollout.engines)


def probe_rewards(config: RunConfig, rows: int, token_ms: float, console: Console) -> bool:
    """Print the scores of the configured rewards and their problems. Return whether there are any. Raises
    ConfigError."""
    specs = config.reward.functions
    if problems := check_rewards(specs):
        raise ConfigError([f"reward.functions: {problem}" for problem in problems])
    try:
        source = open_set(config, "data.train", load_model(config), shuffled=True).source
    except DataError as error:
        raise ConfigError([f"data.train: {error}"], WHERE) from error
    prompts = [prompt for prompt in source.look(rows) if prompt is not None]
    if not prompts:
        raise ConfigError([f"data.train: none of the first rows can be used: {source.report()}"])
    requests = {prompt.ref.uid: ScoringRequest.of_row(prompt) for prompt in prompts}
    say(console, f"{len(requests)} rows of data.train")
    limit, trace = generation_seconds(config, token_ms), trace_shown(config)
    try:
        probes = [probe(spec, requests, config) for spec in specs]
        if len(specs) > 1:
            probes.append(_probe(specs, TOGETHER, requests, config))
    except RewardSetupError as error:
        raise ConfigError([str(error)], "the rewards") from error
    show(console, _table(probes))
    lines = [
        f"{p.name}: {line}"
        for p in probes
        for line in findings(p, limit, config.reward.actors, lambda text: shown(text, trace))
    ]
    for line in lines or ["nothing to report"]:
        say(console, line)
    return bool(lines)


def _table(probes: Sequence[Probe]) -> Table:
    """Make a table of mean scores by case and reward. `-` stands for no score, and a number for rows without a
    score."""
    table = Table(title="mean score", title_justify="left")
    table.add_column("completion")
    for found in probes:
        table.add_column(found.name, justify="right", overflow="fold")
    for case in dict.fromkeys(case for found in probes for case in found.verdicts):
        cells = []
        for found in probes:
            scores, all_ = found.scores(case), found.verdicts.get(case, [])
            mean = f"{statistics.fmean(scores):.2f}" if scores else "-"
            cells.append(mean + (f" ({len(all_) - len(scores)} without)" if len(scores) < len(all_) else ""))
        table.add_row(case, *cells)
    return table

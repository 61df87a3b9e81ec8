"""Several rewards as one: a weighted sum per completion, in which a failure stays a failure.

format 1.0, accuracy 0.0              ──▶ scored, 0.5 * 1.0 + 1.0 * 0.0, parts {format: 1.0, accuracy: 0.0}
format 1.0, accuracy error("...")     ──▶ error("accuracy: ..."); never 0.5, never 0
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import RewardFunction, ScoringRequest
from rollout.types import Verdict

MAX_REASON = 500
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class Term:
    """One reward in a sum."""

    name: str
    weight: float
    function: RewardFunction

    @property
    def needs_media(self) -> bool:
        """Whether it looks at images (and raw completions); shipping them for nothing would be a waste."""
        return bool(getattr(self.function, "needs_media", False))


@dataclass(frozen=True, slots=True)
class Composite:
    """The weighted sum of `terms`. It never raises: what a term does wrong becomes `error` verdicts."""

    terms: tuple[Term, ...]

    @property
    def needs_media(self) -> bool:
        return any(term.needs_media for term in self.terms)

    def __call__(self, request: ScoringRequest) -> list[Verdict]:
        columns = [_run(term, request) for term in self.terms]
        return [_sum(self.terms, verdicts) for verdicts in zip(*columns, strict=True)]

    def warm_up(self) -> None:
        """Lets every term load what it needs before the first group arrives."""
        for term in self.terms:
            if warm_up := getattr(term.function, "warm_up", None):
                warm_up()


def compose(terms: Sequence[Term]) -> Composite:
    """The weighted sum of `terms`, whose names (they label the parts) must differ."""
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a sum of rewards needs at least one, under different names; got {names}")
    return Composite(tuple(terms))


def _run(term: Term, request: ScoringRequest) -> list[Verdict]:
    """K verdicts of one term, whatever it does."""
    count = len(request.completions)
    try:
        verdicts = list(term.function(request))
    except (Exception, SystemExit) as error:  # a reward is foreign code; sys.exit() in it must not end the worker
        return [Verdict("error", reason=describe(error))] * count
    if len(verdicts) != count:
        return [Verdict("error", reason=f"returned {len(verdicts)} values for {count} completions")] * count
    return [
        v if isinstance(v, Verdict) else Verdict("error", reason=f"returned a {type(v).__name__}, not a Verdict")
        for v in verdicts
    ]


def _sum(terms: Sequence[Term], verdicts: Sequence[Verdict]) -> Verdict:
    """One completion's verdicts, added up. A term of weight 0 is recorded where it is scored and decides nothing."""
    total = 0.0
    parts: dict[str, float] = {}
    reasons = []
    for term, verdict in zip(terms, verdicts, strict=True):
        if verdict.score is not None:
            total += term.weight * verdict.score
            parts[term.name] = float(verdict.score)
            reasons += [f"{term.name}: {verdict.reason}"] if verdict.reason else []
        elif term.weight != 0:
            return Verdict(verdict.status, reason=f"{term.name}: {verdict.reason}"[:MAX_REASON])
    if not math.isfinite(total):
        return Verdict("error", reason=f"the weighted sum of {parts} is {total}"[:MAX_REASON])
    return Verdict.scored(total, parts, "; ".join(reasons)[:MAX_REASON])


def describe(error: BaseException) -> str:
    """`ValueError: text (file.py:12 in function)`: what went wrong and where, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}"[:MAX_REASON] + where

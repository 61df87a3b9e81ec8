"""Combine several rewards into one. A failure stays a failure.

    score = min( (sum of weight * score) * (product of the gates), the caps )

    format 1.0, accuracy 0.0            ──▶ scored, 0.5 * 1.0 + 1.0 * 0.0, parts {format: 1.0, accuracy: 0.0}
    format 0.0 (a gate), accuracy 1.0   ──▶ scored, 1.0 * 0.0
    format 1.0, accuracy error("...")   ──▶ error("accuracy: ..."); never 0.5, never 0

`combine` says which of the three a reward is: `sum` (the default), `product` (a gate) or `minimum` (a cap). Where there
is no `sum`, the sum counts as 1, and where there are only caps, their minimum is the score.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rewards.base import RewardFunction, ScoringRequest, Service, TransientError
from rollout.types import Verdict, is_finite

T = TypeVar("T")
Combine = Literal["sum", "product", "minimum"]

MAX_REASON = 500
"""The most characters of a reason that are kept."""
PAUSES = (0.5, 2.0)
"""Seconds to wait before the second and the third attempt, after TransientError."""


@dataclass(frozen=True, slots=True)
class Term:
    """One reward and how it is combined with the others."""

    name: str
    weight: float
    """Its factor in the sum. 0: the reward is only recorded, however it is combined."""
    function: RewardFunction
    combine: Combine = "sum"


@dataclass(frozen=True, slots=True)
class Scores:
    """The verdicts of a composite on a group, with the time of each reward."""

    verdicts: tuple[Verdict, ...]
    seconds: Mapping[str, float]
    """Wall time by reward name."""


@dataclass(frozen=True, slots=True)
class Composite:
    """Combines all `terms` into one reward. It never raises: errors of a term become `error` verdicts."""

    terms: tuple[Term, ...]

    @property
    def needs_media(self) -> bool:
        """Return whether any term reads the bytes of images or raw completions. If not, they are not sent."""
        return any(getattr(term.function, "needs_media", False) for term in self.terms)

    @property
    def separable(self) -> bool:
        """Return whether every term judges a completion independently of its siblings."""
        return all(getattr(term.function, "separable", False) for term in self.terms)

    def __call__(self, request: ScoringRequest) -> list[Verdict]:
        return list(self.score(request).verdicts)

    def score(self, request: ScoringRequest) -> Scores:
        """Return K verdicts, and how long each term took."""
        columns, seconds = [], {}
        for term in self.terms:
            begin = time.perf_counter()
            columns.append(_run(term, request))
            seconds[term.name] = time.perf_counter() - begin
        return Scores(tuple(_combine(self.terms, verdicts) for verdicts in zip(*columns, strict=True)), seconds)

    def warm_up(self) -> None:
        """Let every term load what it needs before the first group arrives."""
        for term in self.terms:
            if warm_up := getattr(term.function, "warm_up", None):
                warm_up()

    def connect(self, services: Mapping[str, Service]) -> None:
        """Pass the driver's services to the terms that want them."""
        for term in self.terms:
            if connect := getattr(term.function, "connect", None):
                connect(services)


def compose(terms: Sequence[Term]) -> Composite:
    """Combine all `terms` into one reward. Their names label the parts and must differ."""
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one reward, with different names; got {names}")
    return Composite(tuple(terms))


def _run(term: Term, request: ScoringRequest) -> list[Verdict]:
    """Return K verdicts of one term, whatever it does."""
    count = len(request.completions)
    try:
        verdicts = list(patiently(lambda: term.function(request)))
    except (Exception, SystemExit) as error:  # a reward is the user's code; sys.exit() in it must not end the worker
        return [Verdict("error", reason=describe(error))] * count
    if len(verdicts) != count:
        return [Verdict("error", reason=f"returned {len(verdicts)} values for {count} completions")] * count
    return [
        v if isinstance(v, Verdict) else Verdict("error", reason=f"returned a {type(v).__name__}, not a Verdict")
        for v in verdicts
    ]


def patiently(attempt: Callable[[], T]) -> T:
    """Call `attempt` and return its result. Repeat it after TransientError, and raise the last one."""
    for pause in PAUSES:
        try:
            return attempt()
        except TransientError:
            time.sleep(pause)
    return attempt()


def _combine(terms: Sequence[Term], verdicts: Sequence[Verdict]) -> Verdict:
    """Combine the verdicts of one completion. The score of a term of weight 0 is recorded and decides nothing."""
    total, gate, caps = 0.0, 1.0, []
    parts: dict[str, float] = {}
    for term, verdict in zip(terms, verdicts, strict=True):
        if verdict.score is None:
            if term.weight != 0:
                return Verdict(verdict.status, reason=f"{term.name}: {verdict.reason}"[:MAX_REASON], note=verdict.note)
            continue
        parts[term.name] = float(verdict.score)
        if term.weight == 0:
            continue
        if term.combine == "sum":
            total += term.weight * verdict.score
        elif term.combine == "product":
            gate *= verdict.score
        else:
            caps.append(verdict.score)
    active = {term.combine for term in terms if term.weight != 0}
    total = 1.0 if active and "sum" not in active else total
    score = min(caps) if active == {"minimum"} else min([total * gate, *caps])
    if not is_finite(score):
        reason = f"{parts} combine to {score}, which is not a finite float32 number"
        return Verdict("error", reason=reason[:MAX_REASON])
    return Verdict.scored(score, parts, _joined(terms, verdicts, "reason"), _joined(terms, verdicts, "note"))


def _joined(terms: Sequence[Term], verdicts: Sequence[Verdict], what: Literal["reason", "note"]) -> str:
    """Join the reasons or notes of the scored parts, each with its reward's name."""
    pairs = ((term.name, getattr(v, what)) for term, v in zip(terms, verdicts, strict=True) if v.valid)
    return "; ".join(f"{name}: {text}" for name, text in pairs if text)[:MAX_REASON]


def describe(error: BaseException) -> str:
    """Describe an error and its place on one line: `ValueError: text (file.py:12 in function)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}"[:MAX_REASON] + where

"""Hedging: whether the words around an answer deny it or leave it open. Pure functions on a few words of prose.

    denied     I don't think the answer is 3; it is wrong to say that the answer is 3; the answer is 3 is wrong; 3? No
    hedged     it is not 3; I doubt that it is 3; more than 3; at least 3; 3 or more

Failure modes: the rules match words and do not understand them. `it is not hard to see that` before an answer is not a
denial, because more than three words are between them. A denial in another sentence is not seen.
"""

from __future__ import annotations

import re

_CLAUSE = re.compile(r"[.,;:!?\n]")
_DENIED_BEFORE = re.compile(
    r"(?i)(?:n[’']t|\bnot|\bnever|\bcannot) (?:\w+ )?(?:think|believe|say|claim|mean|know|agree|sure|certain|true|"
    r"right|correct|clear|likely|possible)\b|\b(?:wrong|incorrect|false|doubt|unlikely|mistaken)\b"
)
_DENIED_BEHIND = re.compile(
    r"(?i)[^.,;]{0,60}?(?:[0-9]\?|\bcan(?:not|[’']t) be\b|"
    r"\b(?:is|was|would be|seems)(?:n[’']t\b| (?:\w+ )?(?:not|wrong|incorrect|false|impossible)\b))"
)
_HEDGED_BEFORE = re.compile(
    r"(?i)(?:\b(?:than|at least|at most|up to|between|exceeds|exceeding|above|below)(?: or equal to)?|"
    r"(?:\b(?:not|never|cannot|doubt|neither|nor|none|wrong|unlikely)|n[’']t)(?: (?!but\b)[^\s.,;:!?0-9]+){0,3})\Z"
)
_HEDGED_BEHIND = re.compile(r"(?i)(?:or|and) (?:more|less|fewer|greater|higher|lower|above|below|over|under|up|so)\b")


def is_denied(before: str, sentence: str) -> bool:
    """Return whether `the answer is` is denied by its own clause, which ends `before`, or by the sentence that
    follows."""
    return bool(_DENIED_BEFORE.search(_CLAUSE.split(before)[-1]) or _DENIED_BEHIND.match(sentence))


def is_hedged(before: str, behind: str) -> bool:
    """Return whether the words `before` and `behind` an expression deny it, or make it only a bound."""
    return bool(_HEDGED_BEFORE.search(before) or _HEDGED_BEHIND.match(behind))

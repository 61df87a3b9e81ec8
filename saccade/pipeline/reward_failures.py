"""Rewards that fail: how many of a batch may, and what the user is told when there are more."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rollout.types import GroupSummary
from saccade.errors import RunError

_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9]+(?:\.[0-9]+)?")
"""Matches what differs between failures of one kind: quoted values and numbers."""
MOST_KINDS = 5


def unscored(summary: GroupSummary) -> str | None:
    """Return why a group has no baseline, hence no part in any step; None where it has one."""
    if sum(summary.valid) >= 2:
        return None
    return next(iter(summary.invalid_reasons), "no reason was given")[:200]


def check_failures(summaries: Sequence[GroupSummary], max_share: float, of_at_least: int = 0) -> None:
    """Raises RunError when the rewards failed (`error` or `timeout`; `unscorable` is not a failure) for more than
    `max_share` of all completions, or of so many if they are fewer: with the reasons grouped, the most frequent first,
    and an example of each."""
    completions = max(of_at_least, sum(len(summary.valid) for summary in summaries))
    kinds: dict[str, list[str]] = {}
    for summary in summaries:
        excerpts = summary.invalid_excerpts or ("",) * len(summary.invalid_reasons)
        for reason, excerpt in zip(summary.invalid_reasons, excerpts, strict=True):
            if reason.startswith(("error: ", "timeout: ")):
                example = f"{reason} (prompt {summary.ref}, completion {excerpt!r})"
                kinds.setdefault(_VARIABLE.sub("_", reason), []).append(example)
    failed = sum(map(len, kinds.values()))
    if failed <= max_share * completions:
        return
    ranked = sorted(kinds.values(), key=len, reverse=True)
    lines = [f"  {len(examples)} x {examples[0]}" for examples in ranked[:MOST_KINDS]]
    if rest := sum(map(len, ranked[MOST_KINDS:])):
        lines.append(f"  and {rest} for other reasons")
    raise RunError(
        f"the rewards failed for {failed} of {completions} completions of a batch, more than "
        f"reward.max_failed_share={max_share:g} allows:\n" + "\n".join(lines)
    )

"""A reward is a function of a whole group: K completions in, K verdicts out.

RolloutGroup ──▶ ScoringRequest ──▶ RewardFunction ──▶ Verdicts      (rewards/actor.py adds limits and isolation)

What a reward may have besides its call:

    needs_media = True          its requests carry the bytes of images and the raw completions
    separable = True            what it says of a completion depends on no sibling: after a crash or a time-out each
                                is scored alone, so that only the guilty one goes without a score
    columns = ("level",)        data columns that its requests must have, where its parameters do not name them
    warm_up()                   called once before the first group
    connect(services)           handed what the driver offers: `{"generate": callable, "reward_model": callable}`
    ideal(request)              a completion that deserves full marks, where the row tells; for `saccade rewards check`
                                and for the check of golds at the start of a run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from rollout.types import Completion, FinishReason, Prompt, RolloutGroup, Segment, Verdict
from vlm.media.types import Media

Service = Callable[..., Any]
"""Something that runs elsewhere on behalf of a reward. What the driver offers takes `timeout` (seconds) besides its
arguments; a reward calls it without, since its own time limit applies."""


class TransientError(Exception):
    """Raised by a reward for what may go well at the next attempt (a server that is busy): the call is repeated, a few
    times and within its time limit. Every other exception is final."""


class ServiceError(RuntimeError):
    """A service could not do what a reward asked of it; says why."""


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """What a reward may look at: one prompt and its K completions."""

    prompt: str
    """As the model is given it: rendered by its chat template, with that template's own tokens."""
    completions: tuple[str, ...]
    """Decoded text of each completion. Control tokens are left out; tags stay, be they special tokens or not."""
    answer: str | None = None
    numeric_answer: bool = field(default=False, kw_only=True)
    """The row's answer is a number, and no text that says one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data row."""
    media: tuple[Media, ...] = ()
    """With kind and size; with its bytes only for rewards with `needs_media`."""
    raw: tuple[Completion, ...] = ()
    """Token ids, finish reasons and the like, for rewards with `needs_media`."""
    lengths: tuple[int, ...] = ()
    """Tokens of each completion; empty where nobody counted them (completions from a file)."""
    user_text: str = ""
    """The user's words as the data row has them, of which choices and the like are read."""

    @classmethod
    def of(cls, group: RolloutGroup) -> ScoringRequest:
        prompt, raw = group.prompt, group.completions
        texts, lengths = tuple(c.text for c in raw), tuple(c.num_tokens for c in raw)
        row = cls.of_row(prompt)
        return replace(row, completions=texts, raw=raw, lengths=lengths)

    @classmethod
    def of_row(cls, prompt: Prompt) -> ScoringRequest:
        """What a reward may look at before there are completions."""
        return cls(
            prompt.text,
            (),
            prompt.answer,
            prompt.columns,
            prompt.media,
            user_text=prompt.user_text,
            numeric_answer=prompt.numeric_answer,
        )

    def alone(self, k: int) -> ScoringRequest:
        """The request for completion `k` without its siblings."""
        one = slice(k, k + 1)
        return replace(self, completions=self.completions[one], raw=self.raw[one], lengths=self.lengths[one])


def as_completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    """A text that no engine sampled as a completion, for rewards that look at `raw`: its tokens are the bytes of its
    UTF-8 form, since there is no tokenizer to ask."""
    ids = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)
    return Completion((Segment(ids, None, np.zeros(len(ids), np.int32), trainable=False),), text, finish_reason, seed=0)


class RewardFunction(Protocol):
    """Returns exactly one verdict per completion, in order. It may raise: that becomes K `error` verdicts."""

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]: ...


def unscorable(request: ScoringRequest, reason: str) -> list[Verdict]:
    """K verdicts of a row that cannot be judged, whatever the completions say."""
    return [Verdict("unscorable", reason=reason)] * len(request.completions)


def gold_of(request: ScoringRequest, column: str | None) -> Any:
    """What the row says is right: its answer, or another column of it. None where there is nothing."""
    gold = request.answer if column is None else request.columns.get(column)
    return None if isinstance(gold, str) and not gold.strip() else gold

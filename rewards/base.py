"""A reward scores a whole group: K completions in, K verdicts out.

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
"""A function that runs elsewhere on behalf of a reward. The driver's services also take `timeout` (seconds); a reward
calls them without it, since the reward's own time limit applies."""


class TransientError(Exception):
    """A reward raises this for a failure that may pass, such as a busy server. The call is repeated a few times within
    its time limit. Every other exception is final."""


class ServiceError(RuntimeError):
    """A service could not do what a reward asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """The input of a reward: one prompt and its K completions."""

    prompt: str
    """The prompt as the model gets it: rendered by its chat template, with that template's own tokens."""
    completions: tuple[str, ...]
    """Decoded text of each completion. Control tokens are removed; tags stay, whether or not they are special
    tokens."""
    answer: str | None = None
    numeric_answer: bool = field(default=False, kw_only=True)
    """Whether the row's answer has the type number (and is not a text that states one)."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data row."""
    media: tuple[Media, ...] = ()
    """The prompt's media with kind and size. The bytes are there only for rewards with `needs_media`."""
    raw: tuple[Completion, ...] = ()
    """Token ids, finish reasons and so on, for rewards with `needs_media`."""
    lengths: tuple[int, ...] = ()
    """Number of tokens of each completion; empty for completions from a file."""
    user_text: str = ""
    """The user's words as the data row has them. Choices, for example, are read from them."""

    @classmethod
    def of(cls, group: RolloutGroup) -> ScoringRequest:
        prompt, raw = group.prompt, group.completions
        texts, lengths = tuple(c.text for c in raw), tuple(c.num_tokens for c in raw)
        row = cls.of_row(prompt)
        return replace(row, completions=texts, raw=raw, lengths=lengths)

    @classmethod
    def of_row(cls, prompt: Prompt) -> ScoringRequest:
        """Make a request from a data row, before there are completions."""
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
        """Return the request for completion `k` without its siblings."""
        one = slice(k, k + 1)
        return replace(self, completions=self.completions[one], raw=self.raw[one], lengths=self.lengths[one])


def as_completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    """Make a completion from a text that no engine sampled, for rewards that read `raw`. Without a tokenizer, its
    tokens are the bytes of its UTF-8 form."""
    ids = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)
    return Completion((Segment(ids, None, np.zeros(len(ids), np.int32), trainable=False),), text, finish_reason, seed=0)


class RewardFunction(Protocol):
    """Return exactly one verdict per completion, in order. If it raises, all K verdicts become `error`."""

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]: ...


def unscorable(request: ScoringRequest, reason: str) -> list[Verdict]:
    """Return K verdicts for a row that cannot be judged, whatever the completions say."""
    return [Verdict("unscorable", reason=reason)] * len(request.completions)


def gold_of(request: ScoringRequest, column: str | None) -> Any:
    """Return the gold of a row: its answer, or another column. None if there is none."""
    gold = request.answer if column is None else request.columns.get(column)
    return None if isinstance(gold, str) and not gold.strip() else gold

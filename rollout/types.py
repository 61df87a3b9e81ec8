"""The types that cross processes: named, frozen, and understood without Ray, torch or an engine.

    Prompt ──▶ RolloutGroup ──▶ Verdicts, GroupSummary ──▶ RolloutGroup with its verdicts
    (DataActor)  (RolloutActor)   (RewardActor)              (joined in the LearnerWorker)

The driver holds references to these and the small `GroupSummary`, never tokens or pixels.
Letters used for shapes everywhere: B groups, K completions per group, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlm.media.types import Media, MediaKind

FinishReason = Literal["stop", "length", "abort"]
VerdictStatus = Literal["scored", "unscorable", "timeout", "error"]

MEDIA_PER_PROMPT: Mapping[MediaKind, int] = {"image": 8, "video": 2, "audio": 2}
"""The most items of each kind in one prompt. The data side refuses rows with more, and engines make room for them."""
BAN = -100.0
"""Engine and learner add this to the logit of a banned token. vLLM clamps its `logit_bias` to it."""


@dataclass(frozen=True, slots=True, order=True)
class PromptRef:
    """The identity of one unit of work. `(uid, epoch)` is trained exactly once; `attempt` counts retries of it."""

    uid: str
    """Stable name of the row in its data set (`"<file name>:<row>"`), the same in every epoch and after a resume."""
    epoch: int = 0
    attempt: int = 0
    row: int = -1
    """Row number over all files in config order, by which the DataActor reads it again."""

    def retry(self) -> PromptRef:
        return PromptRef(self.uid, self.epoch, self.attempt + 1, self.row)

    def __str__(self) -> str:
        return f"{self.uid} (epoch {self.epoch}, attempt {self.attempt})"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of data, ready for an engine. Text and metadata by value, media by reference."""

    ref: PromptRef
    text: str
    """The text that the model's chat template renders, up to where the assistant speaks, with one placeholder per media
    item."""
    token_ids: np.ndarray
    """int32 `[T]`: `text` tokenised, placeholders *not* expanded (an engine expands them, exactly once)."""
    expanded_length: int
    """Length in tokens after every placeholder is expanded to its image's tokens."""
    media: tuple[Media, ...] = ()
    answer: str | None = None
    numeric_answer: bool = False
    """Whether the row's answer has the type number (and is not a text that states one)."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row, passed to rewards unchanged."""
    truncated: int = 0
    """Characters of the user's text that were dropped from its left, so that the prompt fits."""
    user_text: str = ""
    """All of the user's words as the row has them, without chat template, prompt template, system message and media."""


@dataclass(frozen=True, slots=True)
class StoredPrompt:
    """A prompt as the driver holds it: its identity, and a reference to its contents."""

    ref: PromptRef
    prompt: Any
    """Reference of the Prompt in the object store, whose `ref` is that of the first attempt."""
    length: int = 0
    """Its length in tokens, with media expanded."""


@dataclass(frozen=True, slots=True)
class Together:
    """Groups of which an engine runs none before all of them wait in its queue."""

    batch: str
    """Names them, once in the life of an engine."""
    size: int
    """How many of them this engine gets."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one origin inside a completion. A single-turn completion has exactly one, trainable."""

    token_ids: np.ndarray
    """int32 `[T]`, exactly as sampled; never re-tokenised."""
    logprobs: np.ndarray | None
    """float32 `[T]`, log-probability of each token under the distribution it was drawn from (temperature and banned
    tokens applied); None for tokens that no policy sampled (a tool's result, say)."""
    policy_versions: np.ndarray
    """int32 `[T]`, the version of the weights that sampled each token."""
    media: tuple[Media, ...] = ()
    trainable: bool = True

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if len(self.policy_versions) != length:
            raise ValueError(f"{length} tokens but {len(self.policy_versions)} policy versions")
        if self.logprobs is not None and len(self.logprobs) != length:
            raise ValueError(f"{length} tokens but {len(self.logprobs)} log-probabilities")
        if self.trainable and self.logprobs is None:
            raise ValueError("a trainable segment needs the log-probabilities it was sampled with")


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the K answers to a prompt."""

    segments: tuple[Segment, ...]
    text: str
    finish_reason: FinishReason
    seed: int
    """The seed it was drawn with: a function of (run seed, uid, epoch, k), so that a repeated attempt repeats it."""

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that sampled any trainable token of it."""
        versions = [s.policy_versions.min() for s in self.segments if s.trainable and len(s.token_ids)]
        if not versions:
            raise ValueError("the completion has no trainable token, hence no policy version")
        return int(min(versions))


LARGEST_SCORE = float(np.finfo(np.float32).max)
"""Advantages and losses are float32: a larger score would be infinite there."""


def is_finite(score: float) -> bool:
    """Whether `score` is a number that float32 can hold."""
    return abs(score) <= LARGEST_SCORE


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward function's judgement of one completion. A failure is a status with a reason, never a zero."""

    status: VerdictStatus
    score: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Reward name -> score, if several rewards were combined."""
    note: str = ""
    """A note for people who look at the completion. It decides nothing."""

    def __post_init__(self) -> None:
        if (self.status == "scored") != (self.score is not None):
            raise ValueError(f"a verdict is 'scored' exactly when it has a score: {self.status!r} with {self.score!r}")
        if self.score is not None and not is_finite(self.score):
            raise ValueError(f"a score must be finite in float32, got {self.score!r}")
        if self.status != "scored" and not self.reason:
            raise ValueError(f"a verdict of status {self.status!r} must say why")

    @classmethod
    def scored(
        cls, score: float, parts: Mapping[str, float] | None = None, reason: str = "", note: str = ""
    ) -> Verdict:
        return cls("scored", float(score), reason, dict(parts or {}), note)

    @property
    def valid(self) -> bool:
        return self.status == "scored"


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The K completions of one prompt; the learner joins them with their verdicts."""

    prompt: Prompt
    prompt_token_ids: np.ndarray
    """int32 `[T]`, the *expanded* ids the engine really attended to; the learner checks its own against them."""
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...] | None = None
    engine: str = ""
    """Name of the engine that generated it."""
    generate_started: float = 0.0
    """Unix time of admission in the engine."""
    generate_seconds: float = 0.0
    """Wall time from admission in the engine to the last token."""

    def __post_init__(self) -> None:
        if self.verdicts is not None and len(self.verdicts) != len(self.completions):
            raise ValueError(f"{len(self.completions)} completions but {len(self.verdicts)} verdicts")


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A scored group as the driver holds it: where its contents are."""

    group: Any
    """Reference of the RolloutGroup in the object store, as its engine put it there."""
    verdicts: Any
    """Reference of its K verdicts."""


@dataclass(frozen=True, slots=True)
class RolloutFailure:
    """A group that could not be generated. It is plain data, so that the driver need not unpickle an exception."""

    ref: PromptRef
    reason: str
    engine: str = ""
    engine_dead: bool = False
    """Whether the engine is gone and must be started again."""
    retryable: bool = False
    """Whether another attempt may succeed (after a time-out, for example). False if the fault is in the prompt."""


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """A scored group as the driver needs it: a few numbers, no tokens."""

    ref: PromptRef
    rewards: tuple[float, ...]
    """K scores; 0.0 where `valid` is False (never read there)."""
    valid: tuple[bool, ...]
    parts: Mapping[str, tuple[float, ...]]
    """Scores by reward name, over the valid completions."""
    lengths: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]
    prompt_length: int
    """Length in tokens, with media expanded."""
    oldest_version: int
    """Minimum policy version over all trainable tokens; decides staleness. -1 for a failure."""
    generate_started: float = 0.0
    generate_seconds: float = 0.0
    reward_seconds: float = 0.0
    engine: str = ""
    invalid_reasons: tuple[str, ...] = ()
    """`status: reason` of each completion without a score."""
    invalid_excerpts: tuple[str, ...] = ()
    """The beginning of each of these completions, for reports."""
    part_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of scoring by reward name."""
    failure: RolloutFailure | None = None
    media_length: int = 0
    """Tokens to which the placeholders of the prompt's media expanded."""

    @classmethod
    def of(cls, group: RolloutGroup) -> GroupSummary:
        verdicts = group.verdicts
        if verdicts is None:
            raise ValueError(f"group {group.prompt.ref} is not scored yet")
        names = sorted({name for v in verdicts for name in v.parts})
        return cls(
            ref=group.prompt.ref,
            rewards=tuple(v.score if v.score is not None else 0.0 for v in verdicts),
            valid=tuple(v.valid for v in verdicts),
            parts={n: tuple(v.parts[n] for v in verdicts if v.valid and n in v.parts) for n in names},
            lengths=tuple(c.num_tokens for c in group.completions),
            finish_reasons=tuple(c.finish_reason for c in group.completions),
            prompt_length=len(group.prompt_token_ids),
            oldest_version=min(c.oldest_version for c in group.completions),
            generate_started=group.generate_started,
            generate_seconds=group.generate_seconds,
            engine=group.engine,
            invalid_reasons=tuple(f"{v.status}: {v.reason}" for v in verdicts if not v.valid),
            media_length=len(group.prompt_token_ids) - len(group.prompt.token_ids) + len(group.prompt.media),
        )

    @classmethod
    def of_failure(cls, failure: RolloutFailure) -> GroupSummary:
        return cls(failure.ref, (), (), {}, (), (), 0, -1, engine=failure.engine, failure=failure)


def draw_seed(run_seed: int, uid: str, epoch: int, k: int = 0) -> int:
    """The sampling seed of completion `k`: 31 bits derived from what identifies the draw, so an attempt repeats it.

    Engines that sample all K in one request take the seed of k=0 and add k, so the derivation does the same.
    """
    digest = hashlib.blake2b(f"{run_seed}/{uid}/{epoch}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + k) % (2**31 - 1)

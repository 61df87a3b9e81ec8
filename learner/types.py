"""The inputs and outputs of the learner: options, results of updates, failures. Plain data, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from learner.config import AlgorithmConfig, Auto, Current, LearnerConfig
from rollout.config import RolloutConfig
from rollout.types import PromptRef
from vlm.config import ModelConfig, role_problems
from vlm.errors import UserError
from vlm.media.types import MediaKind

UNLIMITED = 2**62

MOST_NAMED = 8
"""Prompts that a description names."""


class Size(NamedTuple):
    """The size of a group or a micro-batch, or its limit."""

    tokens: int
    """Language positions: each prompt once, and all completions."""
    patches: int = 0
    """Inputs of the vision (and audio) towers."""
    logits: int = 0
    """Positions whose logits are computed."""
    bytes: int = 0
    """Memory, where a limit is given in bytes."""


class LearnerError(UserError, RuntimeError):
    """A learner rank failed; says which, in what, and why. The group is unusable afterwards: shut it down."""


class LearnerTimeoutError(LearnerError):
    """A learner call did not finish in its time; names the call and the ranks that were still running."""


class ContentsLostError(UserError, RuntimeError):
    """Groups of a batch are no longer in the object store: the node or the process that kept them is gone. Nothing was
    trained."""

    def __init__(self, refs: Sequence[PromptRef]) -> None:
        super().__init__(tuple(refs))
        self.refs = tuple(refs)

    def __str__(self) -> str:
        return f"the contents of {len(self.refs)} groups are lost (first: {self.refs[0]})"


class NothingToLearnError(UserError, ValueError):
    """No group of the batch has two scored completions, or none a token to train on. The weights are unchanged."""


class NotFiniteError(UserError, ValueError):
    """Numbers that are not finite, where the run cannot continue with them: one step after another that is not taken,
    rewards, or weights that would be written."""


class RewardError(UserError, ValueError):
    """Rewards from which no advantage can be computed; names the prompt and the reward. The weights are unchanged."""


class EncodingMismatchError(UserError, ValueError):
    """Learner and engine expand a prompt to different tokens; names the family and the first position that differs."""


def quantization_problems(model: ModelConfig, learner: LearnerConfig) -> list[str]:
    """Combinations with quantized weights that do not work, or that nobody has seen work."""
    found: list[str] = []
    if model.quantize == "none":
        return found
    if learner.zero_stage == 3:
        found.append(
            f"quantize={model.quantize} with zero_stage=3 has not been tested: ZeRO-3 partitions weights, and would "
            "have to do so with 4-bit blocks and their scales together; use zero_stage 0, 1 or 2"
        )
    if learner.offload == "parameters":
        found.append(f"quantize={model.quantize} with offload=parameters has not been tested: switch one of them off")
    return found


def precision_problems(model: ModelConfig, learner: LearnerConfig) -> list[str]:
    """Combinations of a precision and a ZeRO stage in which small steps would be lost to rounding."""
    if learner.zero_stage > 0 or model.dtype != "bfloat16":
        return []
    return ["zero_stage=0 keeps no float32 master weights; with bfloat16 use zero_stage 1, 2 or 3"]


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """The options of a LearnerGroup, the same on every rank: the sections of the configuration that it reads, and what
    follows from the whole run."""

    model: ModelConfig
    """The initial policy, and the frozen reference. float64 is for `TorchEngine`, against which others are measured."""
    total_steps: int
    """Optimizer steps of the whole run, over which the learning rate decays."""
    device: Literal["cuda", "cpu"] = "cuda"
    algorithm: AlgorithmConfig = field(default_factory=lambda: AlgorithmConfig(off_policy=Current()))
    """Its `off_policy` is decided, never `auto`."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the completions were sampled."""
    media_kinds: tuple[MediaKind, ...] = ("image",)
    """Kinds of media that the run's data may hold, if the model takes them: every rank runs their towers in every
    pass."""
    part_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the rewards by name, if each is to be normalised within its group before they are summed; or empty."""
    unit_bytes: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Bytes of a language position, of a vision patch, of a position with a loss, and of any micro-batch.
    `learner.plan.predict` fills them in where micro-batches are limited in bytes."""
    threads: int = 1
    """Compute threads of one rank on CPU."""
    timeout: float = 1800.0
    """Seconds that any one call, and any one collective inside it, may take."""
    seed: int = 0
    """Initialises LoRA adapters and each rank's generator."""

    def __post_init__(self) -> None:
        problems = role_problems(self.model) + quantization_problems(self.model, self.learner)
        problems += precision_problems(self.model, self.learner)
        if isinstance(self.algorithm.off_policy, Auto):
            problems.append("off_policy must be resolved before the learner starts, and not be auto")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def micro_batch(self) -> Size:
        """Return the limit of one micro-batch."""
        tokens, held = self.learner.micro_batch_tokens, self.learner.micro_batch_bytes
        return Size(
            tokens=UNLIMITED if tokens is None else tokens,
            patches=UNLIMITED,
            logits=UNLIMITED,
            bytes=(UNLIMITED if held is None else held) - math.ceil(self.unit_bytes[3]),
        )

    def size(self, tokens: int, patches: int, logits: int) -> Size:
        """With the bytes that so much takes."""
        token, patch, row, _ = self.unit_bytes
        return Size(tokens, patches, logits, math.ceil(token * tokens + patch * patches + row * logits))


@dataclass(frozen=True, slots=True)
class WeightTransferOptions:
    """How the learner sends its weights to the engines (`weight_sync.sender.WeightSender`)."""

    backend: str
    """"nccl" or "gloo"."""
    bucket_bytes: int = 8 * 2**20
    """Bytes gathered and sent at once."""
    timeout: float = 300.0
    """Seconds that forming the group, or one transfer, may take."""


@dataclass(frozen=True, slots=True)
class RefusedStep:
    """Weights, moments and schedule are as they were before it, and none of its prompts was trained."""

    position: int
    """Which of the update's `optimizer_steps` it is."""
    terms: tuple[str, ...]
    """Terms of the loss that were not finite; empty: only the gradient was not."""
    suspects: tuple[PromptRef, ...]
    """Prompts of the micro-batches whose terms were not finite."""
    loss: float
    grad_norm: float
    mismatch: float
    """Mean |log-probability of the learner - of the engine|."""
    prompts: tuple[PromptRef, ...] = ()
    """All prompts of the step."""

    @property
    def reason(self) -> str:
        """The terms that were not finite, in the same words for all of a kind."""
        return f"{', '.join(self.terms) or 'the gradient'} not finite"

    def __str__(self) -> str:
        named = ", ".join(map(str, (self.suspects or self.prompts)[:MOST_NAMED]))
        return (
            f"the gradient is not finite, so the step was not taken: weights, optimizer and schedule are unchanged. "
            f"Not finite: {', '.join(self.terms) or 'the norm of the gradient'} (loss {self.loss:g}, gradient norm "
            f"{self.grad_norm:g}). Look at scores and completions of the prompts {named}, and at mismatch_mean, "
            f"{self.mismatch:.3g} in this step: engine and learner should agree"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """An update as one rank knows it: figures over all its steps and all ranks, of the steps that were taken if any
    was. What only people read is in `metrics`."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Learning rate of the last step."""
    staleness_max: int
    """Policy versions that the stalest trained token lagged behind."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over trained tokens: `policy_loss`, `entropy`, `clip_fraction`, `ratio`, `mismatch_mean` (|log-probability
    of the learner - of the engine|), `staleness_mean`, with a reference also `kl`. Maxima: `mismatch_max`, `ratio_max`.
    Counts: `completions_trained`, `tokens_trained` (the loss's denominator), `positions_computed` (prompts and padding
    included, one pass counted once), `micro_batches` (per rank). If something is cached of frozen towers, the items
    `features_computed` and `features_reused` (of those `features_from_store`) since the last update, and
    `feature_cache_gib`, the memory that all ranks use for it."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of the slowest rank by phase: `fetch` (object store), `encode`, `reference`, `before`, `train`,
    `total`."""
    refused: tuple[RefusedStep, ...] = ()
    """Steps that were not taken, with what this rank saw of them."""
    attempted: tuple[int, ...] = (0,)
    """Positions of the steps that had something to train, including those that were not taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats(RankStats):
    """An update as the driver sees it. `refused` has what all ranks saw of the steps that were not taken."""

    groups_dropped: int
    """Groups with fewer than two scored completions, which have no part in the loss."""
    groups_flat: int
    """Groups whose scored completions all have one reward. They have no policy gradient, but a part in KL and
    denominators."""

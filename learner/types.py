"""The inputs and outputs of the learner: options, results of updates, failures. Plain data, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from learner.config import DEFAULT_TOKENS, Aggregation, Offload
from rollout.types import PromptRef
from vlm.errors import UserError
from vlm.media.types import MediaKind
from vlm.parameter_names import DEFAULT_LORA_TARGETS, role_problems

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


class NothingToLearnError(UserError, ValueError):
    """No group of the batch has two scored completions, or none a token to train on. The weights are unchanged."""


class NotFiniteError(UserError, ValueError):
    """Numbers that are not finite, where the run cannot go on with them: one step after another that is not taken,
    rewards, or weights that would be written."""


class RewardError(UserError, ValueError):
    """Rewards from which no advantage can be computed; names the prompt and the reward. The weights are unchanged."""


class EncodingMismatchError(UserError, ValueError):
    """Learner and engine expand a prompt to different tokens; names the family and the first position that differs."""


def quantization_problems(quantize: str, zero_stage: int, offload: str) -> list[str]:
    """Combinations with quantized weights that do not work, or that nobody has seen work."""
    found = []
    if quantize != "none" and zero_stage == 3:
        found.append(
            f"quantize={quantize} with zero_stage=3 was never verified: ZeRO-3 partitions weights, and would have to "
            "do so with 4-bit blocks and their scales together; use zero_stage 0, 1 or 2"
        )
    if quantize != "none" and offload == "parameters":
        found.append(f"quantize={quantize} with offload=parameters was never verified: switch one of them off")
    return found


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """The options of a LearnerGroup. They are the same on every rank."""

    model: str
    """Directory in Hugging Face format or hub name: the initial policy, and the frozen reference."""
    total_steps: int
    """Optimizer steps of the whole run, over which the learning rate decays."""
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["float32", "float64", "bfloat16"] = "bfloat16"
    """bfloat16 keeps float32 master weights and optimizer moments; the loss is float32 in either. float64 is for
    `TorchEngine`, against which others are measured."""
    adapter: str | None = None
    """`package.module:Class` of a family of the user's own; by model_type otherwise."""
    trust_remote_code: bool = False
    max_image_tokens: int | None = None
    """Tokens that an image may take; None: as many as the model's processor makes."""
    lora_rank: int = 0
    """0 trains the full weights."""
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = DEFAULT_LORA_TARGETS
    """Whose linear layers get adapters: `vlm.parameter_names.LoraRole`."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the linear layers that LoRA can be put on hold their weights in 4 bits (QLoRA)."""
    freeze: tuple[str, ...] = ()
    """Parts of the model (`vlm.parameter_names.Part`) that stay as they are."""
    media_kinds: tuple[MediaKind, ...] = ("image",)
    """Kinds of media that the run's data may hold, if the model takes them: every rank runs their towers in every
    pass."""

    temperature: float = 1.0
    """The completions were sampled with it. Logits are divided by it, as in the engine."""
    advantage: str = "grpo"
    """A key of `learner.algorithm.advantages.ADVANTAGES`."""
    part_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the rewards by name, if each is to be normalised within its group before they are summed; or empty."""
    overlong_buffer: int = 0
    """Last tokens before the length limit in which the soft penalty grows to -1; 0: none."""
    mask_truncated: bool = False
    """Whether completions that were cut off at the limit are left out of the loss; baselines keep their scores."""
    max_completion_length: int = 1
    """The limit, in tokens."""
    loss: str = "ppo_clip"
    """A key of `learner.algorithm.losses.LOSSES`."""
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    clip_dual: float | None = None
    aggregation: Aggregation = "token"
    """See `learner.algorithm.losses.token_weights`."""
    beta: float = 0.0
    """Weight of the KL to the reference; 0 loads no reference."""
    kl_estimator: str = "k3"
    """A key of `learner.algorithm.divergence.KL_ESTIMATORS`."""
    kl_in: Literal["loss", "reward"] = "loss"
    reference_every: int = 0
    """Updates after which the reference becomes the current policy; 0: it stays the initial one."""
    old_policy: Literal["behavior", "current"] = "current"
    """Denominator of the ratio: what the engine sampled with, or these weights before the update."""
    correction: str = "none"
    """A key of `learner.algorithm.divergence.CORRECTIONS`."""
    correction_range: tuple[float, float] = (0.0, float("inf"))
    entropy_bonus: float = 0.0
    optimizer_steps: int = 1
    """Steps of one update, each on its part of the groups."""
    max_staleness: int = 0
    """Policy versions that a token may lag behind; older ones are refused."""

    learning_rate: float = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    micro_batch_tokens: int | None = None
    """Language positions of one micro-batch, padding included. No prompt with one completion may have more. None: 8192,
    or as many as fit `micro_batch_bytes`."""
    micro_batch_patches: int | None = None
    """Its vision patches (and frames of sound); None: as many as come with the tokens."""
    micro_batch_logits: int | None = None
    """Its positions with a loss; None: as many as come with the tokens."""
    micro_batch_bytes: int | None = None
    """Memory that it may take beside the states of the model, as learner/plan predicts; None: no limit."""
    unit_bytes: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Bytes of a language position, of a vision patch, of a position with a loss, and of any micro-batch.
    `learner.plan.predict` fills them in where there is a limit in bytes."""
    attention: Literal["auto", "blocks", "flex", "mask"] = "auto"
    """How packed rows attend (learner/model/attention.py)."""
    feature_cache_gib: float = 1.0
    """Memory of a rank in which features (or tower outputs) of frozen towers are cached; each rank may use four times
    as much in the object store, where all find it. 0: the towers run in every pass."""
    logprob_chunk_rows: int | None = None
    """Rows of the vocabulary projection computed at once; None: see `learner.model.logprobs.rows_per_chunk`."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Offload = "none"
    """Keep in CPU memory the optimizer's state, or that and the parameters."""
    gradient_checkpointing: tuple[str, ...] = ("language", "vision", "audio")
    """Parts of the model whose layers are recomputed in the backward pass instead of kept."""

    ranks: int = 1
    threads: int = 1
    """Compute threads of one rank on CPU."""
    timeout: float = 1800.0
    """Seconds that any one call, and any one collective inside it, may take."""
    seed: int = 0
    """Initialises LoRA adapters and each rank's generator."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("zero_stage=0 keeps no float32 master weights: with bfloat16 use zero_stage 1, 2 or 3")
        problems = role_problems(self.freeze, self.lora_rank, self.lora_targets)
        problems += quantization_problems(self.quantize, self.zero_stage, self.offload)
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def micro_batch(self) -> Size:
        """Return the limit of one micro-batch."""
        limits = (self.tokens_limit, self.micro_batch_patches, self.micro_batch_logits, self.micro_batch_bytes)
        tokens, patches, logits, held = (UNLIMITED if limit is None else limit for limit in limits)
        return Size(tokens, patches, logits, held - math.ceil(self.unit_bytes[3]))

    @property
    def tokens_limit(self) -> int | None:
        default = DEFAULT_TOKENS if self.micro_batch_bytes is None else None
        return default if self.micro_batch_tokens is None else self.micro_batch_tokens

    def size(self, tokens: int, patches: int, logits: int) -> Size:
        """With the bytes that so much takes."""
        token, patch, row, _ = self.unit_bytes
        return Size(tokens, patches, logits, math.ceil(token * tokens + patch * patches + row * logits))

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def needs_policy_before(self) -> bool:
        """Whether steps behind the first are computed against the policy before it: by the ratio, or a correction."""
        return self.optimizer_steps > 1 and (self.old_policy == "current" or self.correction != "none")


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
        """Why its prompts were not trained, the same for all of a kind."""
        return f"its optimizer step was not taken: {', '.join(self.terms) or 'the gradient'} not finite"

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

"""The sections `algorithm` and `learner`: what is learned, and how it is computed.

A choice that decides which other knobs mean anything is a union of sections, so that what would do nothing cannot be
written: `loss: {name: ppo_clip, low: 0.2}`, `loss: reinforce`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from vlm.section import ByName, ListOfOne, Parsed, section, short

Preset = Literal["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"]
Aggregation = Literal["token", "sequence", "constant"]
Offload = Literal["none", "optimizer", "parameters"]
Recomputed = Literal["language", "vision", "audio"]
DEFAULT_TOKENS = 8192
"""Language positions of a micro-batch, if no limit is given."""

# --- algorithm: the policy loss ---------------------------------------------------------------------------------------


@section
class Clipped:
    name: str
    """Policy loss."""
    low: Annotated[float, Ge(0), Le(1)] = 0.2
    """Lower clip of the ratio: 1 - low."""
    high: Annotated[float, Ge(0)] = 0.2
    """Upper clip of the ratio: 1 + high."""


@section
class DualClipped(Clipped):
    dual: Annotated[float, Gt(1)] | None = None
    """Bound on the loss of tokens with a negative advantage, in units of it (dual clip)."""


@section
class PpoClip(DualClipped):
    name: Literal["ppo_clip"] = "ppo_clip"


@section
class Gspo(DualClipped):
    name: Literal["gspo"] = "gspo"


@section
class Cispo(Clipped):
    name: Literal["cispo"] = "cispo"


@section
class Sapo:
    name: Literal["sapo"] = "sapo"


@section
class Reinforce:
    name: Literal["reinforce"] = "reinforce"


Loss = PpoClip | Gspo | Cispo | Sapo | Reinforce

# --- algorithm: the KL to the reference, and tokens of another policy -------------------------------------------------


@section
class Kl:
    weight: Annotated[float, Gt(0)]
    """Weight of the KL to the reference policy."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """How the KL is estimated from sampled tokens."""
    where: Literal["loss", "reward"] = "loss"
    """Where the KL enters."""
    refresh: Annotated[int, Ge(0)] = 0
    """Steps after which the current policy becomes the reference; 0: the initial policy stays the reference."""


@section
class Uncorrected:
    name: str
    """How tokens sampled by another policy are treated. behavior: the ratio's denominator is what the engine sampled
    with. current: it is the learner's policy before the step, and nothing is corrected. auto: behavior when
    max_staleness > 0, else current. The others take the learner's policy too, and weight the loss: by truncated
    importance weights of tokens (tis) or completions (tis_sequence), masked (icepop), unbounded (decoupled), or with
    whole completions rejected (geometric)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The importance weights that pass."""
        return 0.0, float("inf")


@section
class Truncated(Uncorrected):
    max: Annotated[float, Gt(0)] = 2.0
    """Largest importance weight that passes; tis and tis_sequence cut at it."""

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, self.max


@section
class Masked(Truncated):
    min: Annotated[float, Ge(0)] = 0.5
    """Smallest importance weight that passes."""

    @property
    def bounds(self) -> tuple[float, float]:
        return self.min, self.max


@section
class Auto(Uncorrected):
    name: Literal["auto"] = "auto"


@section
class Behavior(Uncorrected):
    name: Literal["behavior"] = "behavior"


@section
class Current(Uncorrected):
    name: Literal["current"] = "current"


@section
class Tis(Truncated):
    name: Literal["tis"] = "tis"


@section
class TisSequence(Truncated):
    name: Literal["tis_sequence"] = "tis_sequence"


@section
class Icepop(Masked):
    name: Literal["icepop"] = "icepop"


@section
class Decoupled(Uncorrected):
    name: Literal["decoupled"] = "decoupled"


@section
class Geometric(Masked):
    name: Literal["geometric"] = "geometric"


OffPolicy = Auto | Behavior | Current | Tis | TisSequence | Icepop | Decoupled | Geometric


def _overlong(value: Any) -> float | str:
    if value in ("keep", "mask") and isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("should be keep, mask, or a share of the length limit: more than 0, and at most 1")
    return float(value)


@section
class AlgorithmConfig:
    name: Preset = "grpo"
    """Preset: sets all of the knobs below that are not given."""
    advantage: Literal["grpo", "gdpo", "dr_grpo", "rloo", "reinforce_pp", "gpg", "maxrl"] = "grpo"
    """How a completion compares with its siblings; docs/algorithms.md has the formulas."""
    loss: Annotated[Loss, ByName()] = PpoClip()
    """Policy loss."""
    aggregation: Aggregation = "token"
    """How token losses are averaged: over all tokens; within each completion, then over completions; or divided by
    completions x length limit."""
    kl: Annotated[Kl | None, short("weight")] = None
    """The KL to the reference policy; null: no reference model is loaded. A number is its weight."""
    off_policy: Annotated[OffPolicy, ByName()] = Auto()
    """How tokens sampled by another policy are treated."""
    entropy_bonus: Annotated[float, Ge(0)] = 0.0
    """Weight of the entropy that the loss rewards."""
    optimizer_steps: Annotated[int, Ge(1)] = 1
    """Optimizer steps on each batch of prompts, each on its part of the groups, all against the policy before the
    first."""
    refill: Annotated[float, Ge(0)] = 0.0
    """Dynamic sampling: groups whose scores are all equal are replaced by new prompts, at most this many times the
    batch; 0: they stay."""
    overlong: Annotated[float | str, Parsed(_overlong)] = "keep"
    """Treatment of completions near or beyond the length limit. keep: none. mask: those that were cut off are left out
    of the loss. A share such as 0.2: in that last part of the limit a penalty of the reward grows to 1."""
    reward_range: tuple[float, float] | None = None
    """Difficulty filter: prompts whose mean reward so far lies outside are passed over in later epochs."""

    @property
    def overlong_share(self) -> float:
        """The last part of the length limit in which the penalty grows; 0: there is none."""
        return 0.0 if isinstance(self.overlong, str) else self.overlong

    def kl_in(self, where: Literal["loss", "reward"]) -> Kl | None:
        """The KL to the reference, if that is where it enters."""
        return self.kl if self.kl is not None and self.kl.where == where else None

    @property
    def reference_every(self) -> int:
        """Updates after which the reference becomes the current policy; 0: never."""
        return 0 if self.kl is None else self.kl.refresh

    @property
    def needs_policy_before(self) -> bool:
        """Whether steps behind the first are computed against the policy before it: by the ratio, or a correction."""
        return self.optimizer_steps > 1 and not isinstance(self.off_policy, Behavior)


# --- learner ----------------------------------------------------------------------------------------------------------


@section
class Constant:
    name: Literal["constant"] = "constant"
    """Shape of the learning rate after the warm-up."""


@section
class Falling:
    name: str
    """Shape of the learning rate after the warm-up."""
    min_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Final learning rate as a share of the peak."""


@section
class LinearDecay(Falling):
    name: Literal["linear"] = "linear"


@section
class CosineDecay(Falling):
    name: Literal["cosine"] = "cosine"


def _micro_batch(value: Any) -> int | str:
    """Positions as a number; memory as `<number> GiB`."""
    text = str(value)
    memory = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*GiB\s*", text, re.IGNORECASE)
    try:
        size = float(memory[1]) if memory else float(int(text))
    except ValueError:
        size = 0.0
    if isinstance(value, bool) or size <= 0:
        raise ValueError("should be a number of language positions, such as 8192, or memory, such as 12 GiB")
    return f"{size:.12g} GiB" if memory else int(text)


@section
class LearnerConfig:
    ranks: Annotated[int, Ge(1)] = 1
    """Learner processes, one GPU each."""
    prompts_per_step: Annotated[int, Ge(1)] = 64
    """B, prompts (groups) of one optimizer step."""
    learning_rate: Annotated[float, Gt(0)] = 1e-6
    """Peak learning rate."""
    lr_schedule: Annotated[Constant | LinearDecay | CosineDecay, ByName()] = Constant()
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are clipped to this norm."""
    micro_batch: Annotated[int | str, Parsed(_micro_batch)] = DEFAULT_TOKENS
    """Limit of one micro-batch: language positions (8192), or memory beside the model's states, as `saccade plan`
    predicts it (12 GiB)."""
    feature_cache_gib: Annotated[float, Ge(0)] = 1.0
    """Memory of a rank in which features (or tower outputs) of frozen towers are cached, so that they run once for each
    item; 4 times that in the object store; 0: no cache, and they run in every pass."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    offload: Offload = "none"
    """A rank keeps this in CPU memory beside its GPU: the optimizer's state, or that and the parameters (ZeRO-3)."""
    gradient_checkpointing: Annotated[tuple[Recomputed, ...], ListOfOne] = ("language", "vision", "audio")
    """Parts of the model whose activations are recomputed in the backward pass; [] keeps all."""

    @property
    def micro_batch_tokens(self) -> int | None:
        """The limit in language positions; None where it is one of memory."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    @property
    def micro_batch_bytes(self) -> int | None:
        """The limit in bytes; None where it is one of positions."""
        return None if isinstance(self.micro_batch, int) else round(float(self.micro_batch.split()[0]) * 2**30)

"""The algorithm's knobs, and the presets that set them by name.

algorithm: dapo                      everything as in the paper
algorithm: {name: dapo, beta: 0.01}  the same but for what is given
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from saccade.config.section import Overlong, Section

if TYPE_CHECKING:
    from saccade.config.run_config import RunConfig

Preset = Literal["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "grpo": {"advantage": "grpo", "loss": "ppo_clip", "aggregation": "sequence"},
    "rloo": {
        "advantage": "rloo",
        "loss": "reinforce",
        "aggregation": "constant",
        "correction": "tis",
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "dr_grpo": {"advantage": "dr_grpo", "loss": "ppo_clip", "aggregation": "constant"},
    "dapo": {
        "advantage": "grpo",
        "loss": "ppo_clip",
        "aggregation": "token",
        "clip_eps_high": 0.28,
        "refill": 3.0,
        "overlong": 0.2,
    },
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "aggregation": "sequence",
        "clip_eps_low": 3e-4,
        "clip_eps_high": 4e-4,
    },
    "cispo": {"advantage": "grpo", "loss": "cispo", "aggregation": "token", "clip_eps_low": 1.0, "clip_eps_high": 4.0},
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "loss": "ppo_clip",
        "aggregation": "token",
        "kl_estimator": "k2",
    },
}
"""Name -> what differs from the defaults below, from the papers that docs/algorithms.md names."""


class AlgorithmConfig(Section):
    name: Preset = "grpo"
    """Preset: sets all of the knobs below that are not given."""
    advantage: Literal["grpo", "gdpo", "dr_grpo", "rloo", "reinforce_pp", "gpg", "maxrl"] = "grpo"
    """How a completion compares with its siblings; docs/algorithms.md has the formulas."""
    loss: Literal["ppo_clip", "gspo", "cispo", "sapo", "reinforce"] = "ppo_clip"
    """Policy loss."""
    clip_eps_low: float = Field(0.2, ge=0, le=1)
    """Lower clip of the ratio: 1 - clip_eps_low."""
    clip_eps_high: float = Field(0.2, ge=0)
    """Upper clip of the ratio: 1 + clip_eps_high."""
    clip_dual: float | None = Field(None, gt=1)
    """Bound on the loss of tokens with a negative advantage, in units of it (dual clip)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """What tokens count: all the same; by completion, whatever its length; over completions times the length limit."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the reference policy; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """How the KL is estimated from sampled tokens."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL enters."""
    reference_every: int = Field(0, ge=0)
    """Steps after which the current policy becomes the reference; 0: the initial policy stays it."""
    old_policy: Literal["auto", "behavior", "current"] = "auto"
    """Denominator of the ratio: what the engine sampled with, or the learner's own weights before the step. auto:
    behavior when max_staleness > 0 and nothing is corrected, current otherwise."""
    correction: Literal["none", "tis", "tis_sequence", "icepop", "decoupled", "geometric"] = "none"
    """Weights for tokens that the engine's policy sampled, and not the learner's: none, truncated importance sampling
    by token or completion, masked, unbounded, or rejection of whole completions."""
    correction_range: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest importance weight that the correction lets pass; tis and tis_sequence cut at the largest."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Weight of the entropy that the loss rewards."""
    optimizer_steps: int = Field(1, ge=1)
    """Optimizer steps on each batch of prompts, each on its part of the groups, all against the policy before the
    first."""
    refill: float = Field(0.0, ge=0)
    """Dynamic sampling: groups whose scores are all equal are replaced by new prompts, at most this many times the
    batch; 0: they stay."""
    overlong: Overlong = "keep"
    """What becomes of completions near or beyond the length limit. keep: nothing. mask: those that were cut off are
    left out of the loss. A share such as 0.2: in that last part of the limit a penalty of the reward grows to 1."""
    reward_range: tuple[float, float] | None = None
    """Difficulty filter: prompts whose mean reward so far lies outside are passed over in later epochs."""

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, given: Any, handler: ModelWrapValidatorHandler[AlgorithmConfig]) -> AlgorithmConfig:
        """What a preset sets does not count as given by the user."""
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            return handler(given)
        name = given.get("name", "grpo")
        preset = next((values for known, values in PRESETS.items() if known == name), {})
        made = handler({**preset, **given})
        made.model_fields_set.intersection_update(given)
        return made

    @property
    def overlong_share(self) -> float:
        """The last part of the length limit in which the penalty grows; 0: there is none."""
        return 0.0 if isinstance(self.overlong, str) else self.overlong


def algorithm_problems(config: RunConfig) -> list[str]:
    """What of the algorithm does not go together, or with the rest of the run."""
    algorithm, found = config.algorithm, []
    if config.rollout.num_generations < 2:
        found.append(
            f"rollout.num_generations={config.rollout.num_generations}: {algorithm.advantage} compares the completions "
            "of one prompt with each other; use at least 2"
        )
    if config.old_policy == "current" and algorithm.correction == "none" and config.rollout.max_staleness > 0:
        found.append(
            f"algorithm.old_policy=current with rollout.max_staleness={config.rollout.max_staleness}: the ratio would "
            "ignore that older weights sampled the tokens; use behavior (or auto), or an algorithm.correction"
        )
    found += _reinforce_problems(config) + _maxrl_problems(config)
    if config.old_policy == "behavior" and algorithm.correction != "none":
        found.append(
            f"algorithm.correction={algorithm.correction} with algorithm.old_policy=behavior: the ratio already "
            "compares with the engine's policy; use current (or auto)"
        )
    if algorithm.beta > 0 and algorithm.kl_estimator == "k1" and algorithm.kl_in == "loss":
        found.append(
            "algorithm.kl_estimator=k1 with kl_in=loss: the gradient of k1 is zero in expectation, so it holds nothing "
            "back; use k2 or k3, or kl_in=reward"
        )
    if algorithm.reference_every and config.model.lora_rank:
        found.append(
            "algorithm.reference_every with model.lora_rank: the reference is the base model, which never changes; "
            "set one of them to 0"
        )
    low, high = algorithm.correction_range
    if not 0 <= low < high:
        found.append(f"algorithm.correction_range={[low, high]}: must be two numbers, 0 <= low < high")
    if algorithm.reward_range is not None and not algorithm.reward_range[0] < algorithm.reward_range[1]:
        found.append(f"algorithm.reward_range={list(algorithm.reward_range)}: the first must be less than the second")
    if config.learner.prompts_per_step % algorithm.optimizer_steps:
        found.append(
            f"learner.prompts_per_step={config.learner.prompts_per_step} cannot be dealt out evenly to "
            f"algorithm.optimizer_steps={algorithm.optimizer_steps}"
        )
    names = [function.name for function in config.reward.functions]
    by_reward = algorithm.advantage == "gdpo"
    if by_reward and len(set(names)) < len(names):
        found.append(
            "algorithm.advantage=gdpo: two of reward.functions have one name, so their scores cannot be told apart"
        )
    gates = [f"{f.name} (combine: {f.combine})" for f in config.reward.functions if f.combine != "sum"]
    if by_reward and gates:
        found.append(f"algorithm.advantage=gdpo normalises the parts of a sum, and takes no {', '.join(gates)}")
    return found


def _reinforce_problems(config: RunConfig) -> list[str]:
    """The loss without a ratio, where tokens are of other weights than those that they train."""
    algorithm = config.algorithm
    found: list[str] = []
    if algorithm.loss != "reinforce":
        return found
    if algorithm.correction == "none" and config.rollout.max_staleness > 0:
        found.append(
            f"algorithm.loss=reinforce with rollout.max_staleness={config.rollout.max_staleness}: it has no ratio, and "
            "would take tokens of older weights for its own; use algorithm.correction=tis, a loss with a ratio "
            "(ppo_clip, cispo), or max_staleness=0"
        )
    if algorithm.optimizer_steps > 1:
        found.append(
            f"algorithm.loss=reinforce with algorithm.optimizer_steps={algorithm.optimizer_steps}: it has no ratio, "
            "and would take tokens from before the first step for its own in the later ones; use a loss with a ratio "
            "(ppo_clip, cispo), or optimizer_steps=1"
        )
    return found


def _maxrl_problems(config: RunConfig) -> list[str]:
    """maxrl divides by the mean reward: nothing may make one negative."""
    algorithm = config.algorithm
    if algorithm.advantage != "maxrl":
        return []
    functions = config.reward.functions
    makers = {
        f"algorithm.overlong={algorithm.overlong} takes up to 1 off them": algorithm.overlong_share > 0,
        f"algorithm.kl_in=reward with algorithm.beta={algorithm.beta:g} takes the KL off them": (
            algorithm.kl_in == "reward" and algorithm.beta > 0
        ),
        **{f"the weight of reward {f.name} is {f.weight:g}": f.combine == "sum" and f.weight < 0 for f in functions},
        "reward_model gives scores of either sign": any(f.name == "reward_model" and f.weight for f in functions),
    }
    return [
        f"algorithm.advantage=maxrl takes rewards of 0 and more, but {why}; leave that out, or use another advantage"
        for why, makes in makers.items()
        if makes
    ]

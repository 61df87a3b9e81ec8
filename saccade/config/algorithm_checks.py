"""Find settings of the algorithm that contradict each other, or the rest of the run."""

from __future__ import annotations

from learner.config import AlgorithmConfig, Masked, Reinforce
from saccade.config.run_fields import RunFields


def algorithm_problems(config: RunFields) -> list[str]:
    algorithm, found = config.algorithm, []
    staleness = config.rollout.max_staleness
    if config.rollout.num_generations < 2:
        found.append(
            f"rollout.num_generations={config.rollout.num_generations}: {algorithm.advantage} compares the completions "
            "of one prompt with each other; use at least 2"
        )
    if algorithm.off_policy.name == "current" and staleness > 0:
        found.append(
            f"algorithm.off_policy=current with rollout.max_staleness={staleness}: the ratio would ignore that older "
            "weights sampled the tokens; use behavior (or auto), or a correction such as tis"
        )
    found += _reinforce_problems(config) + _maxrl_problems(config)
    kl = algorithm.kl
    if kl is not None and kl.estimator == "k1" and kl.where == "loss":
        found.append(
            "algorithm.kl.estimator=k1 with where=loss: the gradient of k1 is zero in expectation, so it has no "
            "effect; use k2 or k3, or where=reward"
        )
    if kl is not None and kl.refresh and config.model.lora:
        found.append(
            "algorithm.kl.refresh with model.lora: the reference is the base model, which never changes; leave one of "
            "them out"
        )
    off_policy = algorithm.off_policy
    if isinstance(off_policy, Masked) and not off_policy.min < off_policy.max:
        found.append(
            f"algorithm.off_policy.min={off_policy.min:g} must be less than algorithm.off_policy.max={off_policy.max:g}"
        )
    if algorithm.reward_range is not None and not algorithm.reward_range[0] < algorithm.reward_range[1]:
        found.append(f"algorithm.reward_range={list(algorithm.reward_range)}: the first must be less than the second")
    if config.learner.prompts_per_step % algorithm.optimizer_steps:
        found.append(
            f"learner.prompts_per_step={config.learner.prompts_per_step} cannot be divided evenly among "
            f"algorithm.optimizer_steps={algorithm.optimizer_steps}"
        )
    return found + _by_reward_problems(config)


def _by_reward_problems(config: RunFields) -> list[str]:
    """gdpo normalises the scores of each reward separately."""
    found: list[str] = []
    if config.algorithm.advantage != "gdpo":
        return found
    functions = config.reward.functions
    if len({function.name for function in functions}) < len(functions):
        found.append(
            "algorithm.advantage=gdpo: two of reward.functions have one name, so their scores cannot be told apart"
        )
    if gates := [f"{f.name} (combine: {f.combine})" for f in functions if f.combine != "sum"]:
        found.append(
            f"algorithm.advantage=gdpo normalises the parts of a sum, and cannot be combined with {', '.join(gates)}"
        )
    return found


def _reinforce_problems(config: RunFields) -> list[str]:
    """The loss without a ratio, where tokens are of other weights than those that they train."""
    algorithm, staleness = config.algorithm, config.rollout.max_staleness
    found: list[str] = []
    if not isinstance(algorithm.loss, Reinforce):
        return found
    if algorithm.off_policy.name == "behavior":
        found.append(
            "algorithm.off_policy=behavior is about the ratio, but algorithm.loss=reinforce has no ratio; use auto"
        )
    elif algorithm.off_policy.name in ("auto", "current") and staleness > 0:
        found.append(
            f"algorithm.loss=reinforce with rollout.max_staleness={staleness}: it has no ratio, and would treat "
            "tokens from older weights as its own; use algorithm.off_policy=tis, a loss with a ratio (ppo_clip, "
            "cispo), or max_staleness=0"
        )
    if algorithm.optimizer_steps > 1:
        found.append(
            f"algorithm.loss=reinforce with algorithm.optimizer_steps={algorithm.optimizer_steps}: it has no ratio, "
            "and in later steps would treat tokens from before the first step as its own; use a loss with a ratio "
            "(ppo_clip, cispo), or optimizer_steps=1"
        )
    return found


def _maxrl_problems(config: RunFields) -> list[str]:
    """maxrl divides by the mean reward: nothing may make one negative."""
    algorithm: AlgorithmConfig = config.algorithm
    if algorithm.advantage != "maxrl":
        return []
    functions = config.reward.functions
    kl = algorithm.kl
    makers = {
        f"algorithm.overlong={algorithm.overlong} lowers them by up to 1": algorithm.overlong_share > 0,
        "algorithm.kl.where=reward subtracts the KL from them": kl is not None and kl.where == "reward",
        **{f"the weight of reward {f.name} is {f.weight:g}": f.combine == "sum" and f.weight < 0 for f in functions},
        "reward_model can give negative scores": any(f.name == "reward_model" and f.weight for f in functions),
    }
    return [
        f"algorithm.advantage=maxrl needs rewards of at least 0, but {why}; leave that out, or use another advantage"
        for why, makes in makers.items()
        if makes
    ]

"""Translate the policy's loss, its KL and its correction in TRL's GRPOConfig into knobs."""

from __future__ import annotations

from saccade.trainer.fields import Fields, Knobs, RefusedError
from saccade.trainer.tree import Tree

DEFAULT_MODE = "sequence_mask"
"""TRL's default of `vllm_importance_sampling_mode`."""

LOSSES = {
    ("grpo", "token"): ("ppo_clip", "sequence"),
    ("grpo", "sequence"): ("gspo", "sequence"),
    ("dapo", "token"): ("ppo_clip", "token"),
    ("dapo", "sequence"): ("gspo", "token"),
    ("dr_grpo", "token"): ("ppo_clip", "constant"),
    ("dr_grpo", "sequence"): ("gspo", "constant"),
    ("cispo", "token"): ("cispo", "token"),
    ("sapo", "token"): ("sapo", "sequence"),
}
"""(loss_type, importance_sampling_level) -> (loss, aggregation) here."""


def ratios_vary(settings: Tree) -> bool:
    """Whether tokens are trained at other weights than sampled them, so that clips and the KL's estimator matter."""
    sections = (settings.get("rollout"), settings.get("algorithm"))
    rollout, algorithm = (section if isinstance(section, dict) else {} for section in sections)
    once = rollout.get("max_staleness", 0) in (0, "0") and algorithm.get("optimizer_steps", 1) in (1, "1")
    return not once or "behavior" in str(algorithm.get("off_policy"))


def loss(fields: Fields, vary: bool) -> Knobs:
    """The clip is carried over where ratios vary. With the newest weights and one step they are 1, in TRL too."""
    asked = fields["loss_type"], fields["importance_sampling_level"]
    low, high, dual = fields["epsilon"], fields["epsilon_high"], fields["delta"]
    if asked not in LOSSES:
        known = ", ".join(sorted({name for name, _ in LOSSES}))
        raise RefusedError(
            f"loss_type={asked[0]!r} with importance_sampling_level={asked[1]!r}: here it can be {known}"
        )
    name, aggregation = LOSSES[asked]
    clip = {"low": low, "high": low if high is None else high, **({} if dual is None else {"dual": dual})}
    if name == "cispo":  # its bound is epsilon_high itself, and there is none below
        clip = {"low": 1.0, "high": clip["high"] - 1.0}
        if vary and clip["high"] < 0:
            raise RefusedError(f"epsilon_high={clip['high'] + 1.0:g}: with loss_type='cispo' it is the largest ratio")
    carried = {"name": name, **clip} if vary and name != "sapo" else name
    return {"algorithm.loss": carried, "algorithm.aggregation": aggregation}


def kl(fields: Fields, vary: bool) -> Knobs:
    """With ratios of 1, TRL's k3 times the ratio has the gradient of k2."""
    unbiased = fields["use_bias_correction_kl"]
    weight = fields["beta"]
    if weight and unbiased and vary:
        raise RefusedError(
            "use_bias_correction_kl=True: where completions are sampled by older weights (rollout.max_staleness, "
            "algorithm.optimizer_steps) it has no counterpart here; set it to False"
        )
    return {"algorithm.kl": {"weight": weight, "estimator": "k2" if unbiased else "k3"}} if weight else {}


CORRECTIONS = {"token_truncate": "tis", "token_mask": "icepop", "sequence_truncate": "tis_sequence"}


def correction(fields: Fields) -> Knobs:
    """The default mode asks for nothing here: engine and learner are compared in every step, and a run stops where they
    disagree."""
    wanted, mode = fields["vllm_importance_sampling_correction"], fields["vllm_importance_sampling_mode"]
    low, high = (fields[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
    if not wanted or mode == DEFAULT_MODE:
        return {}
    if mode not in CORRECTIONS or high is None or (low and mode != "token_mask"):
        raise RefusedError(
            f"vllm_importance_sampling_mode={mode!r} within {low} and {high}: here it can be {', '.join(CORRECTIONS)}, "
            "with an upper limit, and a lower one only for token_mask"
        )
    bounds = {"max": high, **({"min": low or 0.0} if mode == "token_mask" else {})}
    return {"algorithm.off_policy": {"name": CORRECTIONS[mode], **bounds}}

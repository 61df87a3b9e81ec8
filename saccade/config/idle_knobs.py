"""Knobs that would do nothing, by what they depend on. One that was given is an error; a default is none, so that
what a saved configuration holds can be set back where a change to another knob makes it idle.

Where `cluster.device` is auto, knobs of either device may be given: the same file then runs on both. What only the
model and the data can tell is in `IDLE_FOR_DATA` and is asked before anything starts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from saccade.config.algorithm import PRESETS

if TYPE_CHECKING:
    from saccade.config.run_config import RunConfig

NEUTRAL = (None, False, 0, (), "none", "auto")
"""Values that ask for nothing, and so may be given anywhere."""


@dataclass(frozen=True)
class Facts:
    """What the model and the data files say, as far as idle knobs depend on it."""

    rows: int
    """Of data.train."""
    kinds: tuple[str, ...]
    """Media that the prompts may hold."""
    cached: bool
    """Whether something is cached of frozen towers."""


@dataclass(frozen=True)
class Idle:
    """Some knobs, when they do nothing, and why that is, in words that may name values of the configuration."""

    knobs: tuple[str, ...]
    when: Callable[[RunConfig], bool]
    why: str


@dataclass(frozen=True)
class IdleForData:
    """The same, where the model and the data decide."""

    knob: str
    when: Callable[[RunConfig, Facts], bool]
    why: str


def _all_given_otherwise(config: RunConfig) -> bool:
    preset = PRESETS[config.algorithm.name]
    return all(getattr(config.algorithm, name) != value for name, value in preset.items())


def _no_frozen_tower(config: RunConfig) -> bool:
    model, towers = config.model, {"vision", "audio"}
    return towers <= {*model.lora_targets} if model.lora_rank else not towers & {*model.freeze}


IDLE = (
    Idle(
        ("model.lora_alpha", "model.lora_targets"),
        lambda c: not c.model.lora_rank,
        "model.lora_rank=0 trains no adapter",
    ),
    Idle(
        ("model.freeze",),
        lambda c: c.model.lora_rank > 0,
        "model.lora_rank={model.lora_rank} trains adapters alone, on model.lora_targets",
    ),
    Idle(
        ("algorithm.name",),
        _all_given_otherwise,
        "all that it sets is given otherwise",
    ),
    Idle(
        ("algorithm.clip_eps_low", "algorithm.clip_eps_high"),
        lambda c: c.algorithm.loss in ("sapo", "reinforce"),
        "algorithm.loss={algorithm.loss} clips nothing",
    ),
    Idle(
        ("algorithm.clip_eps_low", "algorithm.clip_eps_high", "algorithm.clip_dual"),
        lambda c: c.old_policy == "current" and c.algorithm.optimizer_steps == 1,
        "every ratio is 1, since old_policy is current and a batch is one step; rollout.max_staleness, "
        "algorithm.old_policy and algorithm.optimizer_steps make ratios",
    ),
    Idle(
        ("algorithm.clip_dual",),
        lambda c: c.algorithm.loss not in ("ppo_clip", "gspo"),
        "algorithm.loss={algorithm.loss} has no dual clip; ppo_clip and gspo do",
    ),
    Idle(
        ("algorithm.kl_estimator", "algorithm.kl_in", "algorithm.reference_every"),
        lambda c: c.algorithm.beta == 0,
        "there is no KL to a reference: it needs algorithm.beta > 0",
    ),
    Idle(
        ("algorithm.old_policy",),
        lambda c: c.algorithm.loss == "reinforce",
        "algorithm.loss=reinforce has no ratio",
    ),
    Idle(
        ("algorithm.correction_range",),
        lambda c: c.algorithm.correction in ("none", "decoupled"),
        "algorithm.correction={algorithm.correction} has no bounds",
    ),
    Idle(
        ("learner.min_lr_ratio",),
        lambda c: c.learner.lr_schedule == "constant",
        "learner.lr_schedule=constant never falls; use linear or cosine",
    ),
    Idle(
        ("learner.feature_cache_gib",),
        _no_frozen_tower,
        "every tower is trained, so nothing of it can be cached; model.freeze or model.lora_rank leave one as it is",
    ),
    Idle(
        ("learner.offload",),
        lambda c: c.cluster.device == "cpu",
        "cluster.device=cpu: everything is in CPU memory already",
    ),
    Idle(
        ("evaluation.every", "evaluation.temperature", "evaluation.max_prompts"),
        lambda c: not c.data.eval,
        "there is nothing to evaluate on: data.eval names no files",
    ),
)

IDLE_FOR_DATA = (
    IdleForData("model.max_image_tokens", lambda c, f: "image" not in f.kinds, "the data hold no images"),
    IdleForData("data.max_video_frames", lambda c, f: "video" not in f.kinds, "the data hold no videos"),
    IdleForData(
        "learner.feature_cache_gib",
        lambda c, f: not f.cached,
        "no frozen tower runs for the media of these data",
    ),
    IdleForData(
        "algorithm.reward_range",
        lambda c, f: c.steps * c.learner.prompts_per_step * (1 + c.algorithm.refill) <= f.rows,
        "it passes over prompts from their second epoch on, and the run ends within the first",
    ),
)

ALWAYS = frozenset(
    [
        "output_dir",
        "steps",
        "seed",
        "model.path",
        "model.dtype",
        "model.adapter",
        "model.trust_remote_code",
        "model.lora_rank",
        "model.quantize",
        "data.train",
        "data.eval",
        "data.columns",
        "data.system_prompt",
        "data.prompt_template",
        "data.shuffle",
        "data.max_prompt_length",
        "data.overlong_prompts",
        "data.max_media_bytes",
        "data.media_from",
        "data.max_refused_share",
        "rollout.engines",
        "rollout.tensor_parallel_size",
        "rollout.num_generations",
        "rollout.max_completion_length",
        "rollout.temperature",
        "rollout.max_staleness",
        "rollout.kv_cache_gib",
        "rollout.engine_options",
        "reward.functions",
        "reward.check_golds",
        "reward.max_failed_share",
        "reward.actors",
        "reward.timeout",
        "algorithm.advantage",
        "algorithm.loss",
        "algorithm.aggregation",
        "algorithm.beta",
        "algorithm.correction",
        "algorithm.entropy_bonus",
        "algorithm.optimizer_steps",
        "algorithm.refill",
        "algorithm.overlong",
        "learner.ranks",
        "learner.prompts_per_step",
        "learner.learning_rate",
        "learner.lr_schedule",
        "learner.warmup_steps",
        "learner.betas",
        "learner.weight_decay",
        "learner.max_grad_norm",
        "learner.micro_batch",
        "learner.zero_stage",
        "learner.gradient_checkpointing",
        "checkpoint.every",
        "checkpoint.keep",
        "cluster.device",
        "cluster.resources",
        "cluster.timeout",
        "cluster.metrics_port",
    ]
)
"""Knobs that count whatever the others say. Limits and policies for rows that may come are among them. A test holds
that each knob is here or in a rule."""


def given(config: RunConfig) -> Iterator[str]:
    """Dotted names of the knobs that the user gave; what a preset set is not among them."""
    for name in type(config).model_fields:
        section = getattr(config, name)
        if hasattr(section, "model_fields_set"):
            yield from (f"{name}.{knob}" for knob in section.model_fields_set)
        elif name in config.model_fields_set:
            yield name


def value_of(config: RunConfig, knob: str) -> Any:
    node: Any = config
    for part in knob.split("."):
        node = getattr(node, part)
    return node


def _usual(config: RunConfig, knob: str) -> tuple[Any, ...]:
    """What a knob is where nobody gives it: its default, and what the algorithm's preset sets."""
    section, _, name = knob.rpartition(".")
    node = getattr(config, section) if section else config
    default = type(node).model_fields[name].get_default(call_default_factory=True)
    preset = PRESETS[config.algorithm.name] if section == "algorithm" else {}
    return (default, preset.get(name, default))


def idle(config: RunConfig) -> dict[str, str]:
    """Every knob that does nothing in this configuration, given or not, and why."""
    found: dict[str, str] = {}
    values = {name: getattr(config, name) for name in type(config).model_fields}
    for rule in IDLE:
        if rule.when(config):
            for knob in rule.knobs:
                found.setdefault(knob, rule.why.format_map(values))
    return found


def idle_problems(config: RunConfig) -> list[str]:
    """One text for each knob that was given and does nothing."""
    return _complaints(config, idle(config))


def data_idle_problems(config: RunConfig, facts: Facts) -> list[str]:
    """The same for what the model and the data decide."""
    return _complaints(config, {rule.knob: rule.why for rule in IDLE_FOR_DATA if rule.when(config, facts)})


def _complaints(config: RunConfig, reasons: dict[str, str]) -> list[str]:
    """A saved configuration gives every knob: what it has by default or from its preset asks for nothing."""
    found = []
    for knob in sorted(set(given(config)) & set(reasons)):
        value = value_of(config, knob)
        if value not in (*NEUTRAL, *_usual(config, knob)):
            shown = list(value) if isinstance(value, tuple) else value
            back = override(knob, _usual(config, knob)[-1])
            found.append(f"{knob}={shown} would do nothing: {reasons[knob]}; leave it out, or set it back: {back}")
    return found


def override(knob: str, value: Any) -> str:
    """`knob=value` as an argument of a command in a shell."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return shlex.quote(f"{knob}={text}")

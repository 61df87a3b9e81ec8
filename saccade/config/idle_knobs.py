"""Knobs that would do nothing, by what they depend on. One that was given is an error; a default is none, so that
what a saved configuration holds can be set back where a change to another knob makes it idle.

What a choice makes meaningless cannot be written at all (the unions of learner/config.py); here is the rest. Where
`cluster.device` is auto, knobs of either device may be given: the same file then runs on both. What only the model and
the data can tell is in `IDLE_FOR_DATA` and is asked before anything starts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import yaml

from saccade.config.knobs import default_of, value_of
from saccade.config.presets import PRESETS
from saccade.config.run_fields import RunFields

NEUTRAL = (None, False, 0, (), "none", "auto")
"""Values that ask for nothing, and so may be given anywhere."""


@dataclass(frozen=True)
class Facts:
    """The facts about the model and the data files that decide which knobs are idle."""

    rows: int
    """Number of rows in data.train."""
    kinds: tuple[str, ...]
    """Media that the prompts may hold."""
    cached: bool
    """Whether something is cached of frozen towers."""


@dataclass(frozen=True)
class Idle:
    """Some knobs, when they do nothing, and why that is, in words that may name values of the configuration."""

    knobs: tuple[str, ...]
    when: Callable[[RunFields], bool]
    why: str


@dataclass(frozen=True)
class IdleForData:
    """The same, where the model and the data decide."""

    knob: str
    when: Callable[[RunFields, Facts], bool]
    why: str


def _all_given_otherwise(config: RunFields) -> bool:
    """Whether nothing is as the preset has it."""
    preset = PRESETS[config.algorithm.name]
    return all(not _as_in(getattr(config.algorithm, name), value) for name, value in preset.items())


def _as_in(value: Any, usual: Any) -> bool:
    if isinstance(usual, dict):
        return all(getattr(value, name, None) == each for name, each in usual.items())
    return bool(value == usual)


def _frozen_towers(config: RunFields) -> set[str]:
    model, towers = config.model, {"vision", "audio"}
    return towers - {*model.lora.targets} if model.lora else towers & {*model.freeze}


IDLE = (
    Idle(
        ("model.freeze",),
        lambda c: c.model.lora is not None,
        "model.lora trains only adapters, on model.lora.targets",
    ),
    Idle(
        ("algorithm.name",),
        _all_given_otherwise,
        "every knob that this preset sets is overridden",
    ),
    Idle(
        ("algorithm.loss.low", "algorithm.loss.high", "algorithm.loss.dual"),
        lambda c: c.off_policy.name != "behavior" and c.algorithm.optimizer_steps == 1,
        "every ratio is 1; ratios differ from 1 only with algorithm.off_policy=behavior (which auto means where "
        "rollout.max_staleness > 0) or algorithm.optimizer_steps > 1",
    ),
    Idle(
        ("rollout.admission",),
        lambda c: c.rollout.max_staleness == 0 and c.rollout.windowed,
        "with rollout.max_staleness=0 nothing is generated beside the batch that is due",
    ),
    Idle(
        ("learner.feature_cache_gib",),
        lambda c: not _frozen_towers(c),
        "every tower is trained, so nothing of it can be cached; freeze a tower with model.freeze, or use model.lora",
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


def _usual(config: RunFields, knob: str) -> tuple[Any, ...]:
    """Return the values that a knob has if nobody sets it: its default, and the value in the algorithm's preset."""
    default = default_of(config, knob)
    node: Any = PRESETS[config.algorithm.name] if knob.startswith("algorithm.") else {}
    for part in knob.split(".")[1:]:
        node = node.get(part, default) if isinstance(node, dict) else default
    return (default, node if knob.startswith("algorithm.") else default)


def idle(config: RunFields) -> dict[str, str]:
    """Every knob that does nothing in this configuration, given or not, and why."""
    found: dict[str, str] = {}
    for rule in IDLE:
        if rule.when(config):
            for knob in rule.knobs:
                found.setdefault(knob, rule.why)
    return found


def idle_problems(config: RunFields) -> list[str]:
    """One text for each knob, or part of a knob, that was given and does nothing."""
    return [*_complaints(config, idle(config)), *_idle_parts(config)]


def _idle_parts(config: RunFields) -> list[str]:
    """One text for each entry of a knob that was given and does nothing."""
    found = []
    if (group := config.data.columns.get("group")) and not config.data.eval:
        found.append(
            f"data.columns.group={group} would do nothing: evaluation reports by it, and data.eval names no files"
        )
    recomputed = config.learner.gradient_checkpointing
    if recomputed != default_of(config, "learner.gradient_checkpointing"):
        found += [
            f"learner.gradient_checkpointing names {part}, which would do nothing: no gradient goes through the frozen "
            f"{part} tower; leave {part} out"
            for part in recomputed
            if part in _frozen_towers(config)
        ]
    share = config.rollout.engine_options.get("gpu_memory_utilization")
    if share is not None and config.cluster.device == "cpu":
        found.append(
            f"rollout.engine_options.gpu_memory_utilization={share} would do nothing: cluster.device=cpu; "
            "rollout.kv_cache_gib says there how much memory the engine's cache takes"
        )
    return found


def data_idle_problems(config: RunFields, facts: Facts) -> list[str]:
    """The same for what the model and the data decide."""
    return _complaints(config, {rule.knob: rule.why for rule in IDLE_FOR_DATA if rule.when(config, facts)})


def _complaints(config: RunFields, reasons: dict[str, str]) -> list[str]:
    """Return one text for each idle knob that was set. A value from the default or the preset does not count, because a
    saved configuration contains every knob."""
    found = []
    for knob in sorted(reasons):
        value = value_of(config, knob)
        if value not in (*NEUTRAL, *_usual(config, knob)):
            back = override(knob, _usual(config, knob)[-1])
            found.append(
                f"{knob}={plain(value)} would do nothing: {reasons[knob]}; leave it out, or set it back: {back}"
            )
    return found


def plain(value: Any) -> Any:
    """A value as YAML can write it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def override(knob: str, value: Any) -> str:
    """`knob=value` as an argument of a command in a shell."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return shlex.quote(f"{knob}={text}")

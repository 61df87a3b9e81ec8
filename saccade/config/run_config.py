"""RunConfig: every knob of a run, typed, documented, and checked before any process starts.

    config = load_config("run.yaml", ["learner.learning_rate=1e-6", "rollout.engines=4"])

Unknown keys are refused with the nearest known name; all violations are reported at once, as one ConfigError.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from learner.types import quantization_problems
from rollout.engines.protocol import DEFAULT_GPU_SHARE
from saccade.config.algorithm import AlgorithmConfig, algorithm_problems
from saccade.config.engine_fields import engine_option_problems
from saccade.config.idle_knobs import idle, idle_problems
from saccade.config.messages import ConfigError, location, problems_of
from saccade.config.section import Section
from saccade.config.sections import (
    URLS,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
)
from saccade.config.yaml_files import read_yaml
from vlm.parameter_names import role_problems

_KNOB = re.compile(r"(data|model)(\.\w+)+=")
"""How arguments begin that are knobs of data or model, among files."""


class RunConfig(Section):
    """One run. Build it with `load_config` (YAML and overrides) or `parse_config` (a dictionary)."""

    output_dir: str = Field(..., min_length=1)
    """Folder of checkpoints, logs and the final model."""
    steps: int = Field(..., ge=1)
    """Optimizer steps."""
    seed: int = 0
    """Seed of shuffling and sampling."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def old_policy(self) -> Literal["behavior", "current"]:
        """The ratio's denominator, `auto` resolved."""
        if self.algorithm.old_policy != "auto":
            return self.algorithm.old_policy
        corrected = self.algorithm.correction != "none"
        return "behavior" if self.rollout.max_staleness > 0 and not corrected else "current"

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, given: Any) -> Any:
        """A section that is left empty, or out, is one whose knobs are not given."""
        if not isinstance(given, Mapping):
            return given
        names = [name for name, info in cls.model_fields.items() if _section(info)]
        return {**given, **{name: {} for name in names if given.get(name) is None}}

    @model_validator(mode="after")
    def _goes_together(self) -> RunConfig:
        if found := self.problems():
            raise ConfigError(found)
        return self

    def problems(self) -> list[str]:
        """Violations that involve several fields; each names them and says what to do."""
        found = []
        model, rollout, learner = self.model, self.rollout, self.learner
        found += algorithm_problems(self)
        found += idle_problems(self)
        found += engine_option_problems(rollout.engine_options)
        found += [f"model.{text}" for text in role_problems(model.freeze, model.lora_rank, model.lora_targets)]
        found += [
            f"model.{text}"
            for text in quantization_problems(model.quantize, model.lora_rank, learner.zero_stage, learner.offload)
        ]
        if learner.offload == "parameters" and learner.zero_stage != 3:
            found.append(f"learner.offload=parameters needs learner.zero_stage=3, not {learner.zero_stage}")
        if learner.offload == "optimizer" and learner.zero_stage == 0:
            found.append("learner.offload=optimizer needs learner.zero_stage of at least 1")
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            found.append("learner.zero_stage=0 keeps no float32 master weights; use stage 1 or more with bfloat16")
        longest = self.data.max_prompt_length + rollout.max_completion_length
        tokens = learner.micro_batch_tokens
        if tokens is not None and longest > tokens:
            found.append(
                f"learner.micro_batch={tokens} cannot hold one sample of up to "
                f"data.max_prompt_length + rollout.max_completion_length = {longest} tokens"
            )
        if learner.lr_schedule != "constant" and learner.warmup_steps >= self.steps:
            found.append(
                f"learner.warmup_steps={learner.warmup_steps} leaves nothing of steps={self.steps} to decay over"
            )
        found += _shared_gpu_problems(self)
        if len(folders := [place for place in self.data.media_from if place != URLS]) > 1:
            found.append(f"data.media_from={folders}: media have one folder; name the one that all paths start in")
        if "prompt" in self.data.columns and self.data.columns["prompt"] is None:
            found.append("data.columns.prompt=null: without prompts there is nothing to do; name their column")
        template = self.data.prompt_template
        if template is not None and template.count("{prompt}") != 1:
            found.append(f"data.prompt_template={template!r}: {{prompt}} must stand in it once, for the row's text")
        if not self.data.train:
            found.append("data.train names no files: there is nothing to train on")
        if not self.reward.functions:
            found.append("reward.functions is empty: nothing would be learned")
        return found


def _shared_gpu_problems(config: RunConfig) -> list[str]:
    """An engine and a learner rank with `GPU: 0.5` each may share one: what cannot work on a share."""
    rollout, found = config.rollout, []
    shares = config.cluster.gpu_shares
    where = ", ".join(f"cluster.resources.{role}.GPU={share:g}" for role, share in shares.items())
    if "learner" in shares and config.learner.ranks > 1:
        found.append(f"{where}: learner ranks may share a GPU, and NCCL refuses that; use learner.ranks=1")
    if "rollout" in shares and rollout.tensor_parallel_size > 1:
        found.append(f"{where}: an engine on a share of a GPU needs rollout.tensor_parallel_size=1")
    taken = rollout.engine_options.get("gpu_memory_utilization", DEFAULT_GPU_SHARE)
    if taken > shares.get("rollout", 1.0):
        found.append(
            f"{where}: rollout.engine_options.gpu_memory_utilization={taken:g} is more than the engine's share; "
            "lower it to what the learner leaves free"
        )
    return found


def iter_knobs(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob with its dotted name and pydantic field, in order."""
    for name, info in section.model_fields.items():
        if (kind := _section(info)) is not None:
            yield from iter_knobs(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section of knobs."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.name=value` overrides (values are YAML), and validate. Raises ConfigError."""
    path = Path(path)
    try:
        tree, problems = read_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"no text in UTF-8: {error}"], str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    if not isinstance(tree, dict):
        found = "it is empty" if tree is None else f"found {tree!r:.60}"
        raise ConfigError(
            [f"{found}; a configuration gives at least output_dir, steps, model.path and data.train"], str(path)
        )
    problems += apply_overrides(tree, overrides)
    return parse_config(tree, str(path), problems)


def data_config(arguments: Sequence[str], model: str | None) -> RunConfig:
    """A configuration of which only `data` and `model` matter, from data files and `data.x=y` among them. Raises
    ConfigError."""
    knobs = [argument for argument in arguments if _KNOB.match(argument)]
    files = [argument for argument in arguments if argument not in knobs]
    tree: dict[str, Any] = {"output_dir": "none", "steps": 1, "model": {"path": model or "none"}}
    tree |= {"data": {"train": files}, "learner": {"micro_batch": sys.maxsize}}
    return parse_config(tree, "the command line", apply_overrides(tree, knobs))


def require_evaluation(config: RunConfig) -> None:
    """Raises ConfigError where there is nothing to evaluate on."""
    if not config.data.eval:
        raise ConfigError(["data.eval names no files: there is nothing to evaluate on"])


def parse_config(tree: Mapping[str, Any], source: str = "the configuration", found: Sequence[str] = ()) -> RunConfig:
    """Validate a nested dictionary; `found` are problems already known, reported with the rest. Raises ConfigError."""
    problems = list(found)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += problems_of(error, dict(iter_knobs()))
        problems += _hidden(tree, error)
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


def _hidden(tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What several fields violate together, which faults of single fields hide: looked for with faulty values at their
    defaults."""
    if not any(detail["loc"] for detail in error.errors()):
        return []  # they are what was found
    mended = copy.deepcopy(dict(tree))
    needed = {"output_dir": "unset", "steps": sys.maxsize, "model": {"path": "unset"}, "data": {"train": ["unset"]}}
    for detail in error.errors():
        node: Any = mended
        *parents, leaf = location(detail)
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(leaf, None)
    for key, value in needed.items():
        section = mended.setdefault(key, value)
        if isinstance(section, dict) and isinstance(value, dict):
            mended[key] = {**value, **section}
    try:
        RunConfig.model_validate(mended)
    except ValidationError as second:
        if not any(detail["loc"] for detail in second.errors()):
            return problems_of(second, dict(iter_knobs()))
    return []


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain data that `parse_config` reads back to an equal one: all knobs but those that
    do nothing in it."""
    tree = config.model_dump(mode="json")
    for knob in idle(config):
        section, _, name = knob.partition(".")
        tree[section].pop(name, None)
    return tree


def dump_config(config: RunConfig) -> str:
    """`config_tree` as YAML."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, width=110)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `a.b=value` into `tree`; returns what could not be applied."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            problems.append(f"override {override!r} is not of the form section.name=value")
            continue
        try:
            value = _parse_scalar(text)
        except yaml.YAMLError as error:
            problems.append(f"override {override!r}: the value is not valid YAML ({error})")
            continue
        *parents, leaf = dotted.split(".")
        if isinstance(tree.get("algorithm"), str):
            tree["algorithm"] = {"name": tree["algorithm"]}
        node: Any = tree
        for parent in parents:
            if isinstance(node, dict) and node.get(parent) is None:
                node[parent] = {}  # a section that is left empty
            node = node[parent] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            problems.append(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
            continue
        node[leaf] = value
    return problems


def _parse_scalar(text: str) -> Any:
    """A YAML value, with `1e-6` read as a number (YAML 1.1 wants `1.0e-6`)."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

"""RunConfig: every knob of a run, typed, documented, and checked before any process starts.

    config = load_config("run.yaml", ["learner.learning_rate=1e-6", "rollout.engines=4"])

Unknown keys are refused with the nearest known name; all violations are reported at once, as one ConfigError.
"""

from __future__ import annotations

import copy
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from driver.algorithm import AlgorithmConfig, algorithm_problems
from driver.knobs import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    WeightSyncConfig,
)
from learner.types import DEFAULT_TOKENS, quantization_problems
from vlm.roles import role_problems

REFUSED_KNOBS = {
    f"rollout.{name}": "the learner cannot reproduce a filtered distribution, so training samples with temperature only"
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
}


class ConfigError(ValueError):
    """All that is wrong with a configuration, one line each."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in {source}:\n" + "\n".join(f"  - {p}" for p in self.problems))


class RunConfig(Section):
    """One run. Build it with `load_config` (YAML and overrides) or `parse_config` (a dictionary)."""

    output_dir: str
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
    weight_sync: WeightSyncConfig = WeightSyncConfig()
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

    def problems(self) -> list[str]:
        """Violations that involve several fields; each names them and says what to do."""
        found = []
        model, rollout, learner = self.model, self.rollout, self.learner
        found += algorithm_problems(self)
        found += [f"model.{text}" for text in role_problems(model.freeze, model.lora_rank, model.lora_targets)]
        found += [
            f"model.{text}"
            for text in quantization_problems(
                model.quantize, model.lora_rank, learner.zero_stage, learner.offload_parameters
            )
        ]
        if learner.offload_parameters and learner.zero_stage != 3:
            found.append(f"learner.offload_parameters needs learner.zero_stage=3, not {learner.zero_stage}")
        if learner.offload_optimizer and learner.zero_stage == 0:
            found.append("learner.offload_optimizer needs learner.zero_stage of at least 1")
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            found.append("learner.zero_stage=0 keeps no float32 master weights; use stage 1 or more with bfloat16")
        longest = self.data.max_prompt_length + rollout.max_completion_length
        tokens = learner.micro_batch_tokens
        if tokens is None and learner.micro_batch_gib is None:
            tokens = DEFAULT_TOKENS
        if tokens is not None and longest > tokens:
            found.append(
                f"learner.micro_batch_tokens={tokens} cannot hold one sample of up to "
                f"data.max_prompt_length + rollout.max_completion_length = {longest} tokens"
            )
        if learner.micro_batch_logits is not None and learner.micro_batch_logits < rollout.max_completion_length:
            found.append(
                f"learner.micro_batch_logits={learner.micro_batch_logits} cannot hold one completion of up to "
                f"rollout.max_completion_length={rollout.max_completion_length} tokens"
            )
        if learner.attention == "flex" and self.cluster.device == "cpu":
            found.append("learner.attention=flex has no backward pass on CPUs, but cluster.device=cpu; use auto")
        if learner.attention == "blocks" and self.cluster.device == "cuda":
            found.append("learner.attention=blocks is a kernel of CPUs, but cluster.device=cuda; use auto")
        if learner.lr_schedule != "constant" and learner.warmup_steps >= self.steps:
            found.append(
                f"learner.warmup_steps={learner.warmup_steps} leaves nothing of steps={self.steps} to decay over"
            )
        if self.cluster.device == "cpu" and self.weight_sync.backend == "nccl":
            found.append("weight_sync.backend=nccl needs GPUs, but cluster.device=cpu; use gloo (or auto)")
        group_by = self.evaluation.group_by
        if group_by is not None and group_by not in self.data.extra_columns:
            found.append(f"evaluation.group_by={group_by!r} is not among data.extra_columns, so it is not read; add it")
        if "prompt" in self.data.columns and self.data.columns["prompt"] is None:
            found.append("data.columns.prompt=null: without prompts there is nothing to do; name their column")
        template = self.data.prompt_template
        if template is not None and template.count("{prompt}") != 1:
            found.append(f"data.prompt_template={template!r}: {{prompt}} must stand in it once, for the row's text")
        if not self.reward.functions:
            found.append("reward.functions is empty: nothing would be learned")
        return found


def iter_knobs(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob with its dotted name and pydantic field, in order."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from iter_knobs(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.name=value` overrides (values are YAML), and validate. Raises ConfigError."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"expected a mapping of sections, found {type(tree).__name__}"], str(path))
    problems = apply_overrides(tree, overrides)
    return parse_config(tree, str(path), problems)


def parse_config(tree: Mapping[str, Any], source: str = "the configuration", found: Sequence[str] = ()) -> RunConfig:
    """Validate a nested dictionary; `found` are problems already known, reported with the rest. Raises ConfigError."""
    problems = list(found)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
        config = _without_faults(tree, error)
    if config is not None:
        problems += config.problems()
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


def _without_faults(tree: Mapping[str, Any], error: ValidationError) -> RunConfig | None:
    """The configuration with faulty values at their defaults, so that what several fields violate together is reported
    in the same breath; None where that is not possible."""
    mended = copy.deepcopy(dict(tree))
    needed = {"output_dir": "unset", "steps": sys.maxsize, "model": {"path": "unset"}, "data": {"train": ["unset"]}}
    for detail in error.errors():
        node: Any = mended
        *parents, leaf = _location(detail)
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(leaf, None)
    for key, value in needed.items():
        section = mended.setdefault(key, value)
        if isinstance(section, dict) and isinstance(value, dict):
            mended[key] = {**value, **section}
    try:
        return RunConfig.model_validate(mended)
    except ValidationError:
        return None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


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
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            problems.append(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
            continue
        for twin in _spellings(dotted):
            node.pop(twin, None)
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


def _short_forms(name: str) -> tuple[str, ...]:
    """All spellings of the last part of knob `name`, if it has several."""
    alias = dict(iter_knobs())[name].validation_alias
    return tuple(str(choice) for choice in alias.choices) if isinstance(alias, AliasChoices) else ()


def _spellings(dotted: str) -> tuple[str, ...]:
    """All names under which a knob may stand in its section, so that an override replaces the file's spelling."""
    section, _, leaf = dotted.rpartition(".")
    for name, _ in iter_knobs():
        if name.rpartition(".")[0] == section and leaf in _short_forms(name):
            return _short_forms(name)
    return ()


def _location(detail: Any) -> tuple[Any, ...]:
    """Where a pydantic error is; a wrong key of a dictionary is where its value stands."""
    return tuple(part for part in detail["loc"] if part != "[key]")


def _explain(detail: Any) -> str:
    """One pydantic error in the words of the configuration: where, what, and what to do."""
    where = ".".join(str(part) for part in _location(detail))
    if detail["type"] == "extra_forbidden":
        if where in REFUSED_KNOBS:
            return f"{where}: {REFUSED_KNOBS[where]}"
        names = [name for name, _ in iter_knobs()]
        leaf_matches = [name for name in names if name.split(".")[-1] == where.split(".")[-1]]
        # A dotted name is compared with knobs and their short forms, another with the sections too.
        known = [f"{name.rpartition('.')[0]}.{short}" for name in names for short in _short_forms(name)] + names
        known += [] if "." in where else list(dict.fromkeys(name.split(".")[0] for name in names))
        nearest = leaf_matches or difflib.get_close_matches(where, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "`saccade config --knobs` lists all"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{where}: required, but not given"
    if "[key]" in detail["loc"]:
        return f"{where}: unknown role; there are {detail['ctx']['expected']}"
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        nearest = difflib.get_close_matches(str(detail["input"]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        return f"{where}={detail['input']!r}: {hint}input should be {detail['ctx']['expected']}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}={detail['input']!r}: {message[0].lower()}{message[1:]}"

"""Configurations from files, dictionaries and arguments, and back to YAML."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from saccade.config.idle_knobs import idle
from saccade.config.knobs import choices
from saccade.config.messages import ConfigError, location, problems_of
from saccade.config.run_config import RunConfig
from saccade.config.yaml_files import read_yaml

_KNOB = re.compile(r"(data|model)(\.\w+)+=")
"""How arguments begin that are knobs of data or model, among files."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.name=value` overrides (values are YAML), and validate. Raises ConfigError."""
    path = Path(path)
    try:
        tree, problems = read_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"the file is not UTF-8 text: {error}"], str(path)) from error
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
        problems += problems_of(error)
        problems += _hidden(tree, error)
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


def _hidden(tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Find the problems between several fields that faults of single fields hide. The check replaces faulty values by
    their defaults."""
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
            return problems_of(second)
    return []


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain data that `parse_config` reads back to an equal one: all knobs but those that
    do nothing in it."""
    tree = config.model_dump(mode="json")
    for knob in idle(config):
        *parents, name = knob.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(name, None)
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
        node: Any = tree
        for depth, parent in enumerate(parents, 1):
            if isinstance(node, dict):
                node[parent] = _as_section(".".join(parents[:depth]), node.get(parent))
            node = node[parent] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            problems.append(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
            continue
        node[leaf] = value
    return problems


def _as_section(name: str, value: Any) -> Any:
    """A section as a mapping: one that is left empty, and one that is given in its short form."""
    if value is None:
        return {}
    short = choices().get(name)
    return {short: value} if short is not None and isinstance(value, str | int | float) else value


def _parse_scalar(text: str) -> Any:
    """A YAML value, with `1e-6` read as a number (YAML 1.1 wants `1.0e-6`)."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

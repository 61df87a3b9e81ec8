"""Paths of a configuration as it is saved: a run continues from any folder.

Relative paths of a configuration count from the working directory at the start. What is saved has them absolute, but in
a submitted job that was shipped its working directory: the next job's copy of it stands elsewhere.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.config import RewardSpec
from rollout.data.config import URLS
from saccade.config.run_config import RunConfig
from vlm.user_code import located

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where `ray job submit` puts the job's runtime environment, as JSON."""


def job_environment() -> Mapping[str, Any]:
    """The runtime environment of the submitted job that this process is; empty for none."""
    found: Mapping[str, Any] = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {})
    return found


def absolute(config: RunConfig) -> RunConfig:
    """The same configuration with model, data and code of the user's by absolute paths."""
    if "working_dir" in job_environment():
        return config
    model, data = config.model, config.data
    adapter = None if model.adapter is None else located(model.adapter)
    model = replace(model, path=_folder(model.path), adapter=adapter)
    train, held_out = tuple(map(_pattern, data.train)), tuple(map(_pattern, data.eval))
    places = tuple(place if place == URLS else _path(place) for place in data.media_from)
    data = replace(data, train=train, eval=held_out, media_from=places)
    functions = tuple(map(_reward, config.reward.functions))
    reward = replace(config.reward, functions=functions)
    return config.model_copy(update={"model": model, "data": data, "reward": reward})


def _reward(spec: RewardSpec) -> RewardSpec:
    options = dict(spec.options)
    if spec.name == "reward_model" and isinstance(options.get("model"), str):
        options["model"] = _folder(options["model"])
    return replace(spec, name=located(spec.name), options=options)


def _path(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _pattern(path: str) -> str:
    """The same for what may name files by a pattern: brackets in the working directory's name are none."""
    if not glob.has_magic(path) or Path(path).exists():
        return _path(path)
    given = Path(path).expanduser()
    return path if given.is_absolute() else f"{glob.escape(str(Path.cwd()))}/{given}"


def _folder(path: str) -> str:
    """A folder that there is; anything else is the name of a model on a hub."""
    return _path(path) if Path(path).expanduser().is_dir() else path

"""The model and the data files that a configuration names: loaded and opened once, by a run and by every command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout.data.source import DataError, PromptSource, open_data
from saccade.config.options import config_adapter, data_options, model_problem
from saccade.config.run_config import ConfigError, RunConfig
from vlm.adapter import AdapterError, MultimodalAdapter
from vlm.media.types import MediaKind

WHERE = "what the configuration refers to"
"""How a ConfigError names the place of these problems."""
Key = Literal["data.train", "data.eval"]


@dataclass(frozen=True)
class DataSet:
    """One set of data files, opened. Its source counts the rows that it refuses."""

    key: Key
    source: PromptSource

    def media_kinds(self, adapter: MultimodalAdapter) -> tuple[MediaKind, ...]:
        """The kinds of media that its prompts may hold."""
        return tuple(kind for kind, _ in self.source.columns.media if kind in adapter.modalities)


def load_model(config: RunConfig) -> MultimodalAdapter:
    """The adapter of the configured model. Raises ConfigError."""
    try:
        return config_adapter(config)
    except AdapterError as error:
        raise ConfigError([model_problem(error)], WHERE) from error


def open_set(config: RunConfig, key: Key, adapter: MultimodalAdapter, *, shuffled: bool = False) -> DataSet:
    """Its rows come in the order of the run, or shuffled in any case. Raises DataError."""
    options = data_options(config, set_files(config)[key], train=key == "data.train" and not shuffled)
    return DataSet(key, PromptSource(options, adapter))


def set_files(config: RunConfig) -> dict[Key, tuple[str, ...]]:
    """The files of each set that is configured."""
    files: dict[Key, tuple[str, ...]] = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {key: names for key, names in files.items() if names}


def file_problems(config: RunConfig) -> list[str]:
    """What is wrong with the data files, whatever the model is."""
    problems = []
    for key, files in set_files(config).items():
        try:
            open_data(data_options(config, files))
        except DataError as error:
            problems.append(f"{key}: {error}")
    return problems

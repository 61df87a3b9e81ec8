"""A run and every command load the model and open the data files of a configuration here, each once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout.data.source import DataError, PromptSource, open_data
from saccade.config.messages import ConfigError
from saccade.config.options import config_adapter, data_options, model_problem
from saccade.config.run_config import RunConfig
from vlm.adapter import MultimodalAdapter
from vlm.errors import AdapterError
from vlm.media.types import MediaKind

WHERE = "what the configuration refers to"
"""A ConfigError calls the place of these problems so."""
Key = Literal["data.train", "data.eval"]


@dataclass(frozen=True)
class DataSet:
    """An opened set of data files. Its source counts the rows that it refuses."""

    key: Key
    source: PromptSource

    def media_kinds(self, adapter: MultimodalAdapter) -> tuple[MediaKind, ...]:
        """Return the kinds of media that its prompts may hold."""
        return tuple(kind for kind, _ in self.source.columns.media if kind in adapter.modalities)


def load_model(config: RunConfig) -> MultimodalAdapter:
    """Load the adapter of the configured model. Raises ConfigError."""
    try:
        return config_adapter(config)
    except AdapterError as error:
        raise ConfigError([model_problem(error)], WHERE) from error


def open_set(config: RunConfig, key: Key, adapter: MultimodalAdapter, *, shuffled: bool = False) -> DataSet:
    """Open one set. Its rows come in the order of the run, or always shuffled. Raises DataError."""
    options = data_options(config, set_files(config)[key], train=key == "data.train" and not shuffled)
    return DataSet(key, PromptSource(options, adapter))


def set_files(config: RunConfig) -> dict[Key, tuple[str, ...]]:
    """Return the files of each configured set."""
    files: dict[Key, tuple[str, ...]] = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {key: names for key, names in files.items() if names}


def file_problems(config: RunConfig) -> list[str]:
    """Find what is wrong with the data files without a model."""
    problems = []
    for key, files in set_files(config).items():
        try:
            open_data(data_options(config, files))
        except DataError as error:
            problems.append(f"{key}: {error}")
    return problems

"""What a user imports and starts: `from saccade import train, RunConfig`, or `python -m saccade train CONFIG`."""

from saccade.config.run_config import ConfigError, RunConfig, load_config, parse_config

__version__ = "0.1.0"
"""Here and nowhere else: a submitted job runs from a folder where nothing is installed that could be asked."""

__all__ = ["ConfigError", "RunConfig", "load_config", "parse_config", "train"]


def __getattr__(name: str) -> object:
    """`train` imports Ray; configurations do not, and validate in milliseconds."""
    if name == "train":
        from saccade.loop import train

        return train
    raise AttributeError(name)


def __dir__() -> list[str]:
    return sorted({*globals(), "train"})

"""Format `saccade --help`: docstrings fill the width of the terminal, and the usage line names what the user types.
Also define the arguments that several commands take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that silence libraries, which read them at import. Their output would break the progress
display."""

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; `saccade config` shows all its knobs.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Knobs to change, e.g. learner.ranks=4 rollout.engines=4", metavar="[section.name=value]..."),
]


def unwrapped(text: str) -> str:
    """Join each paragraph of a docstring into one line, which the terminal wraps. Lines of examples stay as they
    are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    joined = [p if p.startswith("Example") else " ".join(p.split()) for p in paragraphs]
    return "\n\n".join(joined)


def knob_text(name: str, info: FieldInfo) -> str:
    """Describe a knob: its default as YAML, its allowed values, and its meaning. Defaults of the algorithm are those of
    the default preset."""
    from saccade.config.algorithm import AlgorithmConfig

    if name.startswith("algorithm."):
        default = getattr(AlgorithmConfig(), name.removeprefix("algorithm."))
    else:
        default = None if info.is_required() else info.get_default(call_default_factory=True)
    written = (
        "(required)" if info.is_required() else yaml.safe_dump(_plain(default), default_flow_style=True, width=1e6)
    )
    choices = _choices(info.annotation)
    allowed = f"  # {', '.join(map(str, choices))}" if choices else ""
    meaning = " ".join((info.description or "").split())
    return f"{name}: {written.removesuffix(chr(10)).removesuffix(chr(10) + '...')}{allowed}\n    {meaning}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of all literals in a type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _choices(part))


class Command(TyperCommand):
    """A command whose usage line shows the metavars of its arguments, without brackets around them."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["help"] = unwrapped(settings.get("help") or "")
        super().__init__(*args, **settings)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        names = [getattr(argument, "metavar", None) or str(argument.name).upper() for argument in arguments]
        return ["[OPTIONS]", *names]


class App(typer.Typer):
    """A group of commands with the help above; `-h` works too."""

    def __init__(self, **settings: Any) -> None:
        names = {"help_option_names": ["-h", "--help"]}
        super().__init__(no_args_is_help=True, add_completion=False, context_settings=names, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **settings)

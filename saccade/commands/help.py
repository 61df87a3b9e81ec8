"""Format `saccade --help`: docstrings fill the width of the terminal, and the usage line names what the user types.
Also define the arguments that several commands take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperCommand

from saccade.config.idle_knobs import plain
from saccade.config.knobs import Knob
from saccade.config.presets import PRESETS

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


def knob_text(knob: Knob) -> str:
    """A knob with its default as YAML (of the algorithm: with the default preset), what it may be, and its meaning."""
    node: Any = PRESETS["grpo"] if knob.name.startswith("algorithm.") else {}
    for part in knob.name.split(".")[1:]:
        node = node.get(part, knob.default) if isinstance(node, Mapping) else knob.default
    default = node if knob.name.startswith("algorithm.") else knob.default
    written = "(required)"
    if default is not MISSING:
        written = yaml.safe_dump(_brief(default), default_flow_style=True, width=1e6).strip().removesuffix("\n...")
    allowed = f"  # {', '.join(map(str, knob.choices))}" if knob.choices else ""
    return f"{knob.name}: {written}{allowed}\n    {knob.text}"


def _brief(value: Any) -> Any:
    """A default as YAML can write it; of sections, what differs from their own defaults."""
    if is_dataclass(value):
        given = {each.name: getattr(value, each.name) for each in fields(value)}
        usual = {each.name: each.default for each in fields(value) if each.default is not MISSING}
        return {name: plain(own) for name, own in given.items() if own != usual.get(name, {})}
    return [_brief(each) for each in value] if isinstance(value, list | tuple) else plain(value)


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

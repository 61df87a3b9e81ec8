"""Knobs by dotted name and sections, put together in one tree, as a configuration file has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.config.knobs import choices, knobs

Tree = dict[str, Any]
SECTIONS = frozenset(name.partition(".")[0] for name in knobs() if "." in name)


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set a knob. A value where a section should be stays, for the configuration to refuse."""
    *parents, leaf = dotted.split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        short = choices().get(".".join(parents[:depth]))
        if short is not None and isinstance(node.get(parent), str | int | float):
            node[parent] = {short: node[parent]}
        inner = node.setdefault(parent, {})
        if not isinstance(inner, dict):
            return
        node = inner
    node[leaf] = value


def put_all(tree: Tree, settings: Mapping[str, Any]) -> None:
    """Set the knobs of `settings`: dotted names and sections, side by side."""
    for name, value in settings.items():
        if name in SECTIONS and isinstance(value, Mapping):
            for knob, inner in value.items():
                put(tree, f"{name}.{knob}", inner)
        else:
            put(tree, str(name), value)


def columns(tree: Tree) -> Mapping[str, Any]:
    """Return the settings of data.columns so far."""
    section = tree.get("data")
    named = section.get("columns") if isinstance(section, dict) else None
    return named if isinstance(named, Mapping) else {}

"""What is wrong with a configuration, in its own words: where, what, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, ValidationError
from pydantic.fields import FieldInfo

from driver.synonyms import REFUSED, synonym_of

IN_WORDS = {
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping of names to values",
    "model_type": "should be a mapping of names to values",
    "model_attributes_type": "should be a mapping of names to values",
    "string_type": "should be a text",
    "int_from_float": "should be a whole number",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}
"""pydantic's type of an error -> our words; they replace those that speak of Python."""


class ConfigError(ValueError):
    """All that is wrong with a configuration, one line each."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in {source}:\n" + "\n".join(f"  - {p}" for p in self.problems))


def problems_of(error: ValidationError, knobs: Mapping[str, FieldInfo]) -> list[str]:
    """One text for each violation that pydantic found. `knobs`: all, by dotted name."""
    found: list[str] = []
    for detail in error.errors():
        inner = detail.get("ctx", {}).get("error")
        found += inner.problems if isinstance(inner, ConfigError) else [_explain(detail, knobs)]
    return found


def location(detail: Any) -> tuple[Any, ...]:
    """Where a pydantic error is; a wrong key of a dictionary is where its value stands."""
    return tuple(part for part in detail["loc"] if part != "[key]")


def short_forms(info: FieldInfo) -> tuple[str, ...]:
    """All spellings of a knob's last part, if it has several."""
    alias = info.validation_alias
    return tuple(str(choice) for choice in alias.choices) if isinstance(alias, AliasChoices) else ()


def _explain(detail: Any, knobs: Mapping[str, FieldInfo]) -> str:
    where = ".".join(str(part) for part in location(detail))
    if detail["type"] == "extra_forbidden":
        return _unknown(where, knobs)
    if detail["type"] == "missing":
        return f"{where}: required, but not given"
    if "[key]" in detail["loc"]:
        return f"{where}: unknown role; there are {detail['ctx']['expected']}"
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        nearest = difflib.get_close_matches(str(detail["input"]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        return f"{where}={detail['input']!r}: {hint}input should be {detail['ctx']['expected']}"
    message = IN_WORDS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    return f"{where}={detail['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(where: str, knobs: Mapping[str, FieldInfo]) -> str:
    """A key that there is not: refused on purpose, known elsewhere, another program's name, or mistyped."""
    if where in REFUSED:
        return f"{where}: {REFUSED[where]}"
    leaf = where.split(".")[-1]
    if matches := [n for n, info in knobs.items() if leaf in (n.split(".")[-1], *short_forms(info))]:
        return f"{where}: unknown key; did you mean {matches[0]}?"
    if known := synonym_of(leaf):
        return f"{where}: unknown key; here it is called {known}"
    # A dotted name is compared with knobs and their short forms, another with the sections too.
    names = [f"{name.rpartition('.')[0]}.{short}" for name, info in knobs.items() for short in short_forms(info)]
    names += [*knobs] if "." in where else [*knobs, *dict.fromkeys(name.split(".")[0] for name in knobs)]
    nearest = difflib.get_close_matches(where, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "`saccade config --knobs` lists all"
    return f"{where}: unknown key; {hint}"

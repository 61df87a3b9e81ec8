"""What is wrong with a configuration, in its own words: where, what, and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from saccade.config.renamed import renamed
from saccade.config.sections import RewardSpec
from saccade.config.synonyms import REFUSED, VALUES, synonym_of
from vlm.errors import UserError

SHOWN = 120
"""Characters of a wrong value that are shown."""
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
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "greater_than": "should be more than {gt:g}",
    "greater_than_equal": "should be at least {ge:g}",
    "less_than": "should be less than {lt:g}",
    "less_than_equal": "should be at most {le:g}",
    "too_long": "should have {max_length} values, not {actual_length}",
    "string_too_short": "should not be empty",
}
"""pydantic's type of an error -> our words for it, which may name the limit."""


class ConfigError(UserError, ValueError):
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


def _explain(detail: Any, knobs: Mapping[str, FieldInfo]) -> str:
    where = ".".join(str(part) for part in location(detail))
    if detail["type"] == "extra_forbidden":
        return renamed(where, detail["input"]) or _unknown(where, knobs)
    if detail["type"] == "missing":
        is_item = isinstance(detail["loc"][-1], int)
        return f"{where}: a value is missing there" if is_item else f"{where}: required, but not given"
    if "[key]" in detail["loc"]:
        return f"{where}: unknown role; there are {detail['ctx']['expected']}"
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        meant = _meant(str(detail["input"]), allowed)
        hint = f"did you mean {meant}? " if meant else ""
        return f"{where}={_shown(detail['input'])}: {hint}should be {detail['ctx']['expected']}"
    message = IN_WORDS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    message = message.format_map(detail.get("ctx", {})) if detail["type"] in IN_WORDS else message
    return f"{where}={_shown(detail['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value as YAML writes it, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _meant(given: str, allowed: Sequence[str]) -> str | None:
    """The allowed value that was meant: another program's name of it, its letters in another order, its beginning, or
    what is written most like it."""
    if (known := VALUES.get(given.lower())) in allowed:
        return known
    rules: tuple[Callable[[str], bool], ...] = (
        lambda each: sorted(each) == sorted(given.lower()),
        lambda each: each.startswith(given.lower()),
    )
    for rule in rules:
        if found := [each for each in allowed if rule(each)]:
            return found[0]
    return next(iter(difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)), None)


def _unknown(where: str, knobs: Mapping[str, FieldInfo]) -> str:
    """A key that there is not: refused on purpose, known elsewhere, another program's name, or mistyped."""
    if where in REFUSED:
        return f"{where}: {REFUSED[where]}"
    parent, _, leaf = where.rpartition(".")
    if re.fullmatch(r"reward\.functions\.\d+", parent):
        names = list(RewardSpec.model_fields)
        meant = _meant(leaf, names)
        return f"{where}: unknown key; " + (f"did you mean {meant}?" if meant else f"there are {', '.join(names)}")
    if matches := [name for name in knobs if leaf == name.split(".")[-1]]:
        return f"{where}: unknown key; did you mean {matches[0]}?"
    if known := synonym_of(leaf):
        return f"{where}: unknown key; here it is called {known}"
    # A dotted name is compared with knobs, another with the sections too.
    names = [*knobs] if "." in where else [*knobs, *dict.fromkeys(name.split(".")[0] for name in knobs)]
    nearest = difflib.get_close_matches(where, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "`saccade config --knobs` lists all"
    return f"{where}: unknown key; {hint}"

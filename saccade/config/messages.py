"""Say what is wrong with a configuration, where, and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from rewards.config import RewardSpec
from saccade.config.knobs import knobs, unions
from saccade.config.renamed import renamed
from saccade.config.synonyms import REFUSED, VALUES, synonym_of
from vlm.errors import UserError

SHOWN = 120
"""Characters of a wrong value that are shown."""
IN_WORDS = {
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping of names to values",
    "dataclass_type": "should be a mapping of names to values",
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


def problems_of(error: ValidationError) -> list[str]:
    """One text for each violation that pydantic found."""
    found: list[str] = []
    for detail in error.errors():
        inner = detail.get("ctx", {}).get("error")
        found += inner.problems if isinstance(inner, ConfigError) else [_explain(detail)]
    return found


def location(detail: Any) -> tuple[Any, ...]:
    """Where a pydantic error is; a wrong key of a dictionary is where its value stands, and the name by which a union
    was chosen is not part of it."""
    found: list[Any] = []
    for part in detail["loc"]:
        if part != "[key]" and not (found and part in unions().get(".".join(map(str, found)), ())):
            found.append(part)
    return tuple(found)


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in location(detail))
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return renamed(where, detail["input"]) or _misplaced(where, detail) or _unknown(where)
    if detail["type"] == "missing":
        is_item = isinstance(detail["loc"][-1], int)
        return f"{where}: the value is missing" if is_item else f"{where}: required, but not given"
    if "[key]" in detail["loc"]:
        return f"{where}: unknown role; choose one of {detail['ctx']['expected']}"
    if detail["type"] == "literal_error":
        return _not_among(where, detail["input"], detail["ctx"]["expected"])
    if detail["type"] == "union_tag_invalid":
        *first, last = detail["ctx"]["expected_tags"].split(", ")
        return _not_among(where, detail["ctx"]["tag"], f"{', '.join(first)} or {last}")
    message = IN_WORDS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    message = message.format_map(detail.get("ctx", {})) if detail["type"] in IN_WORDS else message
    return f"{where}={_shown(detail['input'])}: {message[0].lower()}{message[1:]}"


def _not_among(where: str, value: Any, expected: str) -> str:
    """A value that is none of those that there are."""
    meant = _meant(str(value), re.findall(r"'([^']*)'", expected))
    hint = f"did you mean {meant}? " if meant else ""
    return f"{where}={_shown(value)}: {hint}should be {expected}"


def _misplaced(where: str, detail: Any) -> str | None:
    """A knob of another member of the union."""
    union = where.rpartition(".")[0]
    if where not in knobs() or union not in unions():
        return None
    chosen = detail["loc"][-2]
    return f"{where}: {union}={chosen} has no such knob; leave it out, or choose another {union.rpartition('.')[2]}"


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


def _unknown(where: str) -> str:
    """A key that there is not: refused on purpose, known elsewhere, another program's name, or mistyped."""
    if where in REFUSED:
        return f"{where}: {REFUSED[where]}"
    parent, _, leaf = where.rpartition(".")
    if re.fullmatch(r"reward\.functions\.\d+", parent):
        names = [field.name for field in fields(RewardSpec)]
        meant = _meant(leaf, names)
        return f"{where}: unknown key; " + (f"did you mean {meant}?" if meant else f"choose one of {', '.join(names)}")
    if matches := [name for name in knobs() if leaf == name.split(".")[-1]]:
        return f"{where}: unknown key; did you mean {matches[0]}?"
    if known := synonym_of(leaf):
        return f"{where}: unknown key; here it is called {known}"
    # A dotted name is compared with knobs, another with the sections too.
    names = [*knobs()] if "." in where else [*knobs(), *dict.fromkeys(name.split(".")[0] for name in knobs())]
    nearest = difflib.get_close_matches(where, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "`saccade config --knobs` lists all"
    return f"{where}: unknown key; {hint}"

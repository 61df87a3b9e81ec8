"""Choose which column of the data files plays which role: the one that `data.columns` names, or one with a known name.
Dots name a field of a struct: `reward_model.ground_truth`.

data.columns + names of the files' columns ──choose_columns──▶ Columns, the same for every file
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlm.media.types import MediaKind

Role = Literal["prompt", "image", "video", "audio", "answer", "group"]
MEDIA_ROLES: tuple[MediaKind, ...] = get_args(MediaKind)

KNOWN_NAMES: Mapping[Role, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question", "query", "messages", "conversations", "normal_caption"),
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "audio": ("audio", "audios"),
    "answer": ("answer", "solution", "ground_truth", "reward_model.ground_truth"),
}
"""Role -> column names that play it if the configuration does not name a column."""
WHOLE_CONVERSATIONS = ("messages", "conversations")
"""Prompt columns that usually end with the assistant's turn, which is the expected answer."""

MAX_FIELDS, MAX_DEPTH = 50, 4
"""Limits for structs whose fields are looked up by name."""


@dataclass(frozen=True)
class Columns:
    """The column of each role. If `answer` is the prompt's column, the last turn of the conversation is the answer."""

    prompt: str
    image: str | None = None
    video: str | None = None
    audio: str | None = None
    answer: str | None = None
    extra: tuple[str, ...] = ()
    """Further columns, passed to rewards unchanged."""
    unexpected: tuple[str, ...] = ()
    """Names that would play a role if they were among the columns. In JSON files they may come up later."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return all columns that are read, each once."""
        named = (self.prompt, *(column for _, column in self.media), self.answer, *self.extra)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def media(self) -> tuple[tuple[MediaKind, str], ...]:
        """Return kind of media -> its column, for kinds that have one."""
        found = [(kind, getattr(self, kind)) for kind in MEDIA_ROLES]
        return tuple((kind, column) for kind, column in found if column is not None)

    @property
    def answer_is_last_turn(self) -> bool:
        return self.answer == self.prompt

    def surprises(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns of a row that would be ignored, although their names say that they play a role."""
        return [name for name in self.unexpected if value_of(row, name) is not None]

    def __str__(self) -> str:
        roles = [("prompt", self.prompt), *self.media]
        if self.answer is not None:
            roles.append(("answer", f"last turn of {self.prompt}" if self.answer_is_last_turn else self.answer))
        return ", ".join(f"{role}: {column}" for role, column in roles)


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a row's value of a column, or of a field of one; None if there is none."""
    if name in row:
        return row[name]
    for dot in (i for i, character in enumerate(name) if character == "."):
        if isinstance(inner := row.get(name[:dot]), Mapping):
            return value_of(inner, name[dot + 1 :])
    return None


def is_read(column: str, names: Sequence[str]) -> bool:
    """Return whether one of `names` is `column`, or a field of it."""
    return any(name == column or name.startswith(f"{column}.") for name in names)


def unread(present: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns, without their fields, from which nothing is read."""
    return [column for column in _tops(present) if not is_read(column, names)]


def field_names(row: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Return the columns of a row. A struct adds the dotted names of its fields, unless it has so many that they must
    be contents and not names."""
    for name, value in row.items():
        yield within + name
        if isinstance(value, Mapping) and len(value) <= MAX_FIELDS and within.count(".") < MAX_DEPTH:
            yield from field_names(value, f"{within}{name}.")


def choose_columns(
    named: Mapping[Role, str | None],
    extra: Sequence[str],
    files: Mapping[str, Sequence[str]],
    problems: list[str],
    optional: Sequence[str] = (),
) -> Columns | None:
    """Choose the columns of a set of files from the configured names and from the columns and fields of each file.

    `extra` are further columns to pass on, and `optional` are columns to pass on if all files have them. A role without
    a configured name gets the one column with a name known for it, if there is one. Missing columns, ambiguous columns,
    and files that differ are added to `problems`; then the result is None, as it is for no files."""
    chosen: dict[Columns, str] = {}
    before = len(problems)
    extra = (*extra, *(n for n in optional if n not in extra and all(n in present for present in files.values())))
    alike: dict[tuple[str, ...], list[str]] = {}
    for file, present in files.items():
        alike.setdefault(tuple(present), []).append(file)
    for present, group in alike.items():
        where = group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"
        columns = _choose(named, extra, where, present, problems)
        if columns is not None:
            chosen.setdefault(columns, where)
    if len(problems) > before or not chosen:
        return None
    first, *others = chosen
    problems += [
        f"{chosen[other]}: would be read as {other}; {chosen[first]} as {first}. All files of a set must have "
        "the same columns: name them in data.columns, or give all files the same form"
        for other in others
    ]
    return None if others else first


def _choose(
    named: Mapping[Role, str | None], extra: Sequence[str], file: str, present: Sequence[str], problems: list[str]
) -> Columns | None:
    wanted = [(f"data.columns.{role}", name) for role, name in named.items() if name is not None]
    wanted += [("asked for by a reward, or data.columns.group", name) for name in extra]
    missing = [
        f"{file}: no column {name!r} ({knob}); it has {', '.join(_nearest_first(name, present))}"
        for knob, name in wanted
        if name not in present
    ]
    claimed = {name for role, name in named.items() if role != "answer"}  # an answer may share the prompt's column
    roles: dict[Role, str | None] = dict(named)
    unexpected: list[str] = []
    for role, known in KNOWN_NAMES.items():
        if role in named:
            continue
        candidates = [name for name in known if name in present and name not in claimed]
        if len(candidates) > 1:
            either = " or ".join(map(repr, candidates))
            missing.append(f"{file}: the {role} could be {either}; name one with data.columns.{role}")
        roles[role] = candidates[0] if candidates else None
        unexpected += [name for name in known if name not in candidates]
    prompt = roles.pop("prompt")
    if prompt is None:
        missing.append(
            f"{file}: no column with a known name for prompts ({', '.join(KNOWN_NAMES['prompt'])}); name it with "
            f"data.columns.prompt. It has {', '.join(_tops(present))}"
        )
    if missing or prompt is None:
        problems += missing
        return None
    if "answer" not in named and roles["answer"] is None and prompt in WHOLE_CONVERSATIONS:
        roles["answer"] = prompt
    used = {prompt, *roles.values(), *extra}
    return Columns(prompt, **roles, extra=tuple(extra), unexpected=tuple(n for n in unexpected if n not in used))


def _nearest_first(name: str, known: Sequence[str]) -> list[str]:
    """Return the columns, nearest names first, with those of their fields that may be meant."""

    def likeness(other: str) -> float:
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (other, other.rpartition(".")[2]))

    tops = _tops(known)
    shown = [k for k in known if k in tops or likeness(k) > 0.8]
    return sorted(shown, key=lambda k: -likeness(k))


def _tops(known: Sequence[str]) -> list[str]:
    """Return the names that are not a field of another."""
    return [name for name in known if not any(name != k and is_read(k, [name]) for k in known)]

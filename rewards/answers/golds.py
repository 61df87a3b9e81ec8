"""Golds: read the right answer of a row. Runs, `rewards score` and `rewards check` all read it here.

    a column's value ──gold_text──▶ the row's answer, a text ──gold_forms──▶ the texts that count as right

red                                        itself; of a number, its digits
<think>..</think> <answer>red</answer>     red: of a whole solution, only the marked answer counts. The mark is tags,
.. so it is \\boxed{72}                     the last box (boxes with different contents are refused),
.. 48+24 = 72\\n#### 72                     or the last ####, at the end of the text
["1/2", "50 cents"]                        two forms, one of which is enough; each is read like a text
["x", null]                                one form: Parquet and `datasets` fill short lists with nulls
["two", 2]                                 two forms; a number beside texts is read as its text
[1, 2]                                     one form: numbers in brackets are an answer by themselves
{"box": [1, 2]}, [{"name": ..}]            JSON, for the rewards that read it
[null], [], ""                             none: the row has no answer
["assert f() == 1"] with `as_written`      tests of programs stay unchanged, and so does JSON, also in a fence
{"style": .., "ground_truth": ..}          refused: the field is the gold (`data.columns.answer: column.ground_truth`)

This file imports only marks.py and nulls.py of this project, since the data side, which knows no reward, uses it too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rewards.answers.marks import boxed, boxes
from rewards.answers.nulls import is_null

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?[ \t\r]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
"""Each blank line is matched in only one way. With several ways, a thousand blank lines would take seconds."""
_FIELD = "ground_truth"
"""The field of verl's struct `reward_model` that holds the gold."""
_HASH = re.compile(r"[ \t]*(\S[^\n]*?)\s*(?:\n\s*the answer is\b[^\n]*\s*)?", re.IGNORECASE)
"""Matches the text after the last `####`: one line (and MetaMath's second line, which repeats it)."""


class GoldError(ValueError):
    """A value is not a gold. `kind` is a short fixed phrase to count by; the message has the details."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


def gold_text(value: Any, column: str = "answer", *, as_written: bool = False) -> str:
    """Return the gold of a column's value as one text. Several forms become a JSON list. Raises GoldError.

    With `as_written`, the value is a program or tests, in which `</think>`, `####` and boxes mark nothing."""
    try:
        return _gold_text(value, column[:60], as_written)
    except GoldError as error:
        raise GoldError(error.kind, f"column {column[:60]!r}: {error.reason}") from error


def _gold_text(value: Any, column: str, as_written: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise GoldError("no answer", "the row has no answer")
    if isinstance(value, Mapping) and _FIELD in value:
        fields = ", ".join(map(str, value))
        raise GoldError(
            "bad answer",
            f"a struct ({fields:.80}); name its field: data.columns.answer={column}.{_FIELD}",
        )
    if isinstance(value, list | dict):
        text = _written(value)
    elif isinstance(value, str | int | float | Decimal):
        text = str(value)
    else:
        found = type(value).__name__
        raise GoldError("bad answer", f"the answer must be a text, a number, a list or a struct, found {found}")
    listed = _listed(text)
    written = tuple(form for form in ((text,) if listed is None else listed) if form.strip())
    forms = written if as_written else _stated_forms(written)
    if not forms and text.strip() != "[]":  # an empty list is a gold of tool_call: no tool should be called
        raise GoldError("no answer", "the row has no answer")
    if listed is None:
        return forms[0] if len(forms) == 1 else json.dumps(forms, ensure_ascii=False)
    return text if forms == listed else json.dumps(forms, ensure_ascii=False)


def _written(value: list[Any] | dict[Any, Any]) -> str:
    """Return the value as JSON. A list of texts loses the nulls with which pandas and Parquet pad it."""
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        value = [item for item in value if not is_null(item)]
    try:
        return json.dumps(_with_nulls(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GoldError("bad answer", f"the answer cannot be written as JSON: {error!s:.100}") from error


def _with_nulls(value: Any) -> Any:
    """Replace the NaNs of pandas, which JSON cannot express, by null."""
    if isinstance(value, Mapping):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if is_null(value) else value


@lru_cache(maxsize=1024)
def gold_forms(answer: str | None) -> tuple[str, ...]:
    """Return all texts that count as the gold answer: those of a JSON list of texts, or else the answer that the text
    states. A text that does not state exactly one answer stays unchanged."""
    if answer is None:
        return ()
    listed = _listed(answer)
    forms = (answer,) if listed is None else listed
    try:
        return _stated_forms(forms)
    except GoldError:
        return forms


def _listed(text: str) -> tuple[str, ...] | None:
    """Return the forms in a JSON list of texts; empty if the list is empty. None if it is not such a list."""
    forms = _json(text)
    if not isinstance(forms, list):
        return None
    forms = [form for form in forms if form is not None and form == form]  # pandas pads with NaN
    texts = any(isinstance(form, str) for form in forms)
    if forms and (not texts or not all(isinstance(form, str | int | float) for form in forms)):
        return None
    written = [form if isinstance(form, str) else json.dumps(form) for form in forms]
    return tuple(form for form in written if form.strip())


def _stated_forms(forms: Sequence[str]) -> tuple[str, ...]:
    """Return the answers that the forms state, each once. Raises GoldError."""
    return tuple(dict.fromkeys(said for form in forms for said in _stated(form) if said.strip()))


def _stated(text: str) -> tuple[str, ...]:
    """Return the answer that a text marks, or else the text itself; both forms of `\\boxed{28}\\%`. Raises
    GoldError."""
    if _json(text) is not None:
        return (text,)
    trace, ended, behind = text.rpartition("</think>")
    if ended and not behind.strip():
        raise GoldError("no answer", f"thoughts without an answer after </think>: {trace[:60]!r}")
    behind = behind if ended else text
    if answers := dict.fromkeys(answer.strip() for answer in _ANSWER.findall(behind)):
        behind = _only(list(answers), text)
    if (box := boxed(behind)) is not None:
        if others := {behind[inside:end].strip() for _, inside, end in boxes(behind)} - {"", *box.parts}:
            _only([*sorted(others), box.text], text)
        return box.forms
    hashes, mark, line = behind.rpartition("####")
    if mark and (not hashes or hashes[-1].isspace()) and (match := _HASH.fullmatch(line)) is not None:
        return (match[1],)
    return (behind.strip() if ended or answers else text,)


def _only(answers: Sequence[str], text: str) -> str:
    """Return the only answer. Raises GoldError if there are several."""
    if len(answers) == 1:
        return answers[0]
    several = " and ".join(f"{answer[:30]!r}" for answer in answers[:2])
    raise GoldError(
        "bad answer",
        f"the solution marks {len(answers)} answers, {several}; name a column with a single answer "
        f"(data.columns.answer): {text[:60]!r}",
    )


def is_number(value: Any) -> bool:
    """Return whether a column's value has the type number (and is not a text that states one)."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def is_struct(text: str) -> bool:
    """Return whether a text is a JSON object, or a JSON list with objects or with lists of texts, and so not an answer
    in words or numbers. A matrix is not a struct."""
    document = _json(text)
    try:
        return isinstance(document, dict) or (isinstance(document, list) and any(map(_is_deep, document)))
    except RecursionError:
        return True


def _is_deep(item: Any) -> bool:
    """Return whether an item of a list is an object, or a list that contains a text or an object."""
    if not isinstance(item, list):
        return isinstance(item, dict)
    return any(isinstance(inner, str) or _is_deep(inner) for inner in item)


def _json(text: str) -> Any:
    """Parse a text that is a JSON object or list, perhaps in a Markdown fence; None for any other text."""
    if (fence := _FENCE.fullmatch(text.strip())) is not None:
        text = fence[1]
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # brackets that are not JSON, or too many of them
        return None

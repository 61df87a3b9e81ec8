"""Golds: what a row says is right. The one place where that is read, for runs, `rewards score` and `rewards check`.

    a column's value ──gold_text──▶ the row's answer, a text ──gold_forms──▶ the texts that count as right

red                                        itself; of a number, its digits
<think>..</think> <answer>red</answer>     red: a whole solution is what it marks as its answer, be it with tags,
.. so it is \\boxed{72}                     in its last box (several boxes that say different things are no answer),
.. 48+24 = 72\\n#### 72                     or behind the last ####, at the end of the text
["1/2", "50 cents"]                        two forms, one of which is enough; each is read like a text
["x", null]                                one form: Parquet and `datasets` fill short lists with nulls
["two", 2]                                 two forms; a number beside texts is read as its text
[1, 2]                                     one form: numbers in brackets are an answer by themselves
{"box": [1, 2]}, [{"name": ..}]            JSON, for the rewards that read it
[null], [], ""                             none: the row has no answer
["assert f() == 1"] with `as_written`      tests of programs stay as they are, and so does JSON, be it in a fence
{"style": .., "ground_truth": ..}          refused: the field is the gold (`data.columns.answer: column.ground_truth`)

This file imports nothing of ours but marks.py and nulls.py: the data side, which knows no reward, reads by it too.
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
"""Each blank line is matched in one way only: in several, a thousand of them would take seconds."""
_FIELD = "ground_truth"
"""The field of verl's struct `reward_model` that is the gold."""
_HASH = re.compile(r"[ \t]*(\S[^\n]*?)\s*(?:\n\s*the answer is\b[^\n]*\s*)?", re.IGNORECASE)
"""What may stand behind the last `####`: one line (and MetaMath's, which repeats it)."""


class GoldError(ValueError):
    """A value that is no gold. `kind` is a few fixed words to count by, the message tells the rest."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


def gold_text(value: Any, column: str = "answer", *, as_written: bool = False) -> str:
    """The gold of a column's value as one text; several forms are a JSON list. Raises GoldError.

    `as_written`: it is no text answer but a program or tests, in which `</think>`, `####` and boxes mark nothing."""
    try:
        return _gold_text(value, column[:60], as_written)
    except GoldError as error:
        raise GoldError(error.kind, f"column {column[:60]!r}: {error.reason}") from error


def _gold_text(value: Any, column: str, as_written: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise GoldError("no answer", "the row has no answer")
    if isinstance(value, Mapping) and _FIELD in value:
        fields = ", ".join(map(str, value))
        raise GoldError("bad answer", f"a struct ({fields:.80}); name its field: data.columns.answer={column}.{_FIELD}")
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
    if not forms and text.strip() != "[]":  # an empty list is a gold of tool_call: nothing is to be called
        raise GoldError("no answer", "the row has no answer")
    if listed is None:
        return forms[0] if len(forms) == 1 else json.dumps(forms, ensure_ascii=False)
    return text if forms == listed else json.dumps(forms, ensure_ascii=False)


def _written(value: list[Any] | dict[Any, Any]) -> str:
    """As JSON; a list of texts without what pandas and Parquet fill it up with."""
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        value = [item for item in value if not is_null(item)]
    try:
        return json.dumps(_with_nulls(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GoldError("bad answer", f"the answer cannot be written as JSON: {error!s:.100}") from error


def _with_nulls(value: Any) -> Any:
    """With null for what pandas fills in, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if is_null(value) else value


@lru_cache(maxsize=1024)
def gold_forms(answer: str | None) -> tuple[str, ...]:
    """All texts that count as the gold answer: those of a JSON list of texts, else what the answer itself states. A
    text that states no one answer stays as it is."""
    if answer is None:
        return ()
    listed = _listed(answer)
    forms = (answer,) if listed is None else listed
    try:
        return _stated_forms(forms)
    except GoldError:
        return forms


def _listed(text: str) -> tuple[str, ...] | None:
    """The forms of a JSON list of them; none for a list of nothing. None: it is no such list."""
    forms = _json(text)
    if not isinstance(forms, list):
        return None
    forms = [form for form in forms if form is not None and form == form]  # NaN is what pandas fills in
    texts = any(isinstance(form, str) for form in forms)
    if forms and (not texts or not all(isinstance(form, str | int | float) for form in forms)):
        return None
    written = [form if isinstance(form, str) else json.dumps(form) for form in forms]
    return tuple(form for form in written if form.strip())


def _stated_forms(forms: Sequence[str]) -> tuple[str, ...]:
    """What the forms state, each once. Raises GoldError."""
    return tuple(dict.fromkeys(said for form in forms for said in _stated(form) if said.strip()))


def _stated(text: str) -> tuple[str, ...]:
    """The answer that a text marks as such, else the text itself; both forms of `\\boxed{28}\\%`. Raises GoldError."""
    if _json(text) is not None:
        return (text,)
    trace, ended, behind = text.rpartition("</think>")
    if ended and not behind.strip():
        raise GoldError("no answer", f"thoughts, and no answer behind </think>: {trace[:60]!r}")
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
    """The one answer. Raises GoldError for several."""
    if len(answers) == 1:
        return answers[0]
    several = " and ".join(f"{answer[:30]!r}" for answer in answers[:2])
    raise GoldError(
        "bad answer",
        f"a solution that marks {len(answers)} answers, {several}; name a column with the one that counts "
        f"(data.columns.answer): {text[:60]!r}",
    )


def is_number(value: Any) -> bool:
    """Whether a column's value is a number, and no text that says one."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def is_struct(text: str) -> bool:
    """Whether a text is a JSON object, or a JSON list with objects or with lists of texts: no answer in words or
    numbers. A matrix is none."""
    document = _json(text)
    try:
        return isinstance(document, dict) or (isinstance(document, list) and any(map(_is_deep, document)))
    except RecursionError:
        return True


def _is_deep(item: Any) -> bool:
    """Whether an item of a list is an object, or a list with a text or an object in it."""
    if not isinstance(item, list):
        return isinstance(item, dict)
    return any(isinstance(inner, str) or _is_deep(inner) for inner in item)


def _json(text: str) -> Any:
    """The JSON object or list that a text is, perhaps in a Markdown fence; else None."""
    if (fence := _FENCE.fullmatch(text.strip())) is not None:
        text = fence[1]
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # brackets that are no JSON, or too many of them
        return None

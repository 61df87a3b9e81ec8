"""Tool calls: does the completion call the right tools with the right arguments?

completion    every `<tool_call>{"name": .., "arguments": {..}}</tool_call>` in it (the form of Hermes and Qwen)
gold          the row's answer or a column: such a call, or a list of them; an empty list where no tool is to be called
call          also `{"type": "function", "function": {..}}`, `parameters` for `arguments`, arguments as JSON text
tools         what may be called, in OpenAI's form `{"name": .., "parameters": schema}`; what violates it is wrong

Two calls are equal if their names are equal and their arguments have equal values: 5 is 5.0, true is not 1, "Paris" is
not "paris", and 3 is not "3". The order of calls and of keys does not count; the order of lists does. A null argument
counts as missing, and a gold call with only nulls is ignored, since tables give every row the keys of all others. The
schema checks a model's nulls as they are written.

Failure modes: the text outside of the calls is not judged. The defaults of a tool are not known, so a missing argument
differs from a given one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.answers.nulls import is_blank, is_null, without_blanks
from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.functions.json_schema import check_schema, read_json, violation
from rollout.types import Verdict

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCallReward:
    """Scores 1.0 if the completion makes exactly the gold calls, and 0.0 otherwise. A row whose gold is not a list of
    calls is `unscorable`."""

    separable: ClassVar[bool] = True
    tools: Sequence[Mapping[str, Any]] = ()
    column: str | None = None
    """Column with the gold calls. None: the row's answer holds them."""
    partial: bool = False
    """Score 2 * right calls / (gold calls + calls made) instead of 0.0."""

    def __post_init__(self) -> None:
        for tool in self.tools:
            declared = tool.get("function", tool)
            if not isinstance(declared.get("name"), str):
                raise ValueError(f"a tool without a name: {tool!r:.100}")
            check_schema(declared.get("parameters", {}))

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        try:
            wanted = Counter(_key(*_read(call)) for call in self._gold(request))
        except (ValueError, TypeError, RecursionError) as error:
            return unscorable(request, f"the row's {self.column or 'answer'} holds no tool calls: {error}"[:300])
        return [self._judge(wanted, text) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion that makes the gold calls; None if the row has none."""
        try:
            calls = [_read(call) for call in self._gold(request)]
            written = [json.dumps({"name": name, "arguments": without_blanks(given)}) for name, given in calls]
        except (ValueError, TypeError, RecursionError):
            return None
        return "\n".join(f"{_OPENING}{call}{_CLOSING}" for call in written)

    def _gold(self, request: ScoringRequest) -> list[Any]:
        """Return the row's calls as they are written. Raises ValueError or TypeError if there is no list."""
        gold = gold_of(request, self.column)
        document = read_json(gold) if isinstance(gold, str) else gold
        if isinstance(document, Mapping):
            return [document]
        if not isinstance(document, list | tuple):
            raise TypeError(f"expected a call or a list of calls, found {type(document).__name__}")
        calls = [call for call in document if not is_blank(call)]
        if document and not calls:
            raise ValueError("they are all null; use an empty list if no tool should be called")
        return calls

    def _judge(self, wanted: Counter[str], completion: str) -> Verdict:
        made: Counter[str] = Counter()
        for piece in completion.split(_OPENING)[1:]:
            text, closing, _ = piece.partition(_CLOSING)
            if not closing:
                return Verdict.scored(0.0, reason="a <tool_call> without its end")
            try:
                name, arguments = _read(read_json(text))
                made[_key(name, arguments)] += 1
            except (ValueError, TypeError, RecursionError) as error:
                return Verdict.scored(0.0, reason=f"unreadable call: {error}"[:300])
            if problem := self._problem(name, arguments):
                return Verdict.scored(0.0, reason=problem)
        if made == wanted:
            return Verdict.scored(1.0)
        right, total = (made & wanted).total(), made.total() + wanted.total()
        score = 2 * right / total if self.partial else 0.0
        return Verdict.scored(score, reason=f"{right} of {wanted.total()} calls right, {made.total()} made")

    def _problem(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Say what in a call violates the declared tools; empty if nothing does."""
        if not self.tools:
            return ""
        declared = {t["name"]: t.get("parameters", {}) for t in (tool.get("function", tool) for tool in self.tools)}
        if name not in declared:
            return f"there is no tool {name!r:.60}"
        problem = violation(declared[name], arguments)
        return f"{name}: {problem}" if problem else ""


def _read(call: Any) -> tuple[str, Mapping[str, Any]]:
    """Return name and arguments of a call in any of its forms. Raises ValueError if it is not a call."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) and not is_blank(call["function"]):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ValueError('a call must be an object {"name": .., "arguments": {..}}')
    arguments = call.get("arguments")
    if is_null(arguments):
        arguments = call.get("parameters")
    if isinstance(arguments, str):
        arguments = read_json(arguments) if arguments.strip() else None
    if is_null(arguments):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments must be an object")
    return call["name"], arguments


def _key(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as text. Equal calls give equal texts."""
    return json.dumps([name, _canonical(without_blanks(arguments))], sort_keys=True)


def _canonical(value: Any) -> Any:
    """Write whole numbers as integers: 5.0 becomes 5."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

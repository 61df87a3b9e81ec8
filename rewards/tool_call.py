"""Tool calls: does the completion call the tools that it should, with the right arguments?

completion    every `<tool_call>{"name": .., "arguments": {..}}</tool_call>` in it (the form of Hermes and Qwen)
gold          the row's answer, as JSON: such an object, or a list of them; an empty list where no tool is to be called
tools         what may be called, in OpenAI's form `{"name": .., "parameters": schema}`; what violates it is wrong

Failure modes: arguments are compared as they are, so "Paris" is not "paris", nor 3 "3". The order of calls does not
count. What the completion says besides its calls is not judged.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.json_schema import NotJSONError, check_schema, read_json, violation
from rollout.types import Verdict

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCallReward:
    """1.0 where exactly the gold calls are made, 0.0 otherwise; `unscorable` where the gold is no list of calls."""

    separable: ClassVar[bool] = True
    tools: Sequence[Mapping[str, Any]] = ()
    column: str | None = None
    """Column that holds the gold calls; None: the row's answer does."""
    partial: bool = False
    """Instead of 0.0, 2 * right calls / (gold calls + calls made)."""

    def __post_init__(self) -> None:
        for tool in self.tools:
            declared = tool.get("function", tool)
            if not isinstance(declared.get("name"), str):
                raise ValueError(f"a tool without a name: {tool!r:.100}")
            check_schema(declared.get("parameters", {}))

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        try:
            gold = gold_of(request, self.column)
            document = read_json(gold) if isinstance(gold, str) else gold
            wanted = Counter(_key(call) for call in ([document] if isinstance(document, Mapping) else document))
        except (ValueError, TypeError) as error:
            return unscorable(request, f"the row's {self.column or 'answer'} holds no tool calls: {error}"[:300])
        return [self._judge(wanted, text) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """The gold calls as a completion makes them; None where the row has none."""
        gold = gold_of(request, self.column)
        try:
            document = read_json(gold) if isinstance(gold, str) else gold
        except NotJSONError:
            return None
        calls = [document] if isinstance(document, Mapping) else document or ()
        return "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)

    def _judge(self, wanted: Counter[str], completion: str) -> Verdict:
        if completion.count("<tool_call>") != len(texts := _CALL.findall(completion)):
            return Verdict.scored(0.0, reason="a <tool_call> without its end")
        made: Counter[str] = Counter()
        for text in texts:
            try:
                call = read_json(text)
                made[_key(call)] += 1
            except (NotJSONError, ValueError, TypeError) as error:
                return Verdict.scored(0.0, reason=f"unreadable call: {error}"[:300])
            if problem := self._problem(call):
                return Verdict.scored(0.0, reason=problem)
        if made == wanted:
            return Verdict.scored(1.0)
        right, total = (made & wanted).total(), made.total() + wanted.total()
        score = 2 * right / total if self.partial else 0.0
        return Verdict.scored(score, reason=f"{right} of {wanted.total()} calls right, {made.total()} made")

    def _problem(self, call: Mapping[str, Any]) -> str:
        """What in a call violates the declared tools; empty if nothing does."""
        if not self.tools:
            return ""
        declared = {t["name"]: t.get("parameters", {}) for t in (tool.get("function", tool) for tool in self.tools)}
        if call["name"] not in declared:
            return f"there is no tool {call['name']!r:.60}"
        problem = violation(declared[call["name"]], call.get("arguments", {}))
        return f"{call['name']}: {problem}" if problem else ""


def _key(call: Any) -> str:
    """A call as text, the same for equal calls. Raises ValueError for what is no call."""
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ValueError('a call is an object {"name": .., "arguments": {..}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments are an object")
    return json.dumps([call["name"], arguments], sort_keys=True)

"""tool_call and json_schema: which calls are equal, in the forms that models and public data sets write."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from rewards.base import ScoringRequest
from rewards.functions.json_schema import JsonSchemaReward
from rewards.functions.tool_call import ToolCallReward

ZOOM = {"name": "zoom", "arguments": {"bbox": [1, 2, 3, 4]}}
WEATHER = {"name": "weather", "arguments": {"city": "Paris", "days": 5, "celsius": True}}
PING: dict[str, Any] = {"name": "ping", "arguments": {}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def made(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{c if isinstance(c, str) else json.dumps(c)}\n</tool_call>" for c in calls)


def weather(**changed: Any) -> dict[str, Any]:
    return call("weather", **{**WEATHER["arguments"], **changed})


RIGHT: list[tuple[Any, str]] = [
    (ZOOM, made(ZOOM)),
    ([ZOOM], made(ZOOM)),
    ([ZOOM, None], made(ZOOM)),
    (ZOOM, f"I look closer. {made(ZOOM)} Let me see."),
    (ZOOM, f"<think>closer</think>{made(ZOOM)}"),
    (ZOOM, made('{"arguments": {"bbox": [1, 2, 3, 4]}, "name": "zoom"}')),
    (ZOOM, made('```json\n{"name": "zoom", "arguments": {"bbox": [1, 2, 3, 4]}}\n```')),
    (ZOOM, made({"name": "zoom", "arguments": '{"bbox": [1, 2, 3, 4]}'})),
    (ZOOM, made({"name": "zoom", "parameters": {"bbox": [1, 2, 3, 4]}})),
    (ZOOM, made({"type": "function", "function": ZOOM})),
    (ZOOM, made({"id": "call_1", **ZOOM})),
    (ZOOM, made(call("zoom", bbox=[1.0, 2.0, 3.0, 4.0]))),
    (ZOOM, made(call("zoom", bbox=[1, 2, 3, 4], angle=None))),
    (call("zoom", bbox=[1.0, 2, 3, 4]), made(ZOOM)),
    (call("zoom", bbox=[1, 2, 3, 4], angle=None), made(ZOOM)),
    ({"type": "function", "function": {"name": "zoom", "arguments": '{"bbox": [1, 2, 3, 4]}'}}, made(ZOOM)),
    (WEATHER, made(WEATHER)),
    (WEATHER, made(weather(days=5.0))),
    (WEATHER, made('{"name": "weather", "arguments": {"days": 5e0, "celsius": true, "city": "\\u0050aris"}}')),
    ([ZOOM, WEATHER], made(WEATHER, ZOOM)),
    ([ZOOM, ZOOM], made(ZOOM, ZOOM)),
    (PING, made(PING)),
    (PING, made({"name": "ping"})),
    (PING, made({"name": "ping", "arguments": None})),
    (PING, made({"name": "ping", "arguments": ""})),
    ({"name": "ping", "arguments": None}, made(PING)),
    ({"name": "ping", "arguments": {"bbox": None, "angle": None}}, made(PING)),
    ([], "I need no tool."),
    ([], ""),
    (call("f", a={"b": 1, "c": None}), made(call("f", a={"b": 1}))),
    (call("f", a=[1, None]), made(call("f", a=[1, None]))),
    (call("f", a=1, b={"c": None, "d": {"e": None}}), made(call("f", a=1))),
    (call("f", b={}), made(call("f", b={}))),
    (call("f", a=-0.0), made(call("f", a=0))),
    (call("f", a=1e3), made(call("f", a=1000))),
    (call("f", a="é"), made('{"name": "f", "arguments": {"a": "é"}}')),
    (call("f", a=[]), made(call("f", a=[]))),
]
WRONG: list[tuple[Any, str]] = [
    (ZOOM, ""),
    (ZOOM, "zoom"),
    (ZOOM, json.dumps(ZOOM)),  # without the tags
    (ZOOM, made(ZOOM, ZOOM)),
    (ZOOM, made(call("zoom", bbox=[4, 3, 2, 1]))),
    (ZOOM, made(call("zoom", bbox=[1, 2, 3, 4.5]))),
    (ZOOM, made(call("zoom", bbox="[1, 2, 3, 4]"))),
    (ZOOM, made(call("zoom", bbox=[1, 2, 3, 4], angle=0))),
    (ZOOM, made(call("Zoom", bbox=[1, 2, 3, 4]))),
    (ZOOM, made({"name": "zoom", "arguments": [1, 2, 3, 4]})),
    (ZOOM, made({"name": "zoom", "arguments": "bbox"})),
    (ZOOM, made({"tool": "zoom"})),
    (ZOOM, made({"name": 3})),
    (ZOOM, made("zoom(bbox=[1, 2, 3, 4])")),
    (ZOOM, made("{'name': 'zoom', 'arguments': {'bbox': [1, 2, 3, 4]}}")),
    (ZOOM, made([ZOOM])),
    (ZOOM, "<tool_call>" + json.dumps(ZOOM)),
    (ZOOM, made(ZOOM) + "<tool_call>"),
    (ZOOM, "<tool_call>" + made(ZOOM)),
    (ZOOM, made('{"name": "zoom", "arguments": {"bbox": [1, 2, 3, 4], "bbox": [1, 2, 3, 4]}}')),
    (WEATHER, made(weather(city="paris"))),
    (WEATHER, made(weather(days="5"))),
    (WEATHER, made(weather(days=True))),
    (WEATHER, made(weather(celsius=1))),
    (WEATHER, made(weather(celsius="true"))),
    (WEATHER, made(weather(celsius=None))),
    ([ZOOM, WEATHER], made(ZOOM)),
    ([ZOOM, WEATHER], made(ZOOM, WEATHER, PING)),
    ([], made(PING)),
    (PING, made(call("ping", host="x"))),
    (call("f", a=[1, None]), made(call("f", a=[1]))),
    (call("f", a=1), made(call("f", a=True))),
    (call("f", a=9007199254740993), made(call("f", a=9007199254740992))),
    (call("f", a=0.1), made('{"name": "f", "arguments": {"a": NaN}}')),
    (PING, made("[" * 50_000)),
    (call("f", b={"c": 0}), made(call("f"))),
    (call("f", a=0.1), made('{"name": "f", "arguments": {"a": 1e999}}')),
]


def score(reward: ToolCallReward, gold: Any, completion: str) -> float | str:
    answer = gold if gold is None or isinstance(gold, str) else json.dumps(gold)
    verdict = reward(ScoringRequest("", (completion,), answer))[0]
    return verdict.status if verdict.score is None else verdict.score


@pytest.mark.parametrize(
    ("gold", "completion", "expected"), [*((g, c, 1.0) for g, c in RIGHT), *((g, c, 0.0) for g, c in WRONG)]
)
def test_calls(gold: Any, completion: str, expected: float) -> None:
    assert score(ToolCallReward(), gold, completion) == expected


def test_columns_hold_golds_with_the_nulls_of_their_table() -> None:
    struct = {"name": "zoom", "arguments": {"bbox": [1.0, 2.0, 3.0, 4.0], "angle": None}}
    request = ScoringRequest("", (made(ZOOM),), columns={"calls": [struct, None]})
    reward = ToolCallReward(column="calls")
    assert reward(request)[0].score == 1.0
    ideal = reward.ideal(request)
    assert ideal == '<tool_call>{"name": "zoom", "arguments": {"bbox": [1.0, 2.0, 3.0, 4.0]}}</tool_call>'
    for no_gold in (None, "", "red", "3", '[{"no": "name"}]', '[["zoom"]]'):
        assert score(ToolCallReward(), no_gold, made(ZOOM)) == "unscorable"


BLANK = {"name": None, "arguments": None}


@pytest.mark.parametrize(
    "gold",
    [
        [ZOOM, BLANK],
        [BLANK, ZOOM, {"name": None, "arguments": {"bbox": None}}],
        [{**ZOOM, "type": None, "function": BLANK}],
        [{"type": "function", "function": ZOOM, **BLANK}, {"type": None, "function": BLANK, **BLANK}],
        [ZOOM, {"name": float("nan"), "arguments": float("nan")}],
    ],
)
def test_calls_of_nothing_but_nulls_are_no_calls(gold: Any) -> None:
    reward = ToolCallReward(column="calls")
    request = ScoringRequest("", (made(ZOOM), made(ZOOM, ZOOM)), columns={"calls": gold})
    assert [v.score for v in reward(request)] == [1.0, 0.0]
    assert reward.ideal(request) == made(ZOOM).replace("\n", "")


@pytest.mark.parametrize("gold", [[None], [BLANK], BLANK, [BLANK, None]])
def test_golds_of_nothing_but_nulls_do_not_say_that_nothing_is_called(gold: Any) -> None:
    (verdict,) = ToolCallReward(column="calls")(ScoringRequest("", ("",), columns={"calls": gold}))
    assert verdict.status == "unscorable" and "holds no tool calls" in verdict.reason


# ---------------------------------------------------------------------- schemas of tables

POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0}}, "required": ["x"]}
NAMES = {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}
EITHER = {"anyOf": [{"type": "integer"}, {"pattern": "^a", "type": "string"}]}
NAMED = {"type": "object", "properties": {"enum": {"type": "integer"}, "const": {"type": "string", "maxLength": 2}}}
SCHEMAS: list[tuple[dict[str, Any], Any, Any]] = [
    (POINT, {"x": 1}, {"x": -1}),
    (NAMES, ["a"], ["c"]),
    (EITHER, "ab", "b"),
    (NAMED, {"const": "ab"}, {"const": "abc"}),
    ({"const": "red"}, "red", None),
]


def schema_scores(schema: Any, *documents: Any) -> list[float | str]:
    completions = tuple(f"<answer>{json.dumps(document)}</answer>" for document in documents)
    verdicts = JsonSchemaReward(column="schema")(ScoringRequest("", completions, columns={"schema": schema}))
    return [v.status if v.score is None else v.score for v in verdicts]


def test_schemas_of_a_table_are_those_that_were_written() -> None:
    written = [schema for schema, _, _ in SCHEMAS]
    read = pa.Table.from_pylist([{"schema": schema} for schema in written]).to_pylist()
    assert all(
        row["schema"]["type"] is None or row["schema"] != schema for row, schema in zip(read, written, strict=True)
    )
    for row, (_, right, wrong) in zip(read, SCHEMAS, strict=True):
        assert schema_scores(row["schema"], right, wrong) == [1.0, 0.0]
        assert schema_scores(json.dumps(row["schema"]), right, wrong) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("schema", "documents", "scores"),
    [
        ({"const": None}, (None, 1), [1.0, 0.0]),
        ({"properties": {"a": {"const": None}}}, ({"a": None}, {"a": 1}), [1.0, 0.0]),
        ({"enum": [None, "a"], "type": None}, (None, "a", "b"), [1.0, 1.0, 0.0]),
        ({"type": "string", "const": None, "enum": None}, ("a", None), [1.0, 0.0]),
        ({"type": "null", "const": None}, (None, 1), [1.0, 0.0]),
        ({"const": {"a": None, "b": 1}, "type": None}, ({"a": None, "b": 1}, {"b": 1}), [1.0, 0.0]),
        ({"default": None, "maximum": 3, "minimum": float("nan")}, (3, 4), [1.0, 0.0]),
        ({"properties": {"a": {"type": "string"}, "b": None}, "additionalProperties": False}, ({"b": 1},), [0.0]),
        ({"minimum": 0, "properties": {"b": {"type": None}}, "items": {"type": None}}, ({"b": 1}, [1]), [1.0, 1.0]),
        ({}, (1,), [1.0]),
        ({"type": None, "properties": {"a": None}}, (1,), ["unscorable"]),
        ({"type": ["string", None]}, (1,), ["unscorable"]),
        (None, (1,), ["unscorable"]),
        ([POINT], (1,), ["unscorable"]),
    ],
)
def test_nulls_of_a_schema(schema: Any, documents: tuple[Any, ...], scores: list[Any]) -> None:
    assert schema_scores(schema, *documents) == scores


def test_declared_tools_see_arguments_in_every_form_and_nulls_as_written() -> None:
    box, angle = {"type": "array"}, {"type": ["number", "null"]}
    schema = {"type": "object", "properties": {"bbox": box, "angle": angle}, "required": ["bbox"]}
    reward = ToolCallReward([{"name": "zoom", "parameters": {**schema, "additionalProperties": False}}])
    assert score(reward, ZOOM, made({"name": "zoom", "arguments": '{"bbox": [1, 2, 3, 4]}'})) == 1.0
    assert score(reward, ZOOM, made(call("zoom", bbox=[1, 2, 3, 4], angle=None))) == 1.0
    assert score(reward, ZOOM, made(call("zoom", bbox=[1, 2, 3, 4], size=None))) == 0.0, "no such argument"
    assert score(reward, call("zoom", bbox=None), made(call("zoom", bbox=None))) == 0.0, "it is no array"
    assert score(reward, PING, made(PING)) == 0.0, "no such tool"


def test_time_grows_with_the_length_alone() -> None:
    """Each would take minutes if it grew with the square."""
    for text in (
        "<tool_call>" * 500_000,
        made(PING) * 5_000 + "<tool_call>" * 100_000,
        made("```" + " " * 90_000 + "x"),
    ):
        assert score(ToolCallReward(), ZOOM, text) == 0.0


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"s": {"pattern": "^(a+)+$"}}},
        {"patternProperties": {"^(a|aa)+$": {"type": "null"}}},
        {"patternProperties": {"^(a|aa)+$": True}, "additionalProperties": False},
    ],
)
def test_a_pattern_that_would_not_end_is_a_violation(schema: dict[str, Any]) -> None:
    hostile = "a" * 3_000 + "!"
    reward = JsonSchemaReward(schema=schema)
    answers = [json.dumps({"s": "b" if "properties" in schema else 1, hostile: 1}), json.dumps({"s": hostile})]
    verdicts = reward(ScoringRequest("", tuple(f"<answer>{answer}</answer>" for answer in answers)))
    assert {v.status for v in verdicts} == {"scored"}, [v.reason for v in verdicts]


@pytest.mark.parametrize(
    ("schema", "document", "valid"),
    [
        ({"pattern": "^[a-z]+(-[a-z]+)*$"}, "a-kebab-case", True),
        ({"pattern": "^[a-z]+(-[a-z]+)*$"}, "No", False),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, {"n_a": 1, "b": "x"}, True),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, {"n_a": "x"}, False),
        ({"properties": {"a": {}}, "patternProperties": {"^n_": {}}, "additionalProperties": False}, {"n_a": 1}, True),
        ({"properties": {"a": {}}, "patternProperties": {"^n_": {}}, "additionalProperties": False}, {"b": 1}, False),
        ({"additionalProperties": {"type": "string"}}, {"b": 1}, False),
        ({"additionalProperties": {"type": "string"}}, {"b": "x"}, True),
    ],
)
def test_patterns_mean_what_they_mean_to_jsonschema(schema: dict[str, Any], document: Any, valid: bool) -> None:
    request = ScoringRequest("", (f"<answer>{json.dumps(document)}</answer>",))
    assert JsonSchemaReward(schema=schema)(request)[0].score == float(valid)

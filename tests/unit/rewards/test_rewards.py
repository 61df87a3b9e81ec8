"""Shipped rewards: what they give for which text, that they never raise, and that they cost little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answers import mathematics
from rewards.base import RewardFunction, ScoringRequest
from rewards.functions.accuracy import AccuracyReward, matches
from rewards.functions.counting import CountingReward
from rewards.functions.format import FormatReward, Style, Trace, answer_text, format_problem, shown
from rewards.functions.grounding import GroundingReward
from rewards.functions.json_schema import JsonSchemaReward
from rewards.functions.language import LanguageReward
from rewards.functions.length import LengthReward
from rewards.functions.multiple_choice import MultipleChoiceReward
from rewards.functions.repetition import RepetitionReward
from rewards.functions.text import ContainsReward, EditDistanceReward, ExactMatchReward
from rewards.functions.tool_call import ToolCallReward

GOOD = "<think>it looks red</think><answer>red</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        " <think> it looks red </think>\n<answer> red </answer>\n",
        "<think>two\nlines, $x < 3$</think> <answer>\\frac{1}{2}</answer>",
        "<think>é — 红</think><answer>红</answer>",
        "<think>a < b > c</think><answer><b>3</b></answer>",
    ],
)
def test_format_accepts(text: str) -> None:
    assert format_problem(text) == ""
    assert FormatReward()(ScoringRequest("", (text,)))[0].score == 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "<think> occurs 0 times"),
        ("red", "<think> occurs 0 times"),
        ("<think>red", "</think> occurs 0 times"),
        ("<think>a</think>red", "<answer> occurs 0 times"),
        ("<think>a</think><answer>red", "</answer> occurs 0 times"),
        (GOOD + "<answer>blue</answer>", "<answer> occurs 2 times"),
        (GOOD + GOOD, "<think> occurs 2 times"),
        ("<think><think>a</think><answer>red</answer>", "<think> occurs 2 times"),
        ("<answer>red</answer><think>a</think>", "out of order"),
        ("<think>a<answer>red</answer></think>", "out of order"),
        ("<think>a<answer></think>red</answer>", "out of order"),
        ("</think>a<think></answer>red<answer>", "out of order"),
        ("So: " + GOOD, "text outside"),
        (GOOD + ".", "text outside"),
        ("<think>a</think> hence <answer>red</answer>", "text outside"),
        ("<think> \n</think><answer>red</answer>", "<think> is empty"),
        ("<think>a</think><answer> </answer>", "<answer> is empty"),
        ("<Think>a</Think><answer>red</answer>", "<think> occurs 0 times"),
    ],
)
def test_format_refuses_with_a_reason(text: str, reason: str) -> None:
    assert reason in format_problem(text)
    verdict = FormatReward()(ScoringRequest("", (text,)))[0]
    assert verdict.score == 0.0 and reason in verdict.reason


NEWLINES = "<think>\nit looks red\n</think>\n<answer>\nred\n</answer>"


@pytest.mark.parametrize(
    ("text", "style", "trace", "problem"),
    [
        (NEWLINES, "newline", "visible", ""),
        (NEWLINES + "\n", "newline", "visible", ""),
        (NEWLINES, "strict", "visible", ""),
        (GOOD, "newline", "visible", "line breaks"),
        (NEWLINES + "\n\n", "newline", "visible", "line breaks"),
        (NEWLINES.replace("</think>\n", "</think>\n\n"), "newline", "visible", "line breaks"),
        (NEWLINES.replace("\nred\n", "\n\n"), "newline", "visible", "<answer> is empty"),
        ("So. <Think>a</THINK> hence <Answer>red</answer>.", "lenient", "visible", ""),
        ("<think>a</think><think>b</think><answer>red</answer>", "lenient", "visible", ""),
        (GOOD + GOOD, "lenient", "visible", "<answer> occurs 2 times"),
        ("<answer>red</answer><think>a</think>", "lenient", "visible", "out of order"),
        ("<think>a</think></answer>red<answer>", "lenient", "visible", "out of order"),
        ("<think> </think><answer>red</answer>", "lenient", "visible", "<think> is empty"),
        (GOOD, "strict", "internal", ""),  # it is written all the same, and hidden by what shows it
        (GOOD, "strict", "stripped", "the format has none"),
        ("<answer>red</answer>", "strict", "stripped", ""),
        ("<answer>red</answer>", "strict", "internal", "<think> occurs 0 times"),
        ("<answer>\nred\n</answer>", "newline", "stripped", ""),
        ("It is <answer>red</answer>", "lenient", "stripped", ""),
        ("It is <answer>red</answer>", "strict", "stripped", "text outside"),
    ],
)
def test_styles_of_the_format(text: str, style: Style, trace: Trace, problem: str) -> None:
    found = format_problem(text, style, trace)
    assert problem in found and bool(problem) == bool(found)
    assert FormatReward(style, trace)(ScoringRequest("", (text,)))[0].score == float(not problem)


def test_a_trace_that_the_prompt_opens_counts() -> None:
    """The chat templates of some reasoning models end with `<think>`."""
    rest = "it looks red</think><answer>red</answer>"
    assert FormatReward()(ScoringRequest("...<think>\n", (rest, GOOD)))[0].score == 1.0
    assert [v.score for v in FormatReward()(ScoringRequest("...<think>\n", (rest, GOOD)))] == [1.0, 0.0]
    newline = FormatReward(style="newline")
    opened = NEWLINES.removeprefix("<think>\n")
    assert newline(ScoringRequest("<think>\n", (opened,)))[0].score == 1.0
    assert newline(ScoringRequest("<think>", ("\n" + opened,)))[0].score == 1.0


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (GOOD, "<answer>red</answer>"),
        ("red", "red"),
        ("a <think>b</think> c <THINK>d</think>\ne", "a c e"),
        ("<answer>red</answer><think>never ends", "<answer>red</answer>"),
        ("opened by the prompt</think><answer>red</answer>", "<answer>red</answer>"),
    ],
)
def test_only_a_visible_trace_is_shown(text: str, hidden: str) -> None:
    assert shown(text, "visible") == text
    assert shown(text, "internal") == shown(text, "stripped") == hidden


WITHOUT_TAGS = st.text().filter(lambda text: text.strip() and "<" not in text)


@given(WITHOUT_TAGS, WITHOUT_TAGS)
def test_any_text_in_the_right_tags_has_the_format(think: str, answer: str) -> None:
    text = f"<think>{think}</think>\n<answer>{answer}</answer>"
    assert format_problem(text) == ""
    assert answer_text(text) == answer.strip()
    assert format_problem(text + "x") and format_problem(text + "</answer>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "red"),
        ("no thinking: <answer>red</answer> and more", "red"),
        ("<answer></answer>", ""),
        ("red", None),
        ("<answer>red", None),
        ("red</answer>", None),
        ("</answer>red<answer>", None),
        ("<answer>red</answer><answer>red</answer>", None),
        ("<answer>red</answer> or <answer>blue</answer>", None),
        ("<answer><answer>red</answer>", None),
        ("<answer>red</answer> blue</answer>", None),
    ],
)
def test_the_answer_is_what_stands_in_the_only_answer_tags(text: str, answer: str | None) -> None:
    assert answer_text(text) == answer


SHIPPED: list[RewardFunction] = [
    FormatReward(),
    FormatReward(style="lenient"),
    FormatReward(style="newline", trace="stripped"),
    AccuracyReward(),
    AccuracyReward(scope="completion"),
    AccuracyReward(tolerance=0.05, units="optional"),
    MultipleChoiceReward(),
    ExactMatchReward(),
    ContainsReward(scope="completion"),
    EditDistanceReward(),
    CountingReward(graded=True),
    GroundingReward("normalized", metric="boxes"),
    JsonSchemaReward(schema={"type": "integer"}),
    ToolCallReward(partial=True),
    LengthReward(maximum=20),
    RepetitionReward(),
    LanguageReward(language="en", letters=5),
]
MATHEMATICAL = st.text("0123456789xye+-*/^_=<>(){}[].,%$&! \\", max_size=20)


@pytest.mark.parametrize("reward", SHIPPED, ids=repr)
@given(
    bodies=st.lists(st.text(max_size=40) | MATHEMATICAL, min_size=1, max_size=4),
    gold=st.none() | st.text(max_size=20) | MATHEMATICAL,
    tagged=st.booleans(),
)
def test_contract_one_verdict_per_completion_for_any_text(
    reward: RewardFunction, bodies: list[str], gold: str | None, tagged: bool
) -> None:
    """A Verdict refuses NaN and statuses without reasons at construction, so that counting them is enough here."""
    completions = tuple(f"<think>a</think><answer>{body}</answer>" if tagged else body for body in bodies)
    first = reward(ScoringRequest("prompt", completions, answer=gold))
    assert len(first) == len(completions)
    assert all(v.status in ("scored", "unscorable") for v in first)
    assert list(reward(ScoringRequest("prompt", completions, answer=gold))) == list(first)
    assert [reward(ScoringRequest("prompt", (c,), answer=gold))[0] for c in completions] == list(first)


MANY = 20_000
BAD = {
    "empty": "",
    "white space": " \n" * MANY,
    "100k characters": "a" * 100_000,
    "100k words": "red " * 100_000,
    "lone surrogates": "<answer>\ud800\udfff</answer>",
    "replacement characters": "<think>\ufffd</think><answer>\ufffd\ufffd</answer>",
    "null bytes": "<answer>\x00</answer>",
    "nested tags": "<think>" * MANY + "</think>" * MANY + "<answer>7</answer>",
    "repeated tags": GOOD * MANY,
    "tags without end": "<answer>" * MANY,
    "tags without beginning": "</answer>" * MANY,
    "brackets": "<answer>" + "{" * MANY + "[" * MANY + "</answer>",
    "dollars and fences": "$" * MANY + "```" * MANY + "<tool_call>" * MANY,
    "fractions nested": "<answer>" + "\\frac{1}{" * 10_000 + "1" + "}" * 10_000 + "</answer>",
    "a tower of powers": "<answer>10^{10^{10}}</answer>",
    "a tower in prose": "so it is $10^{10^{10}}$",
    "a long number": f"<answer>{'9' * 100_000}</answer>",
    "letters and points": "<answer>" + "A. " * MANY + "</answer>",
}


@pytest.mark.parametrize("reward", SHIPPED, ids=repr)
@pytest.mark.parametrize("gold", ["3", None])
def test_bad_input_gets_a_verdict_with_a_reason(reward: RewardFunction, gold: str | None) -> None:
    """Every one of them at once, and none drags the others along."""
    verdicts = reward(ScoringRequest("what?", tuple(BAD.values()), answer=gold))
    assert len(verdicts) == len(BAD)
    for name, verdict in zip(BAD, verdicts, strict=True):
        assert verdict.score is not None or verdict.reason, name
        if isinstance(reward, AccuracyReward) and gold is not None:
            assert verdict.score == 0.0 and verdict.reason, name
        if gold is None and not isinstance(reward, FormatReward | LengthReward | RepetitionReward | LanguageReward):
            assert isinstance(reward, JsonSchemaReward) or verdict.status == "unscorable"


def test_word_answers_are_never_parsed_as_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's 512 completions cost milliseconds for that; the parser takes one for each."""
    words = ["red", "green", "blue", "circle", "square", "one", "2", "3", "four"]
    requests = [
        ScoringRequest(
            "", tuple(f"<think>{k}</think><answer>{words[(i + k) % 9]}</answer>" for k in range(8)), words[i % 9]
        )
        for i in range(64)
    ]
    reward = AccuracyReward()
    matches.cache_clear()
    monkeypatch.setattr(mathematics, "_parser", lambda: pytest.fail("parsed"))
    correct = sum(verdict.score or 0.0 for request in requests for verdict in reward(request))
    assert correct == 64.0

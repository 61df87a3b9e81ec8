"""Shipped rewards: what they give for which text, that they never raise, and that they cost little."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import AccuracyReward, matches, unwrap
from rewards.base import RewardFunction, ScoringRequest
from rewards.counting import CountingReward
from rewards.format import FormatReward, Style, Trace, answer_text, format_problem, shown
from rewards.grounding import GroundingReward
from rewards.json_schema import JsonSchemaReward
from rewards.language import LanguageReward
from rewards.length import LengthReward
from rewards.mathematics import is_mathematics, numbers_equal, value_of
from rewards.multiple_choice import MultipleChoiceReward
from rewards.quantities import Units
from rewards.repetition import RepetitionReward
from rewards.text import ContainsReward, EditDistanceReward, ExactMatchReward
from rewards.tool_call import ToolCallReward

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
        (GOOD, "strict", "stripped", "none is asked for"),
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


EQUAL = [
    # words: case, outer white space and a full stop do not count
    ("red", "red"),
    ("red", " Red."),
    ("two  red", "two red"),
    ("one", "ONE"),
    ("B", "b"),
    ("café", "cafe\u0301"),
    ("\\text{red}", "red"),
    ("½", "½"),
    ("12:30", "12:30"),
    ("3 cm", "3cm"),
    # numbers
    ("3", "3.0"),
    ("3", "+3."),
    ("3", "\\boxed{3}"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("1,000", "1000"),
    ("1e3", "1000"),
    ("-0.25", "-1/4"),
    ("50%", "0.5"),
    ("1/3", "0.333333"),
    ("3", "$3"),
    # LaTeX and symbols
    ("1/2", "\\frac{1}{2}"),
    ("\\frac12", "$0.5$"),
    ("\\(\\sqrt{2}\\)", "\\[2^{1/2}\\]"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    ("3", "x = 3"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&\\frac{4}{2}\\\\3&4\\end{pmatrix}"),
]
DIFFERENT = [
    ("red", "blue"),
    ("red", "der"),
    ("red", "red or blue"),
    ("red", "it is red"),
    ("one", "1"),
    ("3", "three"),
    ("3", ""),
    ("3", "4"),
    ("3", "3 or 4"),
    ("3", "3, 4"),
    ("3", "\\boxed{3} \\boxed{4}"),
    ("3", "the answer is 3"),
    ("3", "1 2 3"),
    ("A", "(A)"),
    ("1/3", "0.33"),
    ("\\frac{1}{2}", "\\frac{1}{2"),
    # math-verify would read a number out of each of these
    ("Paris 2024", "London 2024"),
    ("2024-01-02", "2021"),
    ("12:30", "2/5"),
    # units are neither dropped nor converted
    ("3 cm", "3 mm"),
    ("3 cm", "3"),
    ("3", "3 cm"),
    ("3 apples", "3 pears"),
    ("3\\text{ cm}", "3\\text{ mm}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers(gold: str, answer: str) -> None:
    assert matches(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(gold: str, answer: str) -> None:
    assert not matches(gold, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "((9!)!)!",
        "10^{100000000}",
        "((10^{900})^{900})^{900}",
        "2^{2^{100}}",
        "(" * 30 + "3" + ")" * 30,
        "\\frac{1}{" * 30 + "3" + "}" * 30,
        "\\int " * 8 + "x" + " dx" * 8,
        "(a+b+c+d+f)^{60}",
        "1" * 10_000,
        "+".join("1" * 120),
    ],
)
def test_an_answer_that_would_keep_sympy_busy_is_wrong_at_once(answer: str) -> None:
    """Its siblings in the group would otherwise share its time-out."""
    assert not matches("3", answer)
    assert not matches("x^2", answer)


@pytest.mark.parametrize(
    "word", ["red", "one", "two red", "A", "x", "pi", "yes", "circle", "in", "e", "12:30", "well-known"]
)
def test_words_are_no_mathematics(word: str) -> None:
    assert not is_mathematics(word)


@pytest.mark.parametrize("expression", ["3", "-3", "1/2", "0.5", "1,000", "x+1", "\\pi", "\\frac{1}{2}", "2x", "3 cm"])
def test_expressions_are_mathematics(expression: str) -> None:
    assert is_mathematics(expression)


def test_numbers_are_compared_exactly_or_left_to_math_verify() -> None:
    assert numbers_equal("0.1", "1/10") is True
    assert numbers_equal("3", "4") is False
    assert numbers_equal("1/3", "0.333333") is None  # rounding, perhaps
    assert numbers_equal("3", "x") is None
    assert numbers_equal("1/0", "1/0") is None


@given(st.integers(), st.integers())
def test_integers_match_only_themselves(a: int, b: int) -> None:
    assert matches(str(a), f" {a}.0 ")
    assert matches(str(a), f"{a:,}")
    assert matches(str(a), str(b)) == (a == b)


@given(st.text(max_size=30))
def test_an_answer_equals_itself_and_unwrapping_ends(text: str) -> None:
    assert unwrap(unwrap(text)) == unwrap(text)
    assert matches(text, f"  {text} ")


def test_what_math_verify_would_extract_is_why_words_do_not_reach_it() -> None:
    """If this fails, math-verify has changed, and the rules in rewards/mathematics.py want a fresh look."""
    from math_verify import parse, verify

    def loose(gold: str, answer: str) -> bool:
        return verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)

    assert loose("Paris 2024", "London 2024")
    assert loose("3 cm", "3 mm")


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "units", "equal"),
    [
        ("100", "105", 0.05, "exact", True),  # |105 - 100| = 5 <= 0.05 * 100
        ("100", "106", 0.05, "exact", False),
        ("100", "105", 0.0, "exact", False),
        ("-4", "-4.2", 0.05, "exact", True),  # 0.2 <= 0.05 * 4
        ("0", "0.001", 0.05, "exact", False),  # a share of nothing is nothing
        ("1/3", "0.33", 0.01, "exact", True),  # 0.00333 <= 0.01 * 0.33333
        ("1/3", "0.32", 0.01, "exact", False),  # 0.01333 > 0.00333
        ("\\sqrt{2}", "1.41", 0.01, "exact", True),  # 0.0042 <= 0.0141
        ("50%", "0.51", 0.05, "exact", True),
        ("3", "three", 0.05, "exact", False),
        ("3", "3 or 4", 0.9, "exact", False),
        ("x^2", "4", 0.5, "exact", False),
        ("3 cm", "30 mm", 0.0, "convert", True),
        ("3 cm", "30 mm", 0.0, "exact", False),
        ("3 cm", "3", 0.0, "convert", False),
        ("3 cm", "3", 0.0, "optional", True),
        ("3", "3 cm", 0.0, "optional", False),  # a unit that nobody asked for
        ("3 cm", "3 kg", 0.0, "optional", False),
        ("36 km/h", "10 m/s", 0.0, "convert", True),  # 36000 m / 3600 s
        ("20 °C", "293.15 K", 0.0, "convert", True),
        ("3\\text{ cm}", "$30\\,\\mathrm{mm}$", 0.0, "convert", True),
        ("100 m", "0.104 km", 0.05, "convert", True),  # 4 m <= 5 m
        ("100 m", "0.106 km", 0.05, "convert", False),
        ("3 apples", "3 apples", 0.0, "convert", True),  # no unit of physics: compared as text
        ("3 apples", "3 pears", 0.0, "convert", False),
        ("5 kg", "5 kg^99999999", 0.0, "convert", False),
    ],
)
def test_tolerance_and_units(gold: str, answer: str, tolerance: float, units: Units, equal: bool) -> None:
    assert matches(gold, answer, False, tolerance, units) == equal


def test_a_number_by_itself_has_a_value() -> None:
    assert value_of("\\frac{3}{4}") == value_of("75\\%") == 0.75
    assert value_of("x+1") is None and value_of("1, 2") is None and value_of("9^{9^{9^{9}}}") is None


def test_one_of_several_gold_forms_is_enough() -> None:
    completions = tuple(f"<answer>{a}</answer>" for a in ("50 cents", "0.5", "$\\frac12$", "5"))
    verdicts = AccuracyReward()(ScoringRequest("", completions, answer='["1/2", "50 cents"]'))
    assert [v.score for v in verdicts] == [1.0, 1.0, 1.0, 0.0]
    interval = AccuracyReward()(ScoringRequest("", ("<answer>[1, 2]</answer>",), answer="[1, 2]"))
    assert interval[0].score == 1.0  # numbers in brackets are mathematics, not forms
    assert AccuracyReward()(ScoringRequest("", ("a",), answer='["", " "]'))[0].status == "unscorable"


def test_accuracy_judges_each_completion() -> None:
    completions = (GOOD, GOOD.replace(">red", ">blue"), "red", GOOD + GOOD, "<think>a</think><answer>red")
    verdicts = AccuracyReward()(ScoringRequest("", completions, answer="red"))
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert "<answer>" in verdicts[2].reason and "expected" in verdicts[1].reason


def test_a_row_without_an_answer_cannot_be_scored() -> None:
    for gold in (None, "", "  "):
        verdicts = AccuracyReward()(ScoringRequest("", (GOOD, GOOD), answer=gold))
        assert [v.status for v in verdicts] == ["unscorable"] * 2


@pytest.mark.parametrize(
    ("gold", "completion", "score"),
    [
        ("3", "There are 4 circles, 1 hidden. The answer is 3.", 1.0),
        ("3", "First I saw 4, then $\\boxed{3}$", 1.0),
        ("3", "either $3$ or $4$", 0.0),
        ("3", "three", 0.0),
        ("red", " Red. ", 1.0),
        ("red", "It is red", 0.0),
    ],
)
def test_accuracy_of_the_whole_completion(gold: str, completion: str, score: float) -> None:
    request = ScoringRequest("", (completion,), answer=gold)
    assert AccuracyReward(scope="completion")(request)[0].score == score


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


def test_a_step_of_word_answers_costs_little() -> None:
    """512 completions, measured at under 30 ms; the limit here is generous for a busy machine."""
    words = ["red", "green", "blue", "circle", "square", "one", "2", "3", "four"]
    requests = [
        ScoringRequest(
            "", tuple(f"<think>{k}</think><answer>{words[(i + k) % 9]}</answer>" for k in range(8)), words[i % 9]
        )
        for i in range(64)
    ]
    reward = AccuracyReward()
    reward.warm_up()
    matches.cache_clear()
    start = time.perf_counter()
    correct = sum(verdict.score or 0.0 for request in requests for verdict in reward(request))
    assert time.perf_counter() - start < 1.0
    assert correct == 64.0

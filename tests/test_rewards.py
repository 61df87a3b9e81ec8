"""Shipped rewards: what they give for which text, that they never raise, and that they cost little."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import AccuracyReward, matches, unwrap
from rewards.base import RewardFunction, ScoringRequest
from rewards.format import FormatReward, answer_text, format_problem
from rewards.mathematics import is_mathematics, numbers_equal
from rewards.registry import REWARDS

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


@given(st.text().filter(str.strip), st.text().filter(str.strip))
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


SHIPPED: list[RewardFunction] = [factory() for factory in REWARDS.values()] + [AccuracyReward(scope="completion")]
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

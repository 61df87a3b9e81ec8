"""Accuracy: tables of gold and answer in the forms that data sets and models write, right ones and wrong ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answers import mathematics
from rewards.answers.golds import gold_forms
from rewards.answers.mathematics import is_mathematics, value_of
from rewards.answers.notation import plain
from rewards.answers.numbers import numbers_equal, read_number
from rewards.answers.quantities import Units
from rewards.answers.stated import gold_answers
from rewards.base import ScoringRequest
from rewards.functions.accuracy import AccuracyReward, matches
from rewards.functions.format import Scope

DATA = Path(__file__).parents[2] / "data"
GOOD = "<think>it looks red</think><answer>red</answer>"
TAGS = "<think>I look.</think><answer>{}</answer>"


def pairs(name: str) -> list[tuple[float, str, str]]:
    """Lines of the form `1 | gold | answer`; `\\n` and `\\u0301` stand for what they stand for in Python."""
    rows = []
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            score, gold, answer = line.split(" | ", 2) if line.count(" | ") > 1 else [*line.split(" | "), ""][:3]
            gold, answer = (_written(text.removesuffix(" |")) for text in (gold, answer))
            rows.append((float(score), gold, answer))
    return rows


def _written(text: str) -> str:
    if "\\u0301" in text:
        return text.replace("\\u0301", "\u0301")
    lines = text.split("\\n")
    return "\n".join(lines) if all(not line[:1].isalpha() for line in lines[1:]) else text


def score(gold: str, completion: str, scope: Scope = "answer", units: Units = "exact") -> float | None:
    return AccuracyReward(scope=scope, units=units)(ScoringRequest("", (completion,), gold))[0].score


@pytest.mark.parametrize(("expected", "gold", "answer"), pairs("accuracy_answers.txt"))
def test_answers(expected: float, gold: str, answer: str) -> None:
    assert score(gold, TAGS.format(answer)) == expected


@pytest.mark.parametrize(("expected", "gold", "answer"), pairs("quantities.txt"))
def test_quantities(expected: float, gold: str, answer: str) -> None:
    assert score(gold, TAGS.format(answer), units="convert") == expected


@pytest.mark.parametrize(("expected", "gold", "completion"), pairs("accuracy_completions.txt"))
def test_completions(expected: float, gold: str, completion: str) -> None:
    assert score(gold, completion, "completion") == expected


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "((9!)!)!",
        "10^{100000000}",
        "((10^{900})^{900})^{900}",
        "2^{2^{100}}",
        "(" * 30 + "3" + ")^1" * 30,
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


def test_numbers_by_hand() -> None:
    """Six digits behind the point, for small numbers six significant ones; whole numbers and fractions exactly."""
    for gold, answer, equal in [
        ("0.1", "1/10", True),
        ("1/3", "0.333333", True),  # off by 3.3e-7, less than half of 1e-6
        ("1/3", "0.33333", False),  # off by 3.3e-6
        ("1/30", "0.033333", False),  # off by 3.3e-7, more than half of 1e-7
        ("1/30", "0.0333333", True),
        ("1000000.1", "1000000.2", False),
        ("1000000", "1000001", False),
        ("1/3", "333333/1000000", False),  # fractions both: one is another number
    ]:
        target, value = read_number(gold), read_number(answer)
        assert target is not None and value is not None
        assert numbers_equal(target, value) == equal, (gold, answer)
    assert read_number("1/0") is read_number("x") is read_number("3 cm") is read_number("") is None


@given(st.integers(), st.integers())
def test_integers_match_only_themselves(a: int, b: int) -> None:
    assert matches(str(a), f" {a}.0 ")
    assert matches(str(a), f"{a:,}")
    assert matches(str(a), str(b)) == (a == b)


@given(st.text(max_size=30))
def test_an_answer_equals_itself(text: str) -> None:
    assert matches(text, f"  {text} ")
    assert plain(plain(text)) == plain(text)


def test_what_math_verify_would_extract_is_why_words_do_not_reach_it() -> None:
    """If this fails, math-verify has changed, and the rules in rewards/answers/reading.py want a fresh look."""
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
    assert matches(gold, answer, tolerance, units) == equal


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


LONG = 100_000
HEAVY = {
    "dollars": "$" * LONG,
    "dollars with blanks": "$ " * (LONG // 2),
    "boxes that do not end": "\\boxed{" * (LONG // 7),
    "boxes in a row": "\\boxed{4}, " * (LONG // 11),
    "boxes in boxes": "\\boxed{" * (LONG // 8) + "4" + "}" * (LONG // 8),
    "brackets": "(" * LONG,
    "braces": "{" * LONG + "}" * LONG,
    "closed before opened": "}" * LONG + "\\boxed{4}",
    "answers": "the answer is " * (LONG // 14),
    "answers and blanks": "answer" + " " * LONG + "is 4",
    "tags": "<answer>" * (LONG // 8),
    "hashes": "#" * LONG,
    "numbers": "4 or " * (LONG // 5),
    "one number": "4" * LONG,
    "signs": "-" * LONG,
    "backslashes": "\\" * LONG,
    "white space": " " * LONG + "4",
    "stars": "**" * (LONG // 2),
    "texts": "\\text{" * (LONG // 6),
}


@pytest.mark.parametrize("name", HEAVY)
def test_any_text_is_judged_in_linear_time(name: str) -> None:
    """A quadratic search takes minutes on these; the limit is a hundred times what they take."""
    gold, text = "3", HEAVY[name]
    start = time.process_time()
    assert score(gold, text, "completion") == 0.0
    assert score(gold, TAGS.format(text)) == 0.0
    assert score(text, "3", "completion") in (0.0, None)
    assert time.process_time() - start < 20


def test_only_bounded_text_reaches_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read, options = mathematics._parser()
    monkeypatch.setattr(
        mathematics, "_parser", lambda: (lambda text, **_: seen.append(text) or read(text, **_), options)
    )
    mathematics.parsed.cache_clear()
    for text in (*HEAVY.values(), "x+1 " * 50_000, "(x+1)", "$x+2$ " * 20_000):
        score("x+1", text, "completion")
        score("x+1", TAGS.format(text))
    assert seen, "the parser was asked"
    assert max(map(len, seen)) <= mathematics.MAX_CHARACTERS
    assert len(seen) < 200


@pytest.mark.parametrize(
    "solution",
    [
        "First we add 3 and 4, which makes $7$. Then we double it. That gives $14$ in the end.",
        "Let $x$ be the number of apples.\nThen $2x = 6$ and therefore $x = 3$ holds for every basket",
        "So \\boxed{3} is right for the first part of the question. For the second part we find $y = \\boxed{4}$.",
        "word " * 80,
    ],
)
def test_a_solution_without_one_answer_cannot_be_scored(solution: str) -> None:
    verdicts = AccuracyReward()(ScoringRequest("", (GOOD, TAGS.format("3")), answer=solution))
    assert [v.status for v in verdicts] == ["unscorable"] * 2
    assert "whole solution" in verdicts[0].reason


def test_the_ideal_completion_gets_full_marks() -> None:
    for gold in ("3", "\\frac{1}{2}", "red", "12:30", '["x", null]', "He buys 3*6=18 eggs.\n#### 18", "145°"):
        for scope in ("answer", "completion"):
            reward = AccuracyReward(scope=scope)
            ideal = reward.ideal(ScoringRequest("", (), gold))
            assert ideal is not None
            assert reward(ScoringRequest("", (ideal,), gold))[0].score == 1.0, (gold, scope)
    assert AccuracyReward().ideal(ScoringRequest("", (), None)) is None


@pytest.mark.parametrize(
    "wrapping", ["so \\boxed{%s}.", "<answer>%s</answer>", "I see. The answer is %s.", "x\n#### %s"]
)
def test_a_gold_answer_is_right_however_a_completion_marks_it(wrapping: str) -> None:
    said = {gold for _, gold, _ in pairs("accuracy_answers.txt") if gold_forms(gold) == (gold,) and "\n" not in gold}
    golds = {gold for gold in said if gold_answers(gold) == (gold,)}
    assert len(golds) > 80
    assert [gold for gold in sorted(golds) if score(gold, wrapping % gold, "completion") != 1.0] == []

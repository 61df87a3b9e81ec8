"""multiple_choice: what is read as a choice and what is not, in forms that models and public data sets write."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards.base import ScoringRequest
from rewards.functions.choices import read_choices
from rewards.functions.multiple_choice import MultipleChoiceReward, concluded, picked
from saccade.commands.rewards import _request
from tests.helpers.data_helpers import source, write_rows

QUESTION = "What is it?\nA. a cat\nB. a dog\n(C) Vitamin A\n"
CHOICES = {"A": "a cat", "B": "a dog", "C": "Vitamin A"}

BY_LETTER = [
    *("B", "b", "(B)", "(b)", "[B]", "B.", "B:", " **B** ", "`B`", "'B'", '"B"', "“B”", "Ｂ", "（B）", "B。", "<B>"),
    *("\\boxed{B}", "$B$", "$\\boxed{B}$", "\\text{B}", "\\boxed{\\text{B}}", "\\(B\\)", "\\mathrm{B}"),
    *("<option>B</option>", "<b>B</b>", "B) a dog", "B. a dog", "(B) a dog", "b) a dog", "b. a dog", "(b) a dog"),
    *("**B. a dog**", "\\boxed{B. a dog}", "B: because it barks", "B, because it barks", "B because it barks"),
    *("B - a dog", "B – it barks", "B (a dog)", "B) barks, hence a dog", "B is correct", "B is the right answer"),
    *("option B", "Option (B): a dog", "option B is correct", "The answer is B", "the answer is b", "answer: (B)"),
    *("**Answer:** B", "Answer: b)", "Answer - B", "Answer:\nB", "The answer is\n\n**B**", "The answer is B!"),
    *(
        "The answer is (B) a dog",
        "The answer is B. a dog",
        "The correct answer is option B",
        "My final answer is **B**",
    ),
    *("The correct option is: B", "The right choice must be B", "So the answer is \\(B\\).", "I choose B", "It's B"),
    *("I would pick (B)", "I'd go with B.", "答案是B", "答案：B", "选B"),
]
BY_TEXT = ["a dog", "A dog.", "**a dog**", "\\boxed{\\text{a dog}}", "B a dog", "the answer is a dog"]
NONE = [
    *(
        "",
        "A or B",
        "B, C",
        "A B",
        "BA",
        "ABC",
        "B/C",
        "B|C",
        "A & B",
        "A and B",
        "B+C",
        "Either A or B",
        "Both B and C",
    ),
    *("The answer is A, B, C or D", "The answer is C or D", "answer: C, D", "the answer is C (or maybe D)"),
    *(
        "answer is A/B/C/D",
        "a or b",
        "(a) or (b)",
        "the answer is b or c",
        "the answer is b, c",
        "B) or C)",
        "B. or C.",
    ),
    *("B, maybe C", "B. Maybe C", "not A but B", "\\boxed{B or C}", "\\boxed{A} \\boxed{B}", "B. No, the answer is C"),
    *("The answer is B. The answer is C", "A dog barks", "Answer: A dog or a cat", "I think it is a bird", "1", "dog"),
    *("All of them", "none", "The answer is unclear", "Answer:", "option", "I", "?"),
]


@pytest.mark.parametrize("answer", [*BY_LETTER, *BY_TEXT])
def test_a_choice_is_read(answer: str) -> None:
    assert picked(answer, CHOICES) == "B"
    assert picked(answer, {}) == ("B" if answer in BY_LETTER else None)


@pytest.mark.parametrize("answer", NONE)
def test_what_names_no_single_choice_picks_none(answer: str) -> None:
    assert picked(answer, CHOICES) is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("C. Vitamin A", "C"),  # the letter in its own text is none
        ("C) Vitamin A, which is good for the eyes", "C"),
        ("B) a cat", None),  # the letter of one, the text of another
        ("D", None),
        ("B, not Vitamin A", "B"),
        ("Vitamin A", "C"),
    ],
)
def test_letters_in_names_are_no_choices(answer: str, choice: str | None) -> None:
    assert picked(answer, CHOICES) == choice


LISTS = {
    "pets": {"A": "a cat", "B": "a dog", "C": "Vitamin A", "D": "12 cm"},
    "numbers": {"A": "3", "B": "4", "C": "5", "D": "6"},
    "angles": {"A": "36°", "B": "72°", "C": "100°", "D": "108°"},
    "yes_no": {"A": "Yes", "B": "No"},
    "sentences": {
        "A": "The dog is to the left of the cat.",
        "B": "The cat is to the left of the dog.",
        "C": "Both A and B",
        "D": "None of the above",
    },
}


def test_every_answer_of_the_table_picks_what_it_picks() -> None:
    """Forms in which public models write their last lines, and those that hedge or deny."""
    lines = (Path(__file__).parents[2] / "data" / "multiple_choice.txt").read_text(encoding="utf-8").splitlines()[1:]
    read, choices, wrong, count = picked, LISTS["pets"], [], 0
    for line in lines:
        if line.startswith("["):
            name, function = line[1:].split("] ")
            choices, read = LISTS[name], concluded if function == "concluded" else picked
            continue
        expected, answer = line.split(" | ", 1)
        found = read(re.sub(r"\\n(?!eq)", "\n", answer), choices) or "-"
        count += 1
        if found != expected:
            wrong.append(f"{answer}: {found}, not {expected}")
    assert not wrong, "\n".join(wrong)
    assert count > 200


def test_letters_win_over_texts_that_are_letters() -> None:
    choices = read_choices(["B", "C", "A", "D"], "")
    answers = ["A", "(A)", "the answer is A", "A. B", "C", "(C)", "C) A", "A. C"]
    assert [picked(answer, choices) for answer in answers] == ["A", "A", "A", "A", "C", "C", "C", None]
    assert picked("X", {"A": "X", "B": "Y"}) == "A", "no choice has that letter"


@pytest.mark.parametrize(
    ("column", "question", "found"),
    [
        (None, QUESTION, CHOICES),
        (["cat", "dog"], QUESTION, {"A": "cat", "B": "dog"}),
        (["cat", "dog", None], "", {"A": "cat", "B": "dog"}),  # nulls are what Parquet fills in
        ({"A": "cat", "b": "dog", "C": None}, "", {"A": "cat", "B": "dog"}),
        (["cat", "dog", float("nan")], "", {"A": "cat", "B": "dog"}),
        ('["cat", "dog"]', "", {"A": "cat", "B": "dog"}),
        ("['cat', \"dog's\"]", "", {"A": "cat", "B": "dog's"}),  # MMMU writes lists as Python does
        ("[" * 5000, "", {}),
        (None, "How wide? Choices: A:36° B:72° C:100°", {"A": "36°", "B": "72°", "C": "100°"}),
        (None, "Which? (A) cat (B) dog, (C) bird\nHint: say the letter.", {"A": "cat", "B": "dog", "C": "bird"}),
        (None, "Which?\nA) 3\nB) 4\n\nWhich?\nA) 5\nB) 6\n", {"A": "5", "B": "6"}),  # an example came before
        (None, "Say A or B.", {}),
    ],
)
def test_choices_come_from_the_row(column: Any, question: str, found: dict[str, str]) -> None:
    assert read_choices(column, question) == found


@pytest.mark.parametrize(
    ("completion", "choice"),
    [
        ("A is a cat, and it is none.\n\n**Answer:** B", "B"),
        ("First A looks right.\nThen C.\nSo \\boxed{B}, not C.", "B"),
        ("\\boxed{A}? No. \\boxed{\\text{B}}", "B"),
        ("<think>A or C?</think><answer>B</answer>", "B"),
        ("A cat meows; this barks. The answer is B.\n\nGood luck with the rest!", "B"),
        ("It is A. Wait, it barks.\nThe answer is B or C", None),
        ("It barks, and cats do not.", None),
        ("B", "B"),
    ],
)
def test_a_whole_completion_is_judged_by_what_it_ends_on(completion: str, choice: str | None) -> None:
    assert concluded(completion, CHOICES) == choice


def scored(gold: str | None, answer: str, **request: Any) -> float | str:
    reward = MultipleChoiceReward(choices="options" if "columns" in request else None)
    verdict = reward(ScoringRequest("", (f"<answer>{answer}</answer>",), gold, **request))[0]
    return verdict.status if verdict.score is None else verdict.score


def test_golds_are_letters_or_texts_and_the_prompt_as_rendered_is_not_read() -> None:
    for gold in ("B", "(B)", "a dog", "A dog", "B. a dog", "\\boxed{B}", '["B", null]'):
        assert scored(gold, "B", user_text=QUESTION) == 1.0
        assert scored(gold, "A", user_text=QUESTION) == 0.0
    rendered = "<|im_start|>user\nWhich?\nA. cat\nB. dog<|im_end|>\n"
    request = ScoringRequest(rendered, ("<answer>dog</answer>",), "dog", user_text="Which?\nA. cat\nB. dog")
    assert MultipleChoiceReward()(request)[0].score == 1.0
    for no_gold in ("E", "a cow", "A or B", None, "", "[null]"):
        assert scored(no_gold, "B", user_text=QUESTION) == "unscorable"
    assert scored("B", "same", columns={"options": ["same", "same"]}) == 0.0
    assert scored("B", "B") == 1.0, "letters do without known choices"


TEXTS = ["cat", "dog", "cow", "hen"]
NUMBERS = ["4", "2", "0", "1"]


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        (1, TEXTS, "B"),
        (0, TEXTS, "A"),
        (3.0, TEXTS, "D"),
        ("1", TEXTS, "B"),
        (1, {"A": "cat", "B": "dog"}, "B"),
        (1, {"label": ["A", "B"], "text": ["cat", "dog"]}, "B"),
        ("B", TEXTS, "B"),
        ("hen", TEXTS, "D"),
        ("1", NUMBERS, "D"),  # a text is what it says
        (4, NUMBERS, "A"),  # counts none of them
        (1, ["0", "1", "2", "3"], "B"),  # both are the same
        (["0", "C"], TEXTS, "C"),  # a number among forms is a form
        (4, TEXTS, "is not one of its 4 choices and not an index from 0; it must be a letter or a text"),
        (-1, TEXTS, "is not one of its choices; it must be a letter (A, B, C, D) or the text of a choice"),
        (1, ["cat", None, "cow"], "is not one of its 2 choices and not an index from 0"),
        (1, {"1": "cat", "2": "dog"}, "is not one of its 2 choices and not an index from 0"),
        (1, NUMBERS, "could be the text of choice D or, counted from 0, choice B; make it a letter, or a text"),
        (
            3,
            ["10 cm", "3 cm", "5 cm", "7 cm"],
            "could be the number in choice B or, counted from 0, choice D; it must be a",
        ),
        ("2", ["Figure 1", "Figure 2", "Figure 3"], "could be the number in choice B or, counted from 0, choice C"),
        (1, ["0 cm", "1 cm"], "B"),  # both are the same
        (1, ["2 or 1", "12 cm", "1.5 cm", "1 is what most of them say"], "B"),
        (1, None, "is a number, but the choices are not known; name their column (option `choices`)"),
        ("E", TEXTS, "is not one of its choices; it must be a letter (A, B, C, D) or the text of a choice"),
    ],
)
def test_a_number_counts_the_choices_from_0_where_it_can_mean_nothing_else(
    tmp_path: Path, answer: Any, options: Any, letter: str
) -> None:
    row = {"prompt": "Which?", "answer": answer, "options": options}
    data = source(write_rows(tmp_path / "a.jsonl", [row]), options={"extra_columns": ("options",)})
    prompt = data.attempt(0)
    assert prompt is not None
    of_run = ScoringRequest.of_row(prompt)
    of_file = _request(json.dumps({"completion": "", **row}).encode())
    for request in (of_run, of_file):
        reward = MultipleChoiceReward(choices="options")
        completions = tuple(f"<answer>{a}</answer>" for a in "ABCD")
        verdicts = reward(replace(request, completions=completions))
        if len(letter) > 1:
            assert {v.status for v in verdicts} == {"unscorable"} and letter in verdicts[0].reason
            assert verdicts[0].reason.startswith("the row's answer ") and len(verdicts[0].reason) < 160
            assert reward.ideal(request) is None
        else:
            assert [v.score for v in verdicts] == [float(a == letter) for a in "ABCD"]
            assert reward(replace(request, completions=(reward.ideal(request) or "",)))[0].score == 1.0


def test_rewards_score_reads_the_users_words_and_has_raw_completions() -> None:
    messages = [{"role": "system", "content": "A. no\nB. no"}, {"role": "user", "content": QUESTION}]
    request = _request(json.dumps({"completion": "Bé", "prompt": messages, "finish_reason": "length"}).encode())
    assert request.user_text == QUESTION
    assert [(c.text, c.finish_reason, c.num_tokens) for c in request.raw] == [("Bé", "length", 3)]
    assert _request(b'{"completion": "B"}').raw[0].finish_reason == "stop"


@pytest.mark.parametrize("unit", ["A. ", "answer ", "(a", "the answer is A ", "\\boxed{", "or a ", "$", "B Vitamin "])
def test_hostile_text_ends_quickly(unit: str) -> None:
    """A minute's limit of the test suite would pass if the time grew with the square: 100,000 repetitions."""
    assert concluded(unit * 100_000, CHOICES) in (None, "A")
    assert len(read_choices(None, unit * 100_000)) < 26


def test_labels_beside_texts_are_choices() -> None:
    """As in ARC, CommonsenseQA and OpenBookQA."""
    choices = {"label": ["A", "B"], "text": ["red", "blue"]}
    for gold in ("B", "blue"):
        request = ScoringRequest("", ("<answer>B</answer>", "<answer>A</answer>"), gold, {"choices": choices})
        assert [v.score for v in MultipleChoiceReward(choices="choices")(request)] == [1.0, 0.0]

"""Texts on which a search that is not linear takes minutes, and a program that shows them to every shipped reward.

Run as a program it prints the name of what it is about to do, line by line, so that whoever stops it knows what took
too long.
"""

from __future__ import annotations

import json
import sys

from rewards.base import RewardFunction, ScoringRequest
from rewards.functions.accuracy import AccuracyReward
from rewards.functions.code_tests import program_of
from rewards.functions.counting import CountingReward
from rewards.functions.format import FormatReward, shown
from rewards.functions.grounding import GroundingReward
from rewards.functions.json_schema import JsonSchemaReward
from rewards.functions.language import LanguageReward
from rewards.functions.length import LengthReward
from rewards.functions.multiple_choice import MultipleChoiceReward
from rewards.functions.repetition import RepetitionReward
from rewards.functions.text import ContainsReward, EditDistanceReward, ExactMatchReward
from rewards.functions.tool_call import ToolCallReward

LENGTH = 64_000
UNITS = [
    *("a", "aa ", " ", "\n", "\t \n", "é", "e\u0301", "红", "\u200b", "\ud800", "ﷺ", "①", "²"),
    *(
        "½",
        "٣",
        "'",
        '"',
        "“",
    ),
    *(
        "$",
        "$ ",
        "$$",
        "\\(",
        "\\[",
        "\\",
        "\\\\",
        "{",
        "}",
        "{}",
        "(",
        ")",
        "()",
        "[",
        "]",
        "[]",
        "<",
        ">",
        "|",
        "`",
        "```",
    ),
    *(
        "**",
        "* ",
        "_",
        "__",
        "^",
        "~",
        "#",
        "####",
        "####\n",
        "%",
        "°",
        "&",
        "=",
        "<=",
        "+",
        "-",
        "- ",
        "/",
        ":",
        "::",
        ";",
    ),
    *(".", ". ", "..", ",", ", ", "!", "?", "1", "1 ", "1,", "1, ", "1.", "1:", "1/", "1-"),
    *(
        "1+",
        "1e",
        "1%",
        "1 2/3 ",
    ),
    *("1,000", "1\\,000", "1 or ", "1 and ", "1 to ", "of 1 ", "not ", "than ", "n't think ", "is wrong "),
    *(
        "\\boxed{",
        "\\boxed{1}",
        "\\boxed{1}, ",
        "\\boxed",
        "\\fbox{a} ",
        "\\text{",
        "\\text{a}",
        "\\frac",
        "\\frac{1}{",
    ),
    *(
        "\\sqrt",
        "√(",
        "sqrt(",
        "x^",
        "x_{",
        "\\left(",
        "\\begin{pmatrix}",
        "\\overline{",
        "\\pm ",
        "\\cup ",
        "\\in ",
        "x = ",
    ),
    *("answer is ", "the answer is 1. ", "Answer: ", "answer:\n", "**Answer**: ", "answer" + " " * 50, "Dr. "),
    *("<think>", "</think>", "<answer>", "</answer>", "<think></think>", "<answer></answer>", "<answer>1</answer>"),
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool_call>{}</tool_call>",
        '{"a":',
        '{"score": 1',
        '["',
        "[1,",
        "[[1,2,3,4],",
        '"\\',
    ),
    *("A", "A ", "A. ", "(A) ", "(a", "A or ", "A/", "B is ", "option ", "so A ", "yes, ", "it's ", "Vitamin A "),
    *(
        "three ",
        "twenty-",
        "hundred and ",
        "12:30 ",
        "3 cm ",
        "3 cm^2 ",
        "kg m/s ",
        "5 ft ",
        "$5 ",
        "5 million ",
        "H2O",
    ),
    *(
        "```python\n",
        "~~~",
        "``` ",
        "def f():\n",
        "\\begin{",
        "x\\\\",
        "\r\n",
        "<b>",
        "</",
        "&amp;",
        "http://a.b/",
        "🏳️‍🌈",
    ),
]
GOLDS = ["3", "x+1", "red", "B", "3 cm", "1, 2", "[0, 0, 1, 1]", "12:30", '["a", null]']


def rewards() -> list[RewardFunction]:
    """Every shipped reward that needs no model and no sandbox, as it looks at an answer and at a whole completion."""
    return [
        FormatReward(),
        FormatReward(style="lenient"),
        FormatReward(style="newline", trace="stripped"),
        AccuracyReward(),
        AccuracyReward(scope="completion"),
        AccuracyReward(tolerance=0.05, units="optional"),
        MultipleChoiceReward(),
        MultipleChoiceReward(scope="completion"),
        ExactMatchReward(),
        ContainsReward(scope="completion", max_words=10),
        ContainsReward(scope="completion"),
        EditDistanceReward(scope="completion"),
        CountingReward(graded=True, nouns=("dogs",)),
        CountingReward(scope="completion"),
        GroundingReward("normalized", metric="boxes"),
        JsonSchemaReward(schema={"type": "object"}, scope="completion"),
        ToolCallReward(partial=True),
        LengthReward(maximum=20),
        RepetitionReward(),
        LanguageReward(language="en", letters=5, think=True),
    ]


def texts() -> dict[str, str]:
    found = {}
    for unit in UNITS:
        body = (unit * (LENGTH // len(unit) + 1))[:LENGTH]
        found[f"{unit!r} over and over"] = body
        found[f"{unit!r} over and over in tags"] = f"<think>a</think><answer>{body}</answer>"
    return found


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(step: int) -> None:
    question = "Which?\nA. red\nB. a dog"
    tool = json.dumps({"name": "f", "arguments": {}})
    for number, (name, text) in enumerate(texts().items()):
        for reward in rewards()[number % step :: step]:
            gold = tool if isinstance(reward, ToolCallReward) else GOLDS[number % len(GOLDS)]
            say(f"{type(reward).__name__} on {name}")
            verdicts = reward(ScoringRequest("what?", (text,), gold, user_text=question))
            assert [v.status in ("scored", "unscorable") for v in verdicts] == [True], verdicts
        say(f"program_of and shown on {name}")
        program_of(text)
        shown(text, "stripped")
    say("done")


if __name__ == "__main__":
    main(int(sys.argv[1]))

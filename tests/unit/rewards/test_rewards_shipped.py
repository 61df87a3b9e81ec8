"""Shipped rewards beside format and accuracy: what each gives for which answer, with the numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import RewardFunction, ScoringRequest
from rewards.config import RewardSpec
from rewards.functions.boxes import Box, LabelledBox, giou, iou, mean_f1, write_boxes
from rewards.functions.grounding import GroundingReward
from rewards.functions.json_schema import JsonSchemaReward
from rewards.functions.language import LanguageReward
from rewards.functions.length import LengthReward
from rewards.functions.repetition import RepetitionReward
from rewards.functions.text import EditDistanceReward, edit_distance
from rewards.functions.tool_call import ToolCallReward
from rewards.registry import check_rewards
from vlm.media.types import Media


def score(reward: RewardFunction, answer: str, gold: Any = None, **request: Any) -> float | str:
    """What one answer in its tags earns, or the status of what is not scored."""
    verdict = reward(ScoringRequest(request.pop("prompt", ""), (f"<answer>{answer}</answer>",), gold, **request))[0]
    return verdict.status if verdict.score is None else verdict.score


# --- texts ------------------------------------------------------------------------------------------------------------


def test_edit_distance_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3  # k->s, e->i, +g
    assert edit_distance("flaw", "lawn") == 2  # -f, +n
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert score(EditDistanceReward(), "x" * 20_001, "x") == 0.0


@given(st.text("abc", max_size=12), st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == _recursive(a, b)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def _recursive(a: str, b: str) -> int:
    """The definition, by rows of a plain list."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


# --- grounding --------------------------------------------------------------------------------------------------------

LEFT, RIGHT, SHIFTED = (0.0, 0.0, 0.4, 0.5), (0.6, 0.0, 1.0, 0.5), (0.2, 0.0, 0.6, 0.5)


def test_overlaps_by_hand() -> None:
    # LEFT and SHIFTED: each 0.4 x 0.5 = 0.20; common 0.2 x 0.5 = 0.10; union 0.30; hull 0.6 x 0.5 = 0.30
    assert iou(LEFT, SHIFTED) == pytest.approx(0.10 / 0.30)
    assert giou(LEFT, SHIFTED) == pytest.approx(1 / 3)
    # LEFT and RIGHT: nothing in common; union 0.40, hull 1.0 x 0.5 = 0.50
    assert iou(LEFT, RIGHT) == 0.0
    assert giou(LEFT, RIGHT) == pytest.approx(-(0.50 - 0.40) / 0.50)
    assert iou((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1)) == 0.0, "a point has no area"


def boxes() -> st.SearchStrategy[Box]:
    corner = st.floats(0, 1)
    return st.tuples(corner, corner, corner, corner).map(
        lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
    )


@given(boxes(), boxes())
def test_overlaps_are_symmetric_and_bounded(a: Box, b: Box) -> None:
    assert iou(a, b) == pytest.approx(iou(b, a)) and giou(a, b) == pytest.approx(giou(b, a))
    assert -1 <= giou(a, b) <= iou(a, b) + 1e-9 <= 1 + 1e-8


def test_several_boxes_by_hand() -> None:
    gold = [LabelledBox(LEFT), LabelledBox(RIGHT)]
    assert mean_f1(gold, gold) == mean_f1(gold, gold[::-1]) == 1.0
    assert mean_f1(gold, [LabelledBox(LEFT)]) == pytest.approx(2 / 3)  # 2 * 1 / (2 + 1), at every threshold
    assert mean_f1(gold, [*gold, LabelledBox(SHIFTED)]) == pytest.approx(4 / 5)  # a box too many costs
    assert mean_f1(gold, [LabelledBox(LEFT), LabelledBox(LEFT)]) == pytest.approx(2 / 4)  # no gold box is matched twice
    # (0, 0, 0.4, 0.38) in LEFT: 0.152 / 0.2 = 0.76, which passes 0.50, 0.55, ..., 0.75: 6 of 10 thresholds
    assert mean_f1([LabelledBox(LEFT)], [LabelledBox((0.0, 0.0, 0.4, 0.38))]) == pytest.approx(0.6)
    labelled = [LabelledBox(LEFT, "cat"), LabelledBox(RIGHT, "dog")]
    assert mean_f1(labelled, [LabelledBox(LEFT, "cat"), LabelledBox(RIGHT, "cat")]) == pytest.approx(2 / 4)
    assert mean_f1([], []) == 1.0 and mean_f1([], [LabelledBox(LEFT)]) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[0, 0, 0.4, 0.5]", 1.0),
        ("[[0, 0, 0.4, 0.5]]", 1.0),
        ('{"bbox_2d": [0, 0, 0.4, 0.5], "label": "cat"}', 1.0),
        ('```json\n[{"bbox_2d": [0, 0, 0.4, 0.5]}]\n```', 1.0),
        ("[0.2, 0, 0.6, 0.5]", 1 / 3),
        ("[0.4, 0.5, 0, 0]", 0.0),  # corners the wrong way round
        ("[0, 0, 40, 50]", 0.0),  # other coordinates than stated
        ("[-1, 0, 0.4, 0.5]", 0.0),
        ("[0, 0, 0.4]", 0.0),
        ("[0, 0, 0.4, NaN]", 0.0),
        ("[0, 0, 0.4, Infinity]", 0.0),
        ("[[0, 0, 0.4, 0.5], [0, 0, 0.4, 0.5]]", 0.0),
        ("[true, 0, 0.4, 0.5]", 0.0),
        ('{"bbox": [true, 0, 0.4, 0.5]}', 0.0),
        ('{"bbox": "0011"}', 0.0),
        (f"[0, 0, 0, {'9' * 400}]", 0.0),
        ("[0, 0, 0.4, null]", 0.0),
        ('{"bbox_2d": [0, 0, 0.4, 0.5], "label": null, "point_2d": null}', 1.0),
        ("0, 0, 0.4, 0.5", 0.0),
        ("the box is [0, 0, 0.4, 0.5]", 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_boxes_are_read_or_wrong(answer: str, expected: float) -> None:
    reward = GroundingReward("normalized")
    assert score(reward, answer, "[0, 0, 0.4, 0.5]") == pytest.approx(expected)


def test_a_gold_box_of_a_table_has_the_nulls_of_other_rows() -> None:
    box = {"bbox_2d": [0.0, 0.0, 0.4, 0.5], "label": "cat", "point_2d": None}
    blank = {"bbox_2d": None, "label": None, "point_2d": float("nan")}
    reward = GroundingReward("normalized", metric="boxes", column="boxes")
    answer = ('<answer>[{"bbox_2d": [0, 0, 0.4, 0.5], "label": "cat"}]</answer>',)
    assert reward(ScoringRequest("", answer, columns={"boxes": [box, blank, None]}))[0].score == 1.0
    for nothing in ([blank], [None], blank):
        assert reward(ScoringRequest("", answer, columns={"boxes": nothing}))[0].status == "unscorable"


def test_metrics_and_coordinates_of_grounding() -> None:
    image = (Media("image", "0" * 64, b"", width=200, height=100),)
    gold = "[0, 0, 0.4, 0.5]"  # in pixels: 0, 0, 80, 50
    in_pixels = GroundingReward("absolute", gold_coordinates="normalized")
    assert score(in_pixels, "[0, 0, 80, 50]", gold, media=image) == 1.0
    assert score(in_pixels, "[40, 0, 120, 50]", gold, media=image) == pytest.approx(1 / 3)
    assert score(in_pixels, "[0, 0, 80, 50]", gold) == "unscorable", "the image's size is not known"
    assert score(GroundingReward("thousandths", gold_coordinates="normalized"), "[0, 0, 400, 500]", gold) == 1.0
    assert score(GroundingReward("normalized", threshold=0.33), "[0.2, 0, 0.6, 0.5]", gold) == 1.0
    assert score(GroundingReward("normalized", threshold=0.34), "[0.2, 0, 0.6, 0.5]", gold) == 0.0
    exact = GroundingReward("thousandths", gold_coordinates="normalized", threshold=1.0)
    box = (0.1091, 0.5474, 0.5513, 0.7066)  # rounded on the way to thousandths and back: IoU 1 - 4e-16
    assert score(exact, write_boxes([LabelledBox(box)], "thousandths", None), str(list(box))) == 1.0
    assert score(GroundingReward("normalized", metric="giou"), "[0.6, 0, 1, 0.5]", gold) == pytest.approx(0.4)
    pointing = GroundingReward("normalized", metric="point")
    assert score(pointing, "[0.4, 0.5]", gold) == 1.0 and score(pointing, "[0.41, 0.5]", gold) == 0.0
    assert score(pointing, '{"point_2d": [0.1, 0.1]}', gold) == 1.0
    assert score(pointing, "[0, 0, 1, 1]", gold) == 0.0, "the middle (0.5, 0.5) lies outside"
    several = GroundingReward("normalized", metric="boxes", column="objects")
    rows = {"objects": [list(LEFT), list(RIGHT)]}
    assert score(several, json.dumps([list(RIGHT)]), columns=rows) == pytest.approx(2 / 3)
    for broken in ("nothing", "[0, 0, 9, 9]", None):
        assert score(GroundingReward("normalized"), "[0, 0, 1, 1]", broken) == "unscorable"


# --- JSON and tools ---------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"n": 1}', 1.0),
        ('```json\n{"n": 1}\n```', 1.0),
        ('{"n": 0}', 0.0),
        ('{"n": 1, "n": 2}', 0.0),
        ('{"n": NaN}', 0.0),
        ('{"n": 1e999}', 0.0),
        ('{"n": 1} {"n": 2}', 0.0),
        ("n = 1", 0.0),
        ("", 0.0),
        ('{"n": ' + "9" * 10_000 + "}", 0.0),
        ("[" * 50_000 + "]" * 50_000, 0.0),
    ],
)
def test_json_by_schema(answer: str, expected: float) -> None:
    assert score(JsonSchemaReward(schema=SCHEMA), answer) == expected


def test_a_schema_by_row_and_what_it_refers_to() -> None:
    by_row = JsonSchemaReward(column="schema")
    assert score(by_row, '{"n": 1}', columns={"schema": json.dumps(SCHEMA)}) == 1.0
    assert score(by_row, '{"n": 1}', columns={"schema": {"type": "nonsense"}}) == "unscorable"
    assert score(by_row, '{"n": 1}') == "unscorable"
    elsewhere = JsonSchemaReward(schema={"$ref": "http://127.0.0.1:9/never-fetched.json"})
    with pytest.raises(Exception, match="never-fetched"):
        score(elsewhere, "1")


TOOLS = [{"name": "find", "parameters": {"type": "object", "required": ["what"]}}]


def called(*calls: Any) -> str:
    return " ".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)


def test_tool_calls() -> None:
    cat, dog = ({"name": "find", "arguments": {"what": what}} for what in ("cat", "dog"))
    gold = json.dumps([cat, dog])
    assert score(ToolCallReward(TOOLS), called(dog, cat), gold) == 1.0
    assert score(ToolCallReward(), called(cat), json.dumps(cat)) == 1.0
    assert score(ToolCallReward(), called(cat), gold) == score(ToolCallReward(), called(cat, dog, dog), gold) == 0.0
    assert score(ToolCallReward(partial=True), called(cat), gold) == pytest.approx(2 / 3)  # 2 * 1 / (2 + 1)
    assert score(ToolCallReward(), "no tool needed", "[]") == 1.0
    assert score(ToolCallReward(partial=True), "no tool needed", gold) == 0.0
    for broken in ("<tool_call>{}", "<tool_call>find</tool_call>", '<tool_call>{"name": 3}</tool_call>'):
        assert score(ToolCallReward(), called(cat, dog) + broken, gold) == 0.0
    undeclared = {"name": "find", "arguments": {}}
    assert score(ToolCallReward(TOOLS), called(undeclared), json.dumps(undeclared)) == 0.0
    assert score(ToolCallReward(TOOLS), called({"name": "lose"}), json.dumps({"name": "lose"})) == 0.0


# --- length, repetition, language -------------------------------------------------------------------------------------


def test_length_by_hand() -> None:
    reward = LengthReward(maximum=100, minimum=10, slack=50)
    lengths = (0, 5, 10, 100, 110, 150, 1000)
    verdicts = reward(ScoringRequest("", ("",) * 7, lengths=lengths))
    assert [v.score for v in verdicts] == [0.0, 0.5, 1.0, 1.0, 0.8, 0.0, 0.0]
    assert LengthReward(maximum=2)(ScoringRequest("", ("a b", "a b c")))[1].reason == "3 words, more than 2"
    assert [v.score for v in LengthReward(maximum=2, unit="characters")(ScoringRequest("", ("ab", "abc")))] == [1, 0]


def test_repetition_by_hand() -> None:
    verdicts = RepetitionReward(n=3)(ScoringRequest("", ("a b c d e f", "a b a b a b", "a b", "", "ab" * 100)))
    # a b a b a b: aba bab aba bab, 2 of 4; "abab...": 198 runs of three characters, of which aba and bab are distinct
    assert [v.score for v in verdicts] == [1.0, 0.5, 1.0, 1.0, pytest.approx(2 / 198)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red circle is to the left of the blue square.", "en"),
        ("Der rote Kreis befindet sich links vom blauen Quadrat.", "de"),
        ("红色的圆形在蓝色正方形的左边，所以答案是左边", "zh"),
        (
            "<think>I see that the red circle is on the left of $x^2 + y^2$</think> ```print('hallo')```",
            "en",
        ),
    ],
)
def test_languages(text: str, expected: str) -> None:
    for language in ("en", "de", "zh"):
        verdict = LanguageReward(language=language)(ScoringRequest("", (text,)))[0]
        assert verdict.score == float(language == expected)


def test_language_of_trace_and_answer_and_of_too_little() -> None:
    mixed = "<think>Der rote Kreis liegt ganz weit links vom blauen Quadrat.</think> The answer must be the red circle."
    request = ScoringRequest("", (mixed, "red", "12345"), columns={"language": "en"})
    verdicts = LanguageReward(column="language", think=True)(request)
    assert [v.status for v in verdicts] == ["scored", "unscorable", "unscorable"]
    assert verdicts[0].score == 0.0 and "de" in verdicts[0].reason
    assert LanguageReward(column="language")(ScoringRequest("", (mixed,)))[0].status == "unscorable"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("format", {"style": "loose"}, "style must be 'strict', 'lenient' or 'newline', not 'loose'"),
        ("accuracy", {"tolerance": 5}, "tolerance is a share"),
        ("accuracy", {"units": "si"}, "units must be"),
        ("contains", {"max_words": 0}, "max_words must be at least 1"),
        ("edit_distance", {"threshold": 5}, "threshold must be a similarity of 0 to 1"),
        ("grounding", {}, "coordinates"),
        ("grounding", {"coordinates": "pixels"}, "coordinates must be"),
        ("grounding", {"coordinates": "absolute", "metric": "giou", "threshold": 0.5}, "for metric 'iou'"),
        ("json_schema", {}, "either `schema` or the `column`"),
        ("json_schema", {"schema": {"type": "nonsense"}}, "not a valid JSON schema"),
        ("tool_call", {"tools": [{"parameters": {}}]}, "without a name"),
        ("length", {"maximum": 1, "minimum": 2}, "minimum <= maximum"),
        ("length", {"maximum": 1, "unit": "bytes"}, "unit must be"),
        ("repetition", {"n": 0}, "at least 1"),
        ("language", {}, "either `language`"),
        ("language", {"language": "english"}, "ISO 639-1"),
    ],
)
def test_options_are_checked_before_the_run(name: str, options: dict[str, Any], message: str) -> None:
    (problem,) = check_rewards([RewardSpec(name, options=options)])
    assert message in problem and f"'{name}'" in problem

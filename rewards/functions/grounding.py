"""Grounding: is the box or the point where it should be? The arithmetic is in rewards/functions/boxes.py.

    metric   gold            answer          score
    iou      one box         one box         IoU; with `threshold`, 1.0 from there on and else 0.0
    giou     one box         one box         (1 + GIoU) / 2: boxes that miss are told apart by how far
    point    one box         a point, a box  1.0 if the point, or the box's middle, lies in the gold box
    boxes    several boxes   several boxes   F1 of one-to-one matches, averaged over IoU 0.50 to 0.95 (as in mAP)

Coordinates are stated, never guessed: `coordinates` for the answer, `gold_coordinates` for the gold (default: as the
answer's), each `absolute` (pixels of the image as it is in the data), `normalized` (0 to 1) or `thousandths` (0 to
1000).

Failure modes: models that see a resized image (Qwen2-VL and 2.5-VL) write its pixels, not those of the file: let them
answer in thousandths, or resize the data. A box around the whole image has a fair IoU with large objects, and with
`point` its middle is often right: prefer `iou` with a threshold. If the answer contains anything but boxes, or a box
reaches outside of the image, the score is 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.functions.boxes import Coordinates, LabelledBox, giou, iou, mean_f1, point_in_box, read_boxes, write_boxes
from rewards.functions.format import Scope, check_scope, judged_text, one_of, placed
from rollout.types import Verdict

Metric = Literal["iou", "giou", "point", "boxes"]
ROUNDING = 1e-9
"""How much an IoU may fall below the threshold, since a box in other coordinates is rounded differently."""


@dataclass(frozen=True, slots=True)
class GroundingReward:
    """Scores how well the answer's boxes agree with the gold boxes, 0.0 to 1.0. A row without a gold box is
    `unscorable`."""

    separable: ClassVar[bool] = True
    coordinates: Coordinates
    metric: Metric = "iou"
    threshold: float | None = None
    gold_coordinates: Coordinates | None = None
    column: str | None = None
    """Column with the gold boxes. None: the row's answer holds them, as JSON."""
    scope: Scope = "answer"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        one_of("metric", self.metric, get_args(Metric))
        one_of("coordinates", self.coordinates, get_args(Coordinates))
        one_of("gold_coordinates", self.gold_coordinates or self.coordinates, get_args(Coordinates))
        if self.threshold is not None and not (self.metric == "iou" and 0 < self.threshold <= 1):
            raise ValueError(f"threshold is for metric 'iou' and must be above 0 and at most 1, not {self.threshold}")

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        size = _size(request)
        if size is None and "absolute" in (self.coordinates, self.gold_coordinates):
            return unscorable(request, "coordinates are absolute, but the row has no image of known size")
        gold = self._gold(request, size)
        if gold is None:
            what = "list of boxes" if self.metric == "boxes" else "single box"
            return unscorable(request, f"the row's {self.column or 'answer'} is not a {what} inside of the image")
        return [self._judge(gold, text, size) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion with the gold boxes in the answer's coordinates; None if the row has none."""
        size = _size(request)
        gold = self._gold(request, size)
        if gold is None or (self.coordinates == "absolute" and size is None):
            return None
        return placed(write_boxes(gold, self.coordinates, size), self.scope)

    def _gold(self, request: ScoringRequest, size: tuple[int, int] | None) -> list[LabelledBox] | None:
        gold = read_boxes(gold_of(request, self.column), self.gold_coordinates or self.coordinates, size)
        return None if gold is None or (self.metric != "boxes" and len(gold) != 1) else gold

    def _judge(self, gold: Sequence[LabelledBox], completion: str, size: tuple[int, int] | None) -> Verdict:
        text = judged_text(completion, self.scope)
        answer = None if text is None else read_boxes(text, self.coordinates, size)
        if answer is None:
            return Verdict.scored(0.0, reason="no readable box inside of the image")
        if self.metric == "boxes":
            return Verdict.scored(mean_f1(gold, answer))
        if len(answer) != 1:
            return Verdict.scored(0.0, reason=f"{len(answer)} boxes, not one")
        target, found = gold[0].box, answer[0].box
        if self.metric == "point":
            return Verdict.scored(float(point_in_box(answer[0].center, target)))
        overlap = iou(target, found)
        if self.metric == "giou":
            return Verdict.scored((1 + giou(target, found)) / 2, note=f"IoU {overlap:.3f}")
        score = overlap if self.threshold is None else float(overlap >= self.threshold - ROUNDING)
        return Verdict.scored(score, note=f"IoU {overlap:.3f}")


def _size(request: ScoringRequest) -> tuple[int, int] | None:
    """Return the size of the first image in pixels."""
    return next(((m.width, m.height) for m in request.media if m.kind == "image" and m.width and m.height), None)

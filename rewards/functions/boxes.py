"""Read boxes and points from answers, and measure how well they agree. Pure functions.

A box is `(x1, y1, x2, y2)` with x1 <= x2 and y1 <= y2, as shares of the image's width and height.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.answers.nulls import is_blank, is_null
from rewards.functions.format import unfenced

Coordinates = Literal["absolute", "normalized", "thousandths"]
Box = tuple[float, float, float, float]

MAX_BOXES = 200
_THRESHOLDS = tuple(i / 100 for i in range(50, 100, 5))
"""COCO's IoU thresholds: 0.50, 0.55, ..., 0.95."""
_BOX_KEYS = ("bbox_2d", "bbox", "box", "box_2d")
_POINT_KEYS = ("point_2d", "point")


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A box with its label; a point is a box without extent."""

    box: Box
    label: str = ""

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def read_boxes(value: Any, coordinates: Coordinates, size: tuple[int, int] | None) -> list[LabelledBox] | None:
    """Read boxes and points from a gold value or an answer. It may be `[x1, y1, x2, y2]`, `[x, y]`, a list of these, or
    objects `{"bbox_2d": [..], "label": ".."}` (`bbox`, `box`, `point_2d`, `point`), as values or as JSON text, also in
    a Markdown fence. Returns None for anything else: reversed corners, coordinates outside of the image or not finite,
    or more than `MAX_BOXES` boxes.

    Args:
        coordinates: absolute (pixels of `size`), normalized (0 to 1), thousandths (0 to 1000).
        size: width and height of the image in pixels.
    """
    try:
        found = _boxes(_parsed(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    if len(found) > MAX_BOXES:
        return None
    if coordinates == "absolute" and size is None:
        return None
    scale = _scale(coordinates, size)
    return None if any(not _inside(i.box, scale) for i in found) else [_scaled(item, scale) for item in found]


def write_boxes(boxes: Sequence[LabelledBox], coordinates: Coordinates, size: tuple[int, int] | None) -> str:
    """Write `boxes` as JSON that `read_boxes` can read."""
    wide, high = _scale(coordinates, size)
    documents: list[dict[str, Any]] = []
    for item in boxes:
        x1, y1, x2, y2 = item.box
        box = {"bbox_2d": [x1 * wide, y1 * high, x2 * wide, y2 * high]}
        documents.append({**box, "label": item.label} if item.label else box)
    return json.dumps(documents, ensure_ascii=False)


def _scale(coordinates: Coordinates, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return width and height of the image in these coordinates."""
    return {"absolute": size or (1, 1), "normalized": (1, 1), "thousandths": (1000, 1000)}[coordinates]


def _parsed(text: str) -> Any:
    return json.loads(unfenced(text, "json"))


def _boxes(value: Any) -> list[LabelledBox]:
    """Return the boxes of a value. Raises ValueError or TypeError if it is not a box."""
    if isinstance(value, Mapping):
        keys = [key for key in (*_BOX_KEYS, *_POINT_KEYS) if not is_null(value.get(key))]
        if len(keys) != 1:
            raise ValueError("an object must have exactly one box")
        return [LabelledBox(_box(value[keys[0]]), " ".join(str(value.get("label") or "").casefold().split()))]
    if not isinstance(value, list | tuple):
        raise TypeError("expected an object or a list")
    values = [v for v in value if not is_blank(v)]
    if len(values) < len(value) and all(isinstance(v, int | float) for v in values):
        raise ValueError("a coordinate is missing")
    if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return [LabelledBox(_box(values))]
    return [item for v in values for item in _single(v)]


def _single(value: Any) -> list[LabelledBox]:
    boxes = _boxes(value)
    if len(boxes) != 1:
        raise ValueError("a list within a list")
    return boxes


def _box(numbers: Any) -> Box:
    if not isinstance(numbers, list | tuple) or not all(type(v) in (int, float) for v in numbers):
        raise TypeError("coordinates must be numbers")
    values = [float(v) for v in numbers]
    if len(values) == 2:
        values *= 2
    x1, y1, x2, y2 = values
    if x1 > x2 or y1 > y2 or not all(map(math.isfinite, values)):
        raise ValueError("the corners are reversed or not finite")
    return x1, y1, x2, y2


def _inside(box: Box, scale: tuple[float, float]) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= scale[0] and box[3] <= scale[1]


def _scaled(item: LabelledBox, scale: tuple[float, float]) -> LabelledBox:
    x1, y1, x2, y2 = item.box
    return LabelledBox((x1 / scale[0], y1 / scale[1], x2 / scale[0], y2 / scale[1]), item.label)


def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, 0 to 1; 0 for boxes without area."""
    intersection, union, _ = _areas(a, b)
    return intersection / union if union > 0 else 0.0


def giou(a: Box, b: Box) -> float:
    """Return the generalised IoU (Rezatofighi et al. 2019, arXiv:1902.09630): IoU - (hull - union) / hull, -1 to 1. The
    hull is the smallest box around both. Boxes that do not touch score less the farther apart they are."""
    _, union, hull = _areas(a, b)
    return iou(a, b) - ((hull - union) / hull if hull > 0 else 0.0)


def _areas(a: Box, b: Box) -> tuple[float, float, float]:
    """Return the areas of intersection, union and hull."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection, union, hull


def point_in_box(point: tuple[float, float], box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def mean_f1(gold: Sequence[LabelledBox], answer: Sequence[LabelledBox]) -> float:
    """Return the agreement of two sets of boxes, 0 to 1: F1 = 2 * matched / (gold + answered), mean over COCO's IoU
    thresholds.

    Pairs are matched one to one, best overlap first. If the gold boxes have labels, only equal labels match. COCO's mAP
    (Lin et al. 2014, arXiv:1405.0312) ranks boxes by confidence, which answers do not have. Extra boxes after the right
    ones would cost nothing in it, so listing many would pay."""
    if not gold or not answer:
        return float(not gold and not answer)
    labelled = any(item.label for item in gold)
    overlaps = sorted(
        (
            (iou(g.box, a.box), i, j)
            for i, g in enumerate(gold)
            for j, a in enumerate(answer)
            if not labelled or g.label == a.label
        ),
        key=lambda entry: (-entry[0], entry[1:]),
    )
    taken_gold: set[int] = set()
    taken: set[int] = set()
    matched = []
    for overlap, i, j in overlaps:
        if i not in taken_gold and j not in taken:
            taken_gold.add(i)
            taken.add(j)
            matched.append(overlap)
    counts = [sum(overlap >= threshold for overlap in matched) for threshold in _THRESHOLDS]
    return sum(2 * count / (len(gold) + len(answer)) for count in counts) / len(_THRESHOLDS)

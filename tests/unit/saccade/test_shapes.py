"""The shapes data are balanced, reproducible, and really hold out what they say they do."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saccade.demo import shapes
from saccade.demo.shapes import ANSWERS, Combination, ShapesFiles, make_shapes

NAMES = ("train", "test", "unseen", "blank")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ShapesFiles:
    return make_shapes(tmp_path_factory.mktemp("shapes"), seed=3, train_rounds=3)


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def images(path: Path) -> dict[str, bytes]:
    """path inside the data set -> decoded pixels."""
    encoded = {r["image"]["path"]: r["image"]["bytes"] for r in rows(path)}
    return {name: Image.open(io.BytesIO(data)).convert("RGB").tobytes() for name, data in encoded.items()}


def shown(path: Path) -> Counter[tuple[str, ...]]:
    """How often each combination is drawn, by the answers to its image's three questions."""
    answers: dict[str, dict[str, str]] = {}
    for row in rows(path):
        answers.setdefault(row["image"]["path"], {})[row["kind"]] = row["answer"]
    return Counter(tuple(a[kind] for kind in ANSWERS) for a in answers.values())


def test_seed_decides_every_byte(files: ShapesFiles, tmp_path: Path) -> None:
    again = make_shapes(tmp_path / "again", seed=3, train_rounds=3)
    other = make_shapes(tmp_path / "other", seed=4, train_rounds=3)
    for name in NAMES:
        assert rows(getattr(files, name)) == rows(getattr(again, name))
        assert rows(getattr(files, name)) != rows(getattr(other, name))


def test_combinations_are_balanced_and_split(files: ShapesFiles) -> None:
    train, test, unseen = shown(files.train), shown(files.test), shown(files.unseen)
    assert len(train) == 88 and set(train.values()) == {3}
    assert train.keys() == test.keys() and set(test.values()) == {1}
    assert len(unseen) == 8 and set(unseen.values()) == {4}
    assert not train.keys() & unseen.keys()
    for index, values in enumerate(ANSWERS.values()):
        assert {combination[index] for combination in train} == set(values)


@given(seed=st.integers(0, 10_000))
def test_unseen_combinations_take_no_value_away(seed: int) -> None:
    unseen = shapes.unseen_combinations(seed)
    assert len(set(unseen)) == 8
    assert set(Counter(c.shape for c in unseen).values()) == {2}
    assert set(Counter(c.count for c in unseen).values()) == {2}
    assert set(Counter(c.color for c in unseen).values()) == {1, 2}
    for pair in (lambda c: (c.color, c.shape), lambda c: (c.color, c.count), lambda c: (c.shape, c.count)):
        assert set(Counter(map(pair, unseen)).values()) == {1}


def test_every_image_is_asked_all_three_questions(files: ShapesFiles) -> None:
    for name in NAMES:
        kinds = Counter(row["kind"] for row in rows(getattr(files, name)))
        assert len(set(kinds.values())) == 1 and set(kinds) == set(ANSWERS)
        assert all(row["answer"] in ANSWERS[row["kind"]] for row in rows(getattr(files, name)))


def test_no_drawing_occurs_twice(files: ShapesFiles) -> None:
    drawings = [pixels for name in ("train", "test", "unseen") for pixels in images(getattr(files, name)).values()]
    assert len(drawings) == len(set(drawings)) == 88 * 3 + 88 + 32


def test_blank_asks_the_same_of_an_empty_canvas(files: ShapesFiles) -> None:
    questions = [(r["prompt"], r["answer"], r["kind"]) for r in rows(files.blank)]
    assert questions == [(r["prompt"], r["answer"], r["kind"]) for r in rows(files.test)]
    assert len({r["image"]["bytes"] for r in rows(files.blank)}) == 1
    (pixels,) = images(files.blank).values()
    assert len(set(pixels)) == 1


@given(
    color=st.sampled_from(ANSWERS["color"]),
    shape=st.sampled_from(ANSWERS["shape"]),
    count=st.sampled_from(ANSWERS["count"]),
    seed=st.integers(0, 1000),
)
def test_a_drawing_shows_what_it_is_labelled(color: str, shape: str, count: str, seed: int) -> None:
    image = np.asarray(shapes.draw(Combination(color, shape, count), random.Random(seed))).astype(int)
    is_object = (image.max(-1) - image.min(-1)) > 60  # backgrounds are grey
    cells = [is_object[y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 28)]
    assert sum(bool(cell.any()) for cell in cells) == ANSWERS["count"].index(count) + 1
    mean = image[is_object].mean(0)
    nearest = min(shapes.COLORS, key=lambda name: float(np.abs(mean - np.array(shapes.COLORS[name])).sum()))
    assert nearest == color


def test_a_shape_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        shapes.draw(Combination("red", "hexagon", "one"), random.Random(0))

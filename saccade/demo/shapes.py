"""The shapes data set: questions about drawings that can only be answered by looking.

    make_shapes(directory, seed) ──▶ train.parquet  test.parquet  unseen.parquet  blank.parquet

Each image shows one to four equal objects, one per cell of a 2 x 2 grid, on light grey. Questions ask for colour, shape
or count. `test` holds new drawings of the combinations (colour, shape, count) that training has seen; `unseen` holds
combinations that training never shows, though it shows each colour, shape and count; `blank` is `test` with the objects
erased, the control for whatever can be guessed without looking.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from learner.durable import atomic_file
from rollout.data.formats import Row

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 220),
    "yellow": (235, 215, 30),
    "purple": (140, 40, 170),
    "orange": (245, 140, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four")

ANSWERS: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES, "count": COUNTS}
"""Kind of question -> its possible answers. A guess is right once in that many tries."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "color": ("what color are the shapes ?", "which color is shown in the image ?"),
    "shape": ("what shape is shown in the image ?", "which shape are the objects ?"),
    "count": ("how many shapes are there ?", "what is the number of objects ?"),
}
THOUGHT = "look"
"""The text that the warm start teaches between the think tags. It is short, since every token of it is sampled 60,000
times."""

IMAGE_SIZE = 56
"""Pixels each way: four image tokens of 28 x 28 pixels, one per cell of the grid."""

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("answer", pa.string()),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Combination:
    """The color, shape and count that an image shows."""

    color: str
    shape: str
    count: str

    def answer(self, kind: str) -> str:
        return {"color": self.color, "shape": self.shape, "count": self.count}[kind]


@dataclass(frozen=True, slots=True)
class ShapesFiles:
    """Paths of the Parquet files of one data set."""

    train: Path
    test: Path
    unseen: Path
    blank: Path


def vocabulary() -> list[str]:
    """Return every word of the questions, thoughts and answers, for a word-level tokenizer."""
    texts = [
        *(q for kind in QUESTIONS.values() for q in kind),
        THOUGHT,
        *(a for k in ANSWERS.values() for a in k),
    ]
    return sorted({word for text in texts for word in text.split()})


def completion(answer: str) -> str:
    """Return a completion in the format, as the word-level tokenizer spells it."""
    return f"<think> {THOUGHT} </think> <answer> {answer} </answer>"


def combinations() -> list[Combination]:
    """Return all 96 combinations of colour, shape and count."""
    return [Combination(*values) for values in product(COLORS, SHAPES, COUNTS)]


def unseen_combinations(seed: int) -> list[Combination]:
    """Choose eight combinations to hold out: every shape and count twice, every colour once or twice, and no pair
    repeated."""
    rng = random.Random(f"unseen/{seed}")
    colors, shapes, counts = (rng.sample(list(values), len(values)) for values in ANSWERS.values())
    return [Combination(colors[i % 6], shapes[i % 4], counts[(i + i // 4) % 4]) for i in range(8)]


def draw(combination: Combination, rng: random.Random) -> Image.Image:
    """Draw a combination. Cells, sizes, places, shade of colour and background are random."""
    level = rng.randint(200, 255)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (level, level, level))
    canvas = ImageDraw.Draw(image)
    fill = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[combination.color])
    cell = IMAGE_SIZE // 2
    for index in rng.sample(range(4), COUNTS.index(combination.count) + 1):
        radius = rng.uniform(0.38, 0.46) * cell
        slack = cell / 2 - radius
        x = (index % 2 + 0.5) * cell + rng.uniform(-slack, slack)
        y = (index // 2 + 0.5) * cell + rng.uniform(-slack, slack)
        _draw_object(canvas, combination.shape, x, y, radius, fill)
    return image


def _draw_object(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return x - half_width, y - half_height, x + half_width, y + half_height

    if shape == "circle":
        canvas.ellipse(box(radius, radius), fill=fill)
    elif shape == "square":
        canvas.rectangle(box(0.88 * radius, 0.88 * radius), fill=fill)
    elif shape == "triangle":
        base = y + 0.85 * radius
        canvas.polygon([(x, y - radius), (x + radius, base), (x - radius, base)], fill=fill)
    elif shape == "cross":
        canvas.rectangle(box(0.32 * radius, radius), fill=fill)
        canvas.rectangle(box(radius, 0.32 * radius), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def make_shapes(directory: str | Path, seed: int = 0, *, train_rounds: int = 16, unseen_rounds: int = 4) -> ShapesFiles:
    """Write the four files into `directory`. The same arguments give the same bytes.

    A round is one new image of each combination: 88 in train and test (one round), 8 in unseen; three rows per image.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = ShapesFiles(*(directory / f"{name}.parquet" for name in ("train", "test", "unseen", "blank")))
    unseen = unseen_combinations(seed)
    seen = [c for c in combinations() if c not in unseen]
    drawn: set[bytes] = set()
    _write(files.train, _rows("train", seen, train_rounds, seed, drawn))
    test = list(_rows("test", seen, 1, seed, drawn))
    _write(files.test, test)
    _write(files.unseen, _rows("unseen", unseen, unseen_rounds, seed, drawn))
    _write(files.blank, blank_rows(test))
    return files


def blank_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the same questions and answers over an empty canvas, in the average grey of the backgrounds."""
    canvas = {"bytes": _png(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (228, 228, 228))), "path": "blank.png"}
    return ({**row, "image": canvas} for row in rows)


def _rows(name: str, shown: Sequence[Combination], rounds: int, seed: int, drawn: set[bytes]) -> Iterator[Row]:
    """Yield the rows of one file. `drawn` prevents any image from occurring twice, in this file or another."""
    rng = random.Random(f"{name}/{seed}")
    for index in range(rounds):
        for combination in rng.sample(list(shown), len(shown)):
            while (image := draw(combination, rng)).tobytes() in drawn:
                pass
            drawn.add(image.tobytes())
            path = f"{name}/{index:02d}-{combination.color}-{combination.shape}-{combination.count}.png"
            encoded = {"bytes": _png(image), "path": path}
            for kind, phrasings in QUESTIONS.items():
                yield {
                    "prompt": rng.choice(phrasings),
                    "image": encoded,
                    "answer": combination.answer(kind),
                    "kind": kind,
                }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, rows: Iterable[Row]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer)
    atomic_file(path, buffer.getvalue())

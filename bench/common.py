"""Common parts of the benchmarks: a tiny model, images, configurations, and printing and writing of results."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from learner.durable import strict_json

COLORS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220), "yellow": (235, 215, 30)}
QUESTION = "What color?"
IMAGE_SIZE = 84


def images(count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Make noisy images of one colour, each with the name of its colour."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(list(COLORS), count)]
    noise = rng.integers(-30, 30, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = np.clip(np.array([COLORS[n] for n in names])[:, None, None] + noise, 0, 255).astype("uint8")
    return [(Image.fromarray(p), name) for p, name in zip(pixels, names, strict=True)]


def write_parquet(path: Path, rows: Sequence[tuple[Image.Image, str]]) -> Path:
    """Write the images as a data set of this project."""
    import io

    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    columns = {
        "prompt": [QUESTION for _ in rows],
        "image": [encode(image) for image, _ in rows],
        "answer": [name for _, name in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


def environment() -> dict[str, Any]:
    """Return the machine and the versions with which a figure was measured."""
    packages = ("torch", "transformers", "deepspeed", "ray")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def report(name: str, results: Mapping[str, Any], table: Table, path: Path | None) -> None:
    """Print the table. If `path` is given, write the results with the environment to it."""
    Console(width=140).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(strict_json({"benchmark": name, "environment": environment(), **results}, 1) + "\n")
        Console().print(f"written to {path}")

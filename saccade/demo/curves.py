"""Report what a demo run achieved: `summary.json`, tables on the terminal, and a picture of the curves.

metrics.jsonl (steps, evaluations) ──summarise──▶ summary ──accuracy_table, speed_table──▶ terminal
                                   ──plot───────▶ curves.png
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from saccade.demo.shapes import ANSWERS
from saccade.errors import RunError

Records = Sequence[Mapping[str, Any]]

KIND_COLORS = {"color": "#d1495b", "shape": "#2e6f95", "count": "#3a7d44"}


def summarise(
    steps: Records, evaluations: Records, *, warm_start_seconds: float, total_seconds: float
) -> dict[str, Any]:
    """Compute the figures of `summary.json` from the records of `metrics.jsonl`.

    In `seconds`, `rollout` is the time in which an engine had work and `reward` is the sum over scoring calls, as the
    actors measured them. Both overlap with `learn` and `sync`, for which the driver waits. `total` is the whole demo.
    Raises RunError if the records are not sufficient."""
    if not steps or not evaluations:
        raise RunError("the run recorded no step or no evaluation, so there is nothing to report")
    first, last = evaluations[0]["results"], evaluations[-1]["results"]
    trained = sum(record["seconds"]["total"] for record in steps)
    engines = {name for record in steps for name in record["busy"] if name.startswith("generate/")}
    return {
        "accuracy": {
            "before": accuracy(first, "test"),
            "after": accuracy(last, "test"),
            "blank": accuracy(last, "blank"),
            "unseen": accuracy(last, "unseen"),
        },
        "seconds": {
            "warm_start": warm_start_seconds,
            "rollout": max(sum(record["busy"].get(name, 0.0) for record in steps) for name in engines),
            "reward": sum(record["busy"]["reward"] for record in steps),
            "learn": sum(record["seconds"]["learn"] for record in steps),
            "sync": sum(record["seconds"]["sync"] for record in steps),
            "total": total_seconds,
        },
        "samples_per_second": sum(record["samples"] for record in steps) / trained,
        "tokens_per_second": sum(record["tokens"] for record in steps) / trained,
    }


def accuracy(results: Mapping[str, Mapping[str, Mapping[str, float]]], file: str) -> dict[str, float]:
    """Return kind of question -> share of right answers on one data file. Raises RunError if no completion was
    scored."""
    shares = {kind: results.get(file, {}).get(kind, {}).get("accuracy", math.nan) for kind in ANSWERS}
    if missing := [kind for kind, share in shares.items() if math.isnan(share)]:
        raise RunError(f"evaluation of {file}: no completion was scored for {', '.join(missing)}; see the run's log")
    return shares


def accuracy_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of the accuracy per kind of question, beside the accuracy of guessing."""
    table = Table(title="Accuracy on held-out images", title_justify="left")
    columns = {
        "before": "before",
        "after": "after",
        "blank": "image blanked",
        "unseen": "unseen combinations",
    }
    for header in ("question", "chance", *columns.values()):
        table.add_column(header, justify="left" if header == "question" else "right")
    for kind, answers in ANSWERS.items():
        measured = [f"{summary['accuracy'][column][kind]:.2f}" for column in columns]
        table.add_row(kind, f"{1 / len(answers):.2f}", *measured)
    return table


def speed_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of the time per phase."""
    labels = {
        "warm_start": "warm start",
        "rollout": "rollout (in parallel)",
        "reward": "reward (in parallel)",
        "learn": "learning",
        "sync": "weight sync",
        "total": "whole demo",
    }
    table = Table(title="Where the time went", title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for key, label in labels.items():
        table.add_row(label, f"{summary['seconds'][key]:.1f}", end_section=key == "sync")
    table.add_row("samples per second", f"{summary['samples_per_second']:.0f}")
    table.add_row("tokens per second", f"{summary['tokens_per_second']:.0f}")
    return table


def plot(steps: Records, evaluations: Records, path: Path, *, title: str) -> None:
    """Draw held-out accuracy and training reward over the steps, as a PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [record["step"] for record in evaluations]
    for kind, answers in ANSWERS.items():
        color = KIND_COLORS[kind]
        for file, style in (("test", "-o"), ("blank", ":x")):
            shares = [accuracy(record["results"], file)[kind] for record in evaluations]
            label = kind if file == "test" else f"{kind}, image blanked"
            left.plot(at, shares, style, color=color, label=label, markersize=4, linewidth=1.6)
        left.axhline(1 / len(answers), color=color, linestyle="--", linewidth=0.7, alpha=0.6)
    left.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1.03), title="held-out images (dashed: chance)")
    left.legend(fontsize=8, loc="upper left")
    x = [record["step"] for record in steps]
    right.plot(x, [record["reward"] for record in steps], color="black", linewidth=1.6, label="reward")
    for name, color in (("accuracy", "#8e6c8a"), ("format", "#c0a060")):
        scores = [record["parts"].get(name, math.nan) for record in steps]
        right.plot(x, scores, color=color, linewidth=1.2, label=f"{name} (unweighted)")
    right.set(xlabel="optimizer step", title="training reward, mean of each batch", ylim=(0, None))
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)

"""The options of a source of prompts: the section `data`, and what the rest of the run says about its rows."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.data.config import DataConfig


@dataclass(frozen=True)
class DataOptions:
    """The options of one source: of training prompts or of held-out ones."""

    data: DataConfig
    files: tuple[str, ...]
    """Parquet, JSONL and JSON files, or glob patterns of them: `data.train` or `data.eval`."""
    extra_columns: tuple[str, ...] = ()
    """Further columns, passed to rewards unchanged."""
    optional_columns: tuple[str, ...] = ()
    """Further columns that are passed to rewards if all files have them."""
    answers_as_written: bool = False
    """Whether answers are programs or tests, in which nothing marks an answer."""
    shuffle: bool = True
    """Whether each epoch is shuffled. Held-out rows always are: evaluation.max_prompts then draws a fair sample."""
    seed: int = 0
    """Seed of the shuffle."""
    window_bytes: int = 256 * 2**20
    """Memory for rows: the size of a shuffle window and of the block cache."""

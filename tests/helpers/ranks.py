"""Learner ranks as processes of a test: joined in one gloo group, forked from a server that has the imports done."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from learner.engines.process_group import join, open_store
from learner.model.logprobs import CHUNK_BYTES
from tests.helpers.learner_cases import FEW_ROWS, options

PRELOADED = [
    "learner.engines.deepspeed_engine",
    "peft",
    "tests.helpers.learner_cases",
    "transformers.models.auto.processing_auto",
    "transformers.models.auto.video_processing_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
]
"""What ranks import: more than ten seconds for each of them, once for all here."""


def run_ranks(scenario: Callable[[int, Path, Path], None], ranks: int, model: Path, out: Path) -> None:
    """`scenario(rank, model, out)` in `ranks` processes. Raises when one of them fails."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    _store, port = open_store("127.0.0.1", 120.0)  # there until all are done
    mp.start_processes(_on_rank, (scenario, ranks, port, model, out), nprocs=ranks, start_method="forkserver")


def _on_rank(rank: int, scenario: Callable[[int, Path, Path], None], ranks: int, port: int, *paths: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_SIZE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    CHUNK_BYTES["cpu"] = FEW_ROWS
    join(options(paths[0], ranks=ranks), rank, "127.0.0.1", port)
    scenario(rank, *paths)

"""Run one rank of one case of `bench.memory` in a fresh process, and measure its peak memory over two optimizer steps.

    python -m bench.memory_process CASE.json RANK PORT      prints one JSON line; PORT: of the store where ranks meet

Resident memory is compared with a baseline. It is taken after the libraries are loaded, the process group exists, and a
model too small to matter was trained for a step, so that it includes everything that libraries set up at first use.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from learner.algorithm.objective import GlobalCounts
from learner.batching.collate import collate
from learner.batching.rows import Sample, TrainingRow
from learner.config import LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.engines.process_group import join
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import Lora, ModelConfig
from vlm.families.registry import load_adapter
from vlm.media.video_audio import decode
from vlm.tiny.noise import noise_image


@dataclass(frozen=True)
class Case:
    """The work of a case: each of the `steps` takes `micro_batches` of `rows` groups."""

    name: str
    learner: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of the learner."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of the model."""
    lora: int = 0
    """Rank of the adapter. 0: all weights are trained."""
    device: Literal["cuda", "cpu"] = "cpu"
    vocabulary: int = 0
    """Words of the tokenizer. 0: a tokenizer of bytes."""
    rows: int = 2
    prompt: int = 384
    """Tokens of a prompt, including its image."""
    completion: int = 64
    """Tokens of each completion."""
    completions: int = 2
    """Completions of a group."""
    image: int = 336
    """Side of the image in pixels. 0: no image."""
    micro_batches: int = 2
    steps: int = 2


def make_batches(case: Case, adapter: MultimodalAdapter, seed: int = 0) -> list[MultimodalBatch]:
    """Make the micro-batches of one step, packed."""
    rng = np.random.default_rng(seed)
    return [
        collate([_row(case, adapter, rng, 100 * number + i) for i in range(case.rows)], adapter)
        for number in range(case.micro_batches)
    ]


def _row(case: Case, adapter: MultimodalAdapter, rng: np.random.Generator, number: int) -> TrainingRow:
    """Make a prompt with a noise image, padded with a repeated token, and random completions."""
    content: list[dict[str, str]] = [{"type": "text", "text": "what"}]
    media = [noise_image(number, case.image, case.image)] if case.image else []
    text = adapter.render([{"role": "user", "content": [*({"type": m.kind} for m in media), *content]}])
    prompt = adapter.encode(text, [decode(m, m.data) for m in media])
    filler = torch.full((case.prompt - len(prompt.input_ids),), int(prompt.input_ids[-1]))
    prompt = type(prompt)(torch.cat([prompt.input_ids, filler]), prompt.inputs, prompt.counts)
    ones = torch.ones(case.completion)
    versions = torch.zeros(case.completion, dtype=torch.int32)
    samples = [
        Sample(
            torch.from_numpy(rng.integers(32, 200, case.completion)),
            ones.bool(),
            -5 * ones,
            versions,
            float(rng.normal()),
        )
        for _ in range(case.completions)
    ]
    return TrainingRow(prompt, tuple(samples))


def learner_options(case: Case, model: str) -> LearnerOptions:
    learner: dict[str, Any] = {"zero_stage": 0, "gradient_checkpointing": (), "learning_rate": 1e-6, **case.learner}
    knobs: dict[str, Any] = {"dtype": "float32", "lora": Lora(case.lora) if case.lora else None, **case.model}
    return LearnerOptions(ModelConfig(model, **knobs), 100, device=case.device, learner=LearnerConfig(**learner))


def train(case: Case, options: LearnerOptions, adapter: MultimodalAdapter) -> dict[str, float]:
    """Return the peak bytes over the baseline after loading, and in every step."""
    meter = Meter(options.device)
    engine = DeepSpeedEngine(options, adapter)
    peaks: dict[str, float] = {"load": meter.peak()}
    batches = make_batches(case, adapter, engine.rank)
    completions = case.micro_batches * case.rows * case.completions * options.learner.ranks
    counts = GlobalCounts(float(completions * case.completion), float(completions))
    for step in range(case.steps):
        meter.reset()
        engine.train_step(batches, micro_loss(options, counts))
        peaks[f"step {step}"] = meter.peak()
    peaks["held"] = meter.now()
    return peaks


class Meter:
    """Measures bytes over the baseline, which is the memory at its creation: resident memory, or CUDA's allocated
    memory."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.baseline = 0
        self.baseline = self.now()
        self.reset()

    def now(self) -> int:
        return (torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")) - self.baseline

    def peak(self) -> int:
        """Return the peak since the last reset."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.baseline

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def warm_up(options: LearnerOptions, adapter: MultimodalAdapter) -> None:
    """Take a step of a model too small to matter, with the same options. Everything that DeepSpeed, peft and torch
    import, compile and set up at first use then belongs to the baseline."""
    case = Case("warm-up", rows=1, prompt=64, completion=2, image=56, micro_batches=1)
    engine = DeepSpeedEngine(options, adapter)
    engine.train_step(make_batches(case, adapter), micro_loss(options, GlobalCounts(4.0, 1.0)))
    del engine
    gc.collect()


def main(arguments: Sequence[str]) -> None:
    path, rank, port = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    content = json.loads(path.read_text())
    case = Case(**content["case"])
    options = learner_options(case, content["model"])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.learner.ranks), LOCAL_RANK="0")
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(options.threads)
    join(options, rank, "127.0.0.1", port)
    warm_up(learner_options(case, content["small"]), load_adapter(content["small"]))
    print(json.dumps(train(case, options, load_adapter(content["model"]))))


if __name__ == "__main__":
    main(sys.argv[1:])

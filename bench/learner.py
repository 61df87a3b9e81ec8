"""The learner's optimizer step against a bare transformers + AdamW loop, on the same samples, in one run.

    python -m bench.learner --json runs/bench/learner.json

Three rows: the bare loop on padded batches; this learner on the very same padded batches; this learner as it runs, with
each prompt computed once for its K completions. Float32, all cores, a vocabulary of at most 4k, one image a prompt.
`tokens/s` counts completion tokens trained; the policy-gradient loss is the same.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bench.common import images, median, report
from learner.deepspeed_engine import DeepSpeedEngine
from learner.engine import TrainEngine
from learner.objective import GlobalCounts
from learner.packing import pack
from learner.policy import attention_break_even
from learner.process_group import join, open_store
from learner.samples import Row, collate, encode_prompts, make_rows, to_sample
from learner.types import LearnerOptions
from learner.update import micro_loss
from rollout.types import Completion, Media, Prompt, PromptRef, RolloutGroup, Segment, Verdict
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.media import digest
from vlm.registry import load_adapter
from vlm.tiny import TinySizes, build_tiny


@dataclass(frozen=True)
class Shape:
    """B groups of K completions of `new` tokens behind a question of about `words` words."""

    groups: int
    K: int
    words: int
    new: int


SHAPES = {
    "short": Shape(groups=32, K=8, words=4, new=16),
    "balanced": Shape(groups=8, K=8, words=12, new=64),
    "prompt-heavy": Shape(groups=4, K=8, words=50, new=32),
}


def make_groups(adapter: MultimodalAdapter, shape: Shape) -> tuple[list[RolloutGroup], dict[str, bytes]]:
    """Random completions of one length; sampled by nobody, so their log-probabilities say nothing."""
    rng = np.random.default_rng(0)
    media: dict[str, bytes] = {}
    groups = []
    for number, (image, _) in enumerate(images(shape.groups)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        key = digest(buffer.getvalue())
        media[key] = buffer.getvalue()
        content = [{"type": "image"}, {"type": "text", "text": "what " * shape.words}]
        text = adapter.render([{"role": "user", "content": content}])
        ids = adapter.encode(text, [image]).input_ids.numpy().astype(np.int32)
        prompt = Prompt(PromptRef(f"bench:{number}"), text, ids, len(ids), (Media("image", key, None),))
        completions = tuple(_completion(rng, shape.new) for _ in range(shape.K))
        verdicts = tuple(Verdict.scored(float(r)) for r in rng.random(shape.K))
        groups.append(RolloutGroup(prompt, ids, completions, verdicts))
    return groups, media


def _completion(rng: np.random.Generator, new: int) -> Completion:
    tokens = rng.integers(32, 200, new).astype(np.int32)
    segment = Segment(tokens, np.full(new, -5.0, np.float32), np.zeros(new, np.int32))
    return Completion((segment,), "", "length", 0)


def rows_of(adapter: MultimodalAdapter, shape: Shape, break_even: int | None) -> list[Row]:
    """`break_even` None: one completion a row."""
    groups, media = make_groups(adapter, shape)
    rows: list[Row] = []
    for group, prompt in zip(groups, encode_prompts(adapter, groups, media), strict=True):
        assert group.verdicts is not None
        scored = zip(group.completions, group.verdicts, strict=True)
        samples = [to_sample(c, advantage=(v.score or 0.0) - 0.5, reward=v.score or 0.0) for c, v in scored]
        rows += make_rows(prompt, samples, break_even, budget=10**9)
    return rows


def batches_of(rows: Sequence[Row], adapter: MultimodalAdapter, budget: int) -> list[MultimodalBatch]:
    return [collate([rows[i] for i in members], adapter) for members in pack([len(r) for r in rows], budget)]


def bare_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[MultimodalBatch], tokens: int) -> None:
    """What anybody would write with transformers: forward, log-softmax, policy gradient, AdamW."""
    for batch in batches:
        kwargs = batch.model_kwargs()
        if batch.media_index:
            kwargs.update(_repeat_images(batch))
        logits = model(**kwargs, use_cache=False).logits[:, :-1]
        logprobs = F.log_softmax(logits.float(), -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        assert batch.advantages is not None
        loss = -(logprobs * batch.advantages[:, 1:] * batch.loss_mask[:, 1:]).sum() / tokens
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _repeat_images(batch: MultimodalBatch) -> dict[str, Tensor]:
    """Pixels once per place, as a plain model takes them."""
    assert batch.pixel_values is not None
    grid, places = batch.extra_model_kwargs["image_grid_thw"], batch.media_index["image"]
    patches = batch.pixel_values.split(grid.prod(-1).tolist())
    return {"pixel_values": torch.cat([patches[p] for p in places.tolist()]), "image_grid_thw": grid[places]}


def timed(step: Callable[[], object], repeats: int) -> float:
    """Median seconds of `step`, after two unmeasured ones."""
    seconds = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        step()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def measure(model_path: Path, repeats: int, budget: int) -> dict[str, Any]:
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    options = LearnerOptions(
        str(model_path),
        10_000,
        device="cpu",
        dtype="float32",
        old_policy="current",
        zero_stage=0,
        gradient_checkpointing=False,
        threads=threads,
        micro_batch_tokens=budget,
        learning_rate=1e-6,
    )
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    store, port = open_store("127.0.0.1", 60.0)
    join(options, 0, "127.0.0.1", port, store)
    adapter = load_adapter(str(model_path))
    engine = DeepSpeedEngine(options, adapter)
    bare = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).train()
    return {name: measure_shape(shape, engine, bare, adapter, options, repeats) for name, shape in SHAPES.items()}


def measure_shape(
    shape: Shape, engine: TrainEngine, bare: Any, adapter: MultimodalAdapter, options: LearnerOptions, repeats: int
) -> dict[str, Any]:
    """Seconds per step of each system on the same samples."""
    tokens, budget = shape.groups * shape.K * shape.new, options.micro_batch_tokens
    padded = batches_of(rows_of(adapter, shape, None), adapter, budget)
    shared = batches_of(rows_of(adapter, shape, attention_break_even(adapter.model_config)), adapter, budget)
    loss = micro_loss(options, GlobalCounts(tokens, shape.groups * shape.K))
    optimizer = torch.optim.AdamW(bare.parameters(), lr=options.learning_rate)
    seconds = {
        "bare": timed(lambda: bare_step(bare, optimizer, padded, tokens), repeats),
        "padded": timed(lambda: engine.train_step(padded, loss), repeats),
        "shared": timed(lambda: engine.train_step(shared, loss), repeats),
    }
    return {
        system: {
            "seconds": value,
            "tokens_per_second": tokens / value,
            "against_bare": seconds["bare"] / value,
            "positions": sum(b.num_tokens for b in (shared if system == "shared" else padded)),
        }
        for system, value in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=int, default=8192, help="token positions of one micro-batch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        model = build_tiny("qwen2_5_vl", Path(folder) / "model", sizes=TinySizes(layers=4))
        results = measure(model, arguments.repeats, arguments.budget)
    table = Table(title="learner step against a bare transformers loop, same samples (median)")
    for column in ("shape", "system", "s/step", "completion tokens/s", "token positions", "against bare"):
        table.add_column(column, justify="right")
    for name, systems in results.items():
        for system, r in systems.items():
            speed = (f"{r['seconds']:.3f}", f"{r['tokens_per_second']:.0f}", str(r["positions"]))
            table.add_row(name, system, *speed, f"{r['against_bare']:.2f}x")
    report("learner", {"shapes": {n: vars(s) for n, s in SHAPES.items()}, "results": results}, table, arguments.json)


if __name__ == "__main__":
    main()

"""Compare this system with TRL's GRPOTrainer in one run: same model, images, K, update and forced completion lengths.

    python -m bench.vs_trl --json runs/bench/vs_trl.json            (needs the extra `bench`)

Every sample has the same length on both sides: the end-of-sequence token is never sampled before a per-sample maximum.
`equal-32` and `equal-128`: all alike. `tail`: seven completions of a group have 32 tokens, the eighth has 320.
Beside the two systems stand their bounds, measured in the same run: generation alone and learning alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.common import images, median, report, write_parquet
from saccade.config.load import parse_config
from saccade.config.options import threads_of
from saccade.config.run_config import RunConfig
from saccade.loop import step
from saccade.observe.metrics import read_metrics
from saccade.opening import open_run
from saccade.run import Run

PROMPTS, K = 8, 8
SCENARIOS: dict[str, tuple[int, ...]] = {
    "equal-32": (32,) * K,
    "equal-128": (128,) * K,
    "tail": (32,) * (K - 1) + (320,),
}
"""Scenario -> tokens of each of the K completions of every group."""
IMAGES = 512


def reward_color(completions: list[str], answer: list[str], **columns: object) -> list[float | None]:
    """The reward of both sides. The weights are random, so the score does not matter."""
    return [float(name in text) + 0.001 * (len(text) % 7) for text, name in zip(completions, answer, strict=True)]


def our_config(
    model: Path, lengths: tuple[int, ...], staleness: int, steps: int, work: Path, **rollout: Any
) -> RunConfig:
    """Return a configuration with the same work as TRL's: one update per batch, k3 KL with beta 0.04, no gradient
    checkpointing."""
    data = write_parquet(work / "images.parquet", images(IMAGES))
    # Phases that alternate may each use all cores; phases that overlap share them.
    threads = (os.cpu_count() or 1) if staleness == 0 else max(1, (os.cpu_count() or 1) // 2)
    return parse_config(
        {
            "output_dir": str(work / "run"),
            "steps": steps,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": [str(data)], "max_prompt_length": 256},
            "rollout": {
                "num_generations": K,
                "max_completion_length": max(lengths),
                "max_staleness": staleness,
                "admission": "strict",
                "kv_cache_gib": 0.25,
                "engine_options": {"max_num_seqs": PROMPTS * K * (1 + staleness)},
                **rollout,
            },
            "reward": {"functions": [{"name": "bench.vs_trl:reward_color"}]},
            "algorithm": {"kl": 0.04},
            "learner": {
                "prompts_per_step": PROMPTS,
                "learning_rate": 1e-4,
                "micro_batch": 4096,
                "zero_stage": 0,
                "gradient_checkpointing": [],
            },
            "cluster": {"device": "cpu", "resources": {role: {"CPU": threads} for role in ("rollout", "learner")}},
        }
    )


def ours(model: Path, lengths: tuple[int, ...], staleness: int, steps: int, warmup: int, work: Path) -> dict[str, Any]:
    """Return the seconds per step of the full system and, on the same actors, of generation and of learning alone."""
    total, alone = warmup + steps, 1 + min(steps, 5)
    config = our_config(model, lengths, staleness, total + alone, work)
    with open_run(config, resume=False, address=None, display=None) as run:
        return asyncio.run(_our_steps(run, config, lengths, staleness, total, alone, warmup))


async def _our_steps(
    run: Run, config: RunConfig, lengths: tuple[int, ...], staleness: int, total: int, alone: int, warmup: int
) -> dict[str, Any]:
    async with run.rollouts.running():
        dispatcher = run.rollouts.dispatcher
        dispatcher.sampling = replace(dispatcher.sampling, ignore_eos=True, stop_token_ids=(), max_tokens_each=lengths)
        ends = [time.perf_counter()]
        for _ in range(total):
            await step(run, config)
            ends.append(time.perf_counter())
        records = read_metrics(run.directory)[warmup:]
        generation, learning = [], []
        for batch in range(total, total + alone):
            start = time.perf_counter()
            run.rollouts.admit(batch - staleness)
            sealed = await run.rollouts.batch(batch)
            generation.append(time.perf_counter() - start)
        for _ in range(alone):
            start = time.perf_counter()
            run.learner.update(sealed.groups, sealed.summaries, run.version)
            learning.append(time.perf_counter() - start)
    assert {r["tokens"] for r in records} == {sum(lengths) * PROMPTS}, "lengths were not forced"
    seconds = median([b - a for a, b in itertools.pairwise(ends)][warmup:])
    return {
        "seconds_per_step": seconds,
        "samples_per_second": PROMPTS * K / seconds,
        # The first of each has work already done, or cold caches.
        "generation_alone": median(generation[1:]),
        "learning_alone": median(learning[1:]),
        "phases": {k: median([r["seconds"][k] for r in records]) for k in records[0]["seconds"]},
        "busy": {k: median([r["busy"][k] for r in records]) for k in records[0]["busy"]},
        "threads": threads_of(config, "rollout"),
    }


def trl(model: Path, lengths: tuple[int, ...], steps: int, warmup: int, work: Path) -> dict[str, Any]:
    """Return the seconds per step of TRL's GRPOTrainer with HF generation on all cores."""
    import torch
    from datasets import Dataset
    from transformers import LogitsProcessor, TrainerCallback
    from trl import GRPOTrainer

    class ForcedLengths(LogitsProcessor):
        """Ends row r after exactly `lengths[r % K]` tokens."""

        def __init__(self, prompt_length: int, eos: int) -> None:
            self.prompt_length, self.eos = prompt_length, eos

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            made = input_ids.shape[1] - self.prompt_length
            last = torch.tensor([lengths[r % K] for r in range(len(scores))]) <= made + 1
            scores = scores.masked_fill(last[:, None], -torch.inf)
            scores[:, self.eos] = torch.where(last, 0.0, -torch.inf)
            return scores

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    seen: list[int] = []

    def reward(completions: list[Any], answer: list[str], completion_ids: Any, **columns: object) -> list[float | None]:
        seen.append(sum(len(ids) for ids in completion_ids))
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return reward_color(texts, answer)

    message = [{"role": "user", "content": "What color?"}]
    rows = [{"prompt": message, "image": image, "answer": name} for image, name in images(IMAGES)]
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(model),
        args=_trl_config(max(lengths), warmup + steps, work),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=reward,
        callbacks=[clock],
    )
    generate = trainer.model.generate

    def forced(*args: Any, **kwargs: Any) -> Any:
        processor = ForcedLengths(kwargs["input_ids"].shape[1], trainer.processing_class.tokenizer.eos_token_id)
        return generate(*args, **kwargs, logits_processor=[processor])

    trainer.model.generate = forced
    trainer.train()
    expected = sum(lengths) * PROMPTS
    assert set(seen) == {expected}, f"lengths were not forced: {set(seen)} tokens a step, expected {expected}"
    seconds = [b - a for a, b in itertools.pairwise(clock.ends)][warmup - 1 :]
    return {"seconds_per_step": median(seconds), "samples_per_second": PROMPTS * K / median(seconds)}


def _trl_config(max_length: int, steps: int, work: Path) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=PROMPTS * K,
        num_generations=K,
        max_completion_length=max_length,
        learning_rate=1e-4,
        max_steps=steps,
        beta=0.04,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_steps=1000,
    )


def run_side(side: str, model: Path, scenario: str, steps: int, warmup: int) -> dict[str, Any]:
    """Run one measurement in its own process, so that neither side warms up or fragments the other."""
    command = [sys.executable, "-m", "bench.vs_trl", "--side", side, "--model", str(model), "--scenario", scenario]
    command += ["--steps", str(steps), "--warmup", str(warmup)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(scenarios: list[str], steps: int, warmup: int) -> dict[str, Any]:
    from vlm.tiny import TinySizes, build_tiny

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        model = build_tiny("qwen2_5_vl", Path(folder) / "model", sizes=TinySizes(layers=4))
        for scenario in scenarios:
            sides = {
                side: run_side(side, model, scenario, steps, warmup) for side in ("trl", "staleness-0", "staleness-1")
            }
            results[scenario] = sides
    return results


def show(results: dict[str, Any]) -> Table:
    table = Table(title=f"{PROMPTS} prompts x {K} completions a step, forced lengths; median of the steps")
    for column in (
        "lengths",
        "system",
        "s/step",
        "samples/s",
        "against TRL",
        "generation alone",
        "learning alone",
        "step / max of both",
    ):
        table.add_column(column, justify="right")
    for scenario, sides in results.items():
        base = sides["trl"]["samples_per_second"]
        for side, r in sides.items():
            alone = [f"{r[k]:.2f}" if k in r else "" for k in ("generation_alone", "learning_alone")]
            bound = f"{r['seconds_per_step'] / max(r['generation_alone'], r['learning_alone']):.2f}" if alone[0] else ""
            speed = r["samples_per_second"]
            table.add_row(
                scenario, side, f"{r['seconds_per_step']:.2f}", f"{speed:.1f}", f"{speed / base:.2f}x", *alone, bound
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=8, help="steps measured, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--side", choices=("trl", "staleness-0", "staleness-1"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scenarios = arguments.scenario or list(SCENARIOS)
    if arguments.side is None:
        results = measure(scenarios, arguments.steps, arguments.warmup)
        report(
            "vs_trl",
            {"prompts": PROMPTS, "K": K, "lengths": SCENARIOS, "results": results},
            show(results),
            arguments.json,
        )
        return
    lengths = SCENARIOS[scenarios[0]]
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        common = (arguments.steps, arguments.warmup, Path(folder))
        if arguments.side == "trl":
            result = trl(arguments.model, lengths, *common)
        else:
            result = ours(arguments.model, lengths, int(arguments.side[-1]), *common)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The demo: a tiny vision-language model learns to see, through the full system, on one machine's CPU.

    shapes data ─▶ random Qwen2.5-VL ─▶ warm start on the format ─▶ train (Ray, vLLM, DeepSpeed, gloo) ─▶ report

Everything it makes is under one folder: `data/`, `start/` (the model before and after the warm start), `run/` (what any
training run writes: metrics, checkpoints, the trained model), `summary.json` and `curves.png`.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from learner.durable import atomic_file, strict_json
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
from saccade.demo.curves import accuracy_table, plot, speed_table, summarise
from saccade.demo.shapes import ShapesFiles, make_shapes, vocabulary
from saccade.demo.warm_start import warm_start
from saccade.fleet.run_folder import in_use
from saccade.loop import train
from saccade.observe.display import TerminalDisplay
from saccade.observe.metrics import read_metrics
from saccade.observe.screen import say, show
from vlm.tiny import build_tiny

STEPS = 120


def demo_config(files: ShapesFiles, model: Path, output_dir: Path, *, seed: int, steps: int = STEPS) -> RunConfig:
    """Return the recipe. `docs/demo.md` explains its numbers and what fails without them."""
    return RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "steps": steps,
            "seed": seed,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": [str(files.train)],
                "eval": [str(files.test), str(files.unseen), str(files.blank)],
                "columns": {"group": "kind"},
                "max_prompt_length": 64,
            },
            "rollout": {
                "num_generations": 8,
                "max_completion_length": 10,
                "max_staleness": 1,
                "kv_cache_gib": 0.25,
                "engine_options": {"max_num_seqs": 512},
            },
            "reward": {"functions": [{"name": "format", "weight": 0.5}, {"name": "accuracy", "weight": 1.0}]},
            "algorithm": {"name": "grpo", "aggregation": "token", "kl": {"weight": 0.2}},
            "learner": {
                "prompts_per_step": 64,
                "learning_rate": 2e-3,
                "lr_schedule": {"name": "linear", "min_ratio": 0.05},
                "warmup_steps": min(10, steps - 1),
                "betas": [0.9, 0.99],
                "max_grad_norm": 1.0,
                "zero_stage": 1,
                "gradient_checkpointing": [],
            },
            "evaluation": {"every": 30},
            "cluster": {"device": "cpu"},
        }
    )


def run_demo(
    seed: int = 0, output_dir: str | Path = "runs/demo", steps: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and return its summary. It replaces an earlier demo in `output_dir`.

    Raises ConfigError if `output_dir` contains other files, and SystemExit(130) if it was stopped, after saving a
    checkpoint."""
    begin = time.perf_counter()
    console = console or Console()
    directory = Path(output_dir)
    prepare_folder(directory)
    _chapter(console, 1, "data: drawings of shapes; some combinations are held out")
    files = make_shapes(directory / "data", seed)
    _chapter(console, 2, "model: a random Qwen2.5-VL of 0.7M parameters")
    model = build_tiny("qwen2_5_vl", directory / "start" / "random", seed=seed, words=vocabulary())
    _chapter(console, 3, "warm start: learn the answer format from random answers")
    warm = warm_start(model, files.train, files.test, directory / "start" / "warm", seed=seed)
    guesses = " ".join(f"{kind} {share:.2f}" for kind, share in warm.accuracy.items())
    say(
        console,
        f"  {warm.format_rate:.0%} of completions in the format; accuracy {guesses} (guesses)  ({warm.seconds:.0f} s)",
    )
    config = demo_config(files, warm.model, directory / "run", seed=seed, steps=steps or STEPS)
    _chapter(
        console,
        4,
        f"GRPO: {config.steps} steps of {config.learner.prompts_per_step} prompts x "
        f"{config.rollout.num_generations} completions, staleness at most {config.rollout.max_staleness}",
    )
    result = train(config, display=TerminalDisplay(console))
    if result.interrupted:
        say(console, f"stopped; continue with: saccade train {directory / 'run' / 'config.yaml'} --resume")
        raise SystemExit(130)
    records, evaluations = read_metrics(result.output_dir), read_metrics(result.output_dir, "evaluation")
    seconds = time.perf_counter() - begin
    summary = summarise(records, evaluations, warm_start_seconds=warm.seconds, total_seconds=seconds)
    atomic_file(directory / "summary.json", strict_json(summary, 2) + "\n")
    plot(records, evaluations, directory / "curves.png", title=f"A tiny VLM learns to see (seed {seed})")
    show(console, accuracy_table(summary), speed_table(summary))
    say(console, f"model {result.model_dir}  curves {directory / 'curves.png'}  figures {directory / 'summary.json'}")
    return summary


def _chapter(console: Console, number: int, text: str) -> None:
    say(console, f"{number} ", style="bold", end="")
    say(console, text)


def prepare_folder(directory: Path) -> None:
    """Remove an earlier demo from `directory`. Raises ConfigError and removes nothing if there are other files."""
    if holder := in_use(directory / "run"):
        raise ConfigError([holder])
    made = {"data", "start", "run", "summary.json", "curves.png"}
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if foreign := sorted(present - made):
        raise ConfigError(
            [f"output_dir: {directory} contains {', '.join(foreign[:3])}, which no demo wrote; name another folder"]
        )
    for name in present:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

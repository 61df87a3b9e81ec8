"""Measure tokens per second of the rollout engine: prompts with one image, K = 8, forced lengths, all requested at
once."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_parts.common import Setting, shapes
from bench.learner_work import Shape, make_groups
from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.engines.vllm_engine import VLLMEngine
from rollout.types import Prompt, PromptRef
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

WORK = Shape({"3B": 64}, edge=896, words=40, new=256)
SMALL_WORK = Shape({"3B": 4}, edge=112, words=10, new=16)


def run(setting: Setting) -> dict[str, Any]:
    work = SMALL_WORK if setting.small else WORK
    shape = shapes(setting)["3B"]
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = shape.build(Path(folder) / "model", setting.device)
        adapter = load_adapter(str(path))
        return asyncio.run(_measure(setting, path, adapter, _prompts(adapter, work, shape.vocabulary), work))


def _prompts(adapter: MultimodalAdapter, work: Shape, vocabulary: int) -> list[Prompt]:
    groups, media = make_groups(adapter, work, work.groups["3B"], vocabulary)
    made = []
    for number, group in enumerate(groups):
        images = tuple(
            replace(item, data=media[item.digest], width=work.edge, height=work.edge) for item in group.prompt.media
        )
        ids = adapter.tokenize(group.prompt.text)
        length = adapter.expanded_length(ids, images)
        ref = PromptRef(f"bench:{number}")
        made.append(Prompt(ref, group.prompt.text, np.asarray(ids, np.int32), length, images))
    return made


async def _measure(
    setting: Setting, path: Path, adapter: MultimodalAdapter, prompts: list[Prompt], work: Shape
) -> dict[str, Any]:
    options = EngineOptions(
        ModelConfig(str(path), dtype="bfloat16" if setting.cuda else "float32"),
        RolloutConfig(kv_cache_gib=None if setting.cuda else 0.25),
        device=setting.device,
        max_model_len=2048,
    )
    engine = VLLMEngine(options, adapter)
    start = time.perf_counter()
    await engine.start()
    found: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    try:
        for turn in ("first", "second"):
            seconds, tokens = await _once(engine, prompts, work, seed=len(found))
            found[f"{turn}_tokens_per_second"] = tokens / seconds
        expected = len(prompts) * work.K * work.new
        return {**found, "tokens": tokens, "checks": {"every completion has its length": tokens == expected}}
    finally:
        await engine.shutdown()


async def _once(engine: VLLMEngine, prompts: list[Prompt], work: Shape, seed: int) -> tuple[float, int]:
    sampling = SamplingParams(n=work.K, max_tokens=work.new, seed=seed, ignore_eos=True)
    start = time.perf_counter()
    outputs = await asyncio.gather(*(engine.sample(prompt, prompt.media, sampling) for prompt in prompts))
    tokens = sum(completion.num_tokens for output in outputs for completion in output.completions)
    return time.perf_counter() - start, tokens

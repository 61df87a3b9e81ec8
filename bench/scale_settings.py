"""The settings of `bench.scale`: what was published about two models, and what is assumed.

Assumptions: lengths are log-normal with sigma 0.25; a prompt has 300 tokens, 256 of them the image; an engine's step
takes as long whatever runs in it; all of a published step is training, which overstates it.
"""

from __future__ import annotations

from dataclasses import dataclass

IN_FLIGHT = 32
"""Groups of each engine."""
SIGMA = 0.25
PUBLISHED_ENGINES = 4
"""Engines of both published settings: 8 GPUs with tensor parallelism 2, and 16 with 4."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model's published times."""

    decode_seconds: float
    """Seconds of one step of an engine."""
    tokens: int
    """Median of a completion: the published mean, less exp(SIGMA**2 / 2)."""
    completions: int
    """K."""
    step_seconds: float
    """Seconds of an optimizer step, all of which are taken for training."""
    step_completions: int
    staleness: int
    step_source: str
    decode_source: str


SETTINGS = {
    "Qwen2.5-VL-7B": Setting(
        decode_seconds=0.031,
        tokens=363,
        completions=5,
        step_seconds=180.0,
        step_completions=512 * 5,
        staleness=3,
        step_source="EasyR1 assets/baselines.md, geometry3k on 8 H100: 180 s for 512 prompts x 5, and 1,200 tokens/s a "
        "GPU, hence 675 tokens a completion with its prompt. The staleness is not from there",
        decode_source="vllm-ascend issue 776, on an NPU: inter-token latency at 4 requests/s",
    ),
    "Qwen3.5-35B-A3B": Setting(
        decode_seconds=0.0247,
        tokens=1191,
        completions=8,
        step_seconds=33.84,
        step_completions=64 * 8,
        staleness=7,
        step_source="verl docs/advance/v1_async_trainer.md, separate_async on 32 H100: 14.10 h for 150 steps of 64 "
        "prompts x 8 (8 from its tokens/s), 12,288 tokens a completion. Both are ten times shorter here",
        decode_source="GPUStack performance lab, FP8 on an H200: mean time per output token of ShareGPT",
    ),
}

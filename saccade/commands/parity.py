"""`saccade parity`: compare what the engine and the learner make of the same prompts, case by case.

prompt ──▶ vLLM: sampled tokens, their log-probabilities ──▶ learner: log-probabilities of the same tokens
                                                             and again with other pixels, which must move them
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from learner.config import LearnerConfig
from learner.durable import strict_json
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from learner.update import Updater
from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.engines.vllm_engine import VLLMEngine
from rollout.types import Completion, Prompt, RolloutGroup
from saccade.commands.parity_cases import case_prompt, cases, shape
from saccade.config.demands import Device
from saccade.config.messages import ConfigError
from saccade.errors import RunError
from saccade.observe.screen import say, show
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.errors import AdapterError
from vlm.families.registry import load_adapter
from vlm.media.types import Media
from vlm.media.video_audio import decode
from vlm.tiny import TINY, build_tiny
from vlm.tiny.noise import noise

COMPLETIONS, NEW_TOKENS = 4, 8
ENGINE_SHARE = 0.5
"""The share of a GPU that must be free when the engine starts."""
DType = Literal["float32", "bfloat16"]
VISIBLE = 1e-3
"""Changed pixels count as seen if they move a log-probability by more than this."""
TOLERANCES: Mapping[str, float] = {"float32": 2.0**-15, "bfloat16": 0.05}
"""Allowed difference of log-probabilities: the largest one in float32, the mean in bfloat16. In float32 a
log-probability of 8 to 16 is rounded to steps of 2^-20; processors sum in different orders, which moves it by a few
steps after some layers. 32 steps are allowed; a wrong position or pixel moves it by thousands. In bfloat16 a logit of
up to 8 is rounded to steps of 2^-5, by up to 2^-6 = 0.016 on either side, and by about as much again in the layers. A
single token may be far off, but the mean of two correct sides stays below 0.05."""
PIXELS = 1e-5
"""Tower inputs that differ by at most this are equal; the normalisation rounds by that much."""


@dataclass(frozen=True)
class CaseResult:
    """The result of one case: engine and learner compared on the same prompt and the same sampled tokens."""

    case: str
    prompt_tokens: int = 0
    tokens: int = 0
    """How many sampled tokens were compared."""
    largest: float = float("nan")
    """Largest |log-probability of the learner - of the engine|."""
    mean: float = float("nan")
    pixels: float | None = None
    """Largest difference of the towers' inputs, over pixels and sound samples; None without media."""
    moved: float | None = None
    """Largest change of a log-probability when other media are shown; None without media."""
    problem: str = ""
    """Why there is no comparison (different prompt tokens, an error); empty if there is one."""

    def agrees(self, tolerance: float, dtype: str = "float32") -> bool:
        seen = self.moved is None or self.moved > VISIBLE
        difference = self.largest if dtype == "float32" else self.mean
        return not self.problem and difference <= tolerance and (self.pixels or 0.0) <= PIXELS and seen


@dataclass(frozen=True)
class Sampled:
    """The engine's result for one prompt."""

    group: RolloutGroup
    inputs: Mapping[str, Tensor]
    """The inputs of its towers."""


def parity(
    model: str,
    *,
    images: int = 3,
    video: bool = True,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    max_image_tokens: int | None = None,
    kv_cache_gib: float = 4.0,
    seed: int = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> list[CaseResult]:
    """Compare vLLM and the learner's model on `device`, in all cases of `cases`. The engine runs first and ends before
    the learner loads, so that one GPU is enough.

    Raises AdapterError if the model does not exist, and RunError if the engine does not start."""
    family = load_adapter(model, adapter, trust_remote_code=trust_remote_code, max_image_tokens=max_image_tokens)
    on_both_sides = ModelConfig(model, dtype=dtype, adapter=adapter, trust_remote_code=trust_remote_code)
    chosen = cases(family, images, video)
    prompts = [case_prompt(family, name, parts, seed) for name, parts in chosen.items()]
    options = EngineOptions(
        on_both_sides,
        # With a cache of images it would not say again what it made of one; graphs are not worth capturing here.
        RolloutConfig(
            kv_cache_gib=kv_cache_gib,
            engine_options={
                "mm_processor_cache_gb": 0,
                "enforce_eager": True,
                "max_num_seqs": COMPLETIONS,
                "gpu_memory_utilization": ENGINE_SHARE,
            },
        ),
        max_model_len=max(p.expanded_length for p in prompts) + NEW_TOKENS,
        device=device,
        max_media_per_prompt={kind: max(parts.count(kind) for parts in chosen.values()) for kind in family.modalities},
    )
    sampled = asyncio.run(_sample(VLLMEngine(options, family), family, prompts))
    learner_options = LearnerOptions(
        on_both_sides,
        total_steps=1,
        device=device,
        learner=LearnerConfig(gradient_checkpointing=(), micro_batch=2**20),
    )
    learner = TorchEngine(learner_options, family)
    return [compare(learner, family, learner_options, p, s, seed) for p, s in zip(prompts, sampled, strict=True)]


async def _sample(engine: VLLMEngine, family: MultimodalAdapter, prompts: Sequence[Prompt]) -> list[Sampled | str]:
    """Return the result of each prompt, or the reason why there is none."""
    sampling = SamplingParams(
        n=COMPLETIONS, max_tokens=NEW_TOKENS, seed=1, ignore_eos=True, banned_token_ids=family.banned_token_ids
    )
    try:
        await engine.start()
    except RuntimeError as error:
        raise RunError(str(error)) from error
    try:
        results: list[Sampled | str] = []
        for prompt in prompts:
            try:
                output = await engine.sample(prompt, prompt.media, sampling)
                inputs = await engine.processed_media(prompt, prompt.media)
            except Exception as error:  # whatever the engine says is the finding of this case
                results.append(f"engine: {type(error).__name__}: {error}")
                continue
            group = RolloutGroup(prompt, output.prompt_token_ids, output.completions, engine="vllm")
            results.append(Sampled(group, inputs))
        return results
    finally:
        await engine.shutdown()


def compare(
    learner: TorchEngine,
    family: MultimodalAdapter,
    options: LearnerOptions,
    prompt: Prompt,
    sampled: Sampled | str,
    seed: int = 0,
) -> CaseResult:
    """Compare both sides on one prompt. `seed` is the seed of the prompt's media."""
    name = prompt.ref.uid
    if isinstance(sampled, str):
        return CaseResult(name, problem=sampled)
    group = sampled.group

    def score(media: Sequence[Media]) -> np.ndarray:
        data = {own.digest: other.data for own, other in zip(prompt.media, media, strict=True)}
        (values,) = Updater(learner, family, options).score([group], data)
        return np.concatenate(values)

    theirs = np.concatenate([_logprobs(c) for c in group.completions])
    result = CaseResult(name, len(group.prompt_token_ids), len(theirs))
    try:
        ours = score(prompt.media)
        result = replace(result, largest=float(np.abs(ours - theirs).max()), mean=float(np.abs(ours - theirs).mean()))
        if not prompt.media:
            return result
        others = [noise(m.kind, seed + 100 + i, **shape(m)) for i, m in enumerate(prompt.media)]
        moved = float(np.abs(score(others) - ours).max())
        return replace(result, moved=moved, pixels=_pixel_difference(family, prompt, sampled.inputs))
    except Exception as error:  # as with the engine: the finding of this case
        return replace(result, problem=f"learner: {type(error).__name__}: {error}")


def _pixel_difference(family: MultimodalAdapter, prompt: Prompt, theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of the towers' inputs. Raises AdapterError if an input differs in shape, or if no
    input has the same name on both sides."""
    encoded = family.encode(prompt.text, [decode(m, m.data) for m in prompt.media])
    ours, theirs = family.comparable(encoded.inputs, theirs)
    shared = [name for name, value in theirs.items() if name in ours and value.is_floating_point()]
    different = [name for name in shared if ours[name].numel() != theirs[name].numel()]
    if different or not shared:
        sides = [{name: tuple(value.shape) for name, value in side.items()} for side in (ours, theirs)]
        raise AdapterError(f"the towers' inputs differ in shape: {sides[0]}, in vLLM {sides[1]}")
    # vLLM hands its towers' inputs on in the precision of the model.
    rounded = {n: ours[n].flatten().to(theirs[n].dtype).double() for n in shared}
    return max(float((rounded[n] - theirs[n].flatten().double()).abs().max()) for n in shared)


def _logprobs(completion: Completion) -> np.ndarray:
    (segment,) = completion.segments
    assert segment.logprobs is not None
    return segment.logprobs


def run_parity(
    model: str | None,
    *,
    tiny: str | None,
    images: int,
    video: bool,
    tolerance: float | None,
    path: Path | None,
    console: Console,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    max_image_tokens: int | None = None,
    device: Device | None = None,
    dtype: DType = "float32",
) -> bool:
    """Run `parity` on a model, on the tiny model of a family, or on those of all families (`all`). Print a table and
    write JSON.

    Returns whether everything agreed. Give exactly one of `model` and `tiny`. Raises ConfigError."""
    if tiny is not None and tiny != "all" and tiny not in TINY:
        raise ConfigError([f"no tiny model of family {tiny!r}; choose one of {', '.join(sorted(TINY))}, all"])
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    families = sorted(TINY) if tiny == "all" else [tiny or ""]
    results: dict[str, list[CaseResult]] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-parity-") as folder:
        for family in families:
            source = model if model is not None else str(build_tiny(family, Path(folder) / family))
            name = model or family
            results[name] = parity(
                source,
                images=images,
                video=video,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                max_image_tokens=max_image_tokens,
                kv_cache_gib=4.0 if model is not None else 0.25,
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype=dtype,
            )
            show(console, _table(name, results[name], limit, dtype))
            for result in results[name]:
                if result.problem:
                    say(console, f"{result.case}: {result.problem}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: [asdict(result) for result in own] for name, own in results.items()}
        path.write_text(strict_json(found, 1) + "\n")
    return all(result.agrees(limit, dtype) for own in results.values() for result in own)


def _table(name: str, results: Sequence[CaseResult], tolerance: float, dtype: str) -> Table:
    judged = "largest" if dtype == "float32" else "mean"
    title = f"{name}, {dtype}: |log-probability of the learner - of vLLM|; {judged} up to {tolerance:g} agrees"
    table = Table(title=title, title_justify="left")
    for column in ("case", "prompt tokens", "largest", "mean", "pixels", "moved", "agrees"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        moved = "" if r.moved is None else f"{r.moved:.2f}"
        pixels = "" if r.pixels is None else "equal" if r.pixels == 0 else f"{r.pixels:.1e}"
        verdict = "yes" if r.agrees(tolerance, dtype) else Text("no", style="bold red")
        table.add_row(r.case, str(r.prompt_tokens), f"{r.largest:.1e}", f"{r.mean:.1e}", pixels, moved, verdict)
    return table

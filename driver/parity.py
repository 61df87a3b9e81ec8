"""Do engine and learner see the same pixels, tokens and positions? Asked of a model, case by case.

prompt ──▶ vLLM: sampled tokens, their log-probabilities ──▶ learner: log-probabilities of the same tokens
                                                             and again with other pixels, which must move them
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from driver.config import ConfigError
from learner.torch_engine import TorchEngine
from learner.types import EncodingMismatchError, LearnerOptions
from learner.update import score_groups
from rollout.engine import EngineOptions, RolloutEngine, SamplingParams
from rollout.types import Completion, Media, Prompt, PromptRef, RolloutGroup
from rollout.vllm_engine import VLLMEngine
from vlm.adapter import AdapterError, MultimodalAdapter
from vlm.media import digest
from vlm.registry import load_adapter
from vlm.tiny import TINY, build_tiny

SIZES = ((84, 84), (120, 60), (60, 150))
"""Width and height of the images: square, wide and high."""
COMPLETIONS, NEW_TOKENS = 4, 8
VISIBLE = 1e-3
"""By less than this, changed pixels do not count as seen."""


@dataclass(frozen=True)
class CaseResult:
    """One case: what engine and learner make of the same prompt and the same sampled tokens."""

    case: str
    prompt_tokens: int = 0
    tokens: int = 0
    """Sampled tokens compared."""
    largest: float = float("nan")
    """Largest |log-probability of the learner - of the engine|."""
    mean: float = float("nan")
    moved: float | None = None
    """Largest change of a log-probability when the pixels are inverted; None without media."""
    problem: str = ""
    """Why there is no comparison: other prompt tokens, an error."""

    def agrees(self, tolerance: float) -> bool:
        return not self.problem and self.largest <= tolerance and (self.moved is None or self.moved > VISIBLE)


def parity(
    model: str, *, images: int = 3, adapter: str | None = None, trust_remote_code: bool = False, seed: int = 0
) -> list[CaseResult]:
    """Compare vLLM and the learner's model on this machine's CPU, in float32.

    Cases: text alone; one image; `images` images; images with text between them. Raises AdapterError when there is no
    such model, RuntimeError when the engine does not start."""
    family = load_adapter(model, adapter, trust_remote_code=trust_remote_code)
    prompts = [case_prompt(family, name, parts, seed) for name, parts in cases(family, images).items()]
    options = EngineOptions(
        model,
        dtype="float32",
        max_model_len=max(p.expanded_length for p in prompts) + NEW_TOKENS,
        max_num_seqs=COMPLETIONS,
        device="cpu",
        kv_cache_gib=0.25,
        max_images_per_prompt=max(1, images),
        trust_remote_code=trust_remote_code,
    )
    groups = asyncio.run(_generate(VLLMEngine(options, family), family, prompts))
    learner_options = LearnerOptions(
        model,
        total_steps=1,
        device="cpu",
        dtype="float32",
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        gradient_checkpointing=False,
        micro_batch_tokens=2**20,
    )
    learner = TorchEngine(learner_options, family)
    return [compare(learner, family, learner_options, p.ref.uid, g) for p, g in zip(prompts, groups, strict=True)]


def cases(family: MultimodalAdapter, images: int) -> dict[str, list[str | None]]:
    """Name -> parts of the user's message: texts, and None for an image."""
    cases: dict[str, list[str | None]] = {"text": ["Name a number."]}
    if family.has_vision:
        cases["1 image"] = [None, "What is this?"]
        cases[f"{images} images"] = [*[None] * images, "What are these?"]
        cases["interleaved"] = ["First", None, "then", None, "and what now?"]
    return cases


def case_prompt(family: MultimodalAdapter, name: str, parts: Sequence[str | None], seed: int) -> Prompt:
    places = [part is None for part in parts].count(True)
    media = tuple(_noise(seed + i, *SIZES[i % len(SIZES)]) for i in range(places))
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    plain = "".join(part for part in parts if part is not None)
    text = family.render([{"role": "user", "content": content if family.has_vision else plain}])
    ids = family.tokenize(text)
    length = family.expanded_length(ids, [(m.height, m.width) for m in media])
    return Prompt(PromptRef(name), text, np.asarray(ids, np.int32), length, media)


def _noise(seed: int, width: int, height: int, *, inverted: bool = False) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(255 - pixels if inverted else pixels).save(buffer, "PNG")
    return Media("image", digest(buffer.getvalue()), buffer.getvalue(), width, height)


async def _generate(
    engine: RolloutEngine, family: MultimodalAdapter, prompts: Sequence[Prompt]
) -> list[RolloutGroup | str]:
    """The group of each prompt, or why there is none."""
    sampling = SamplingParams(
        n=COMPLETIONS, max_tokens=NEW_TOKENS, seed=1, ignore_eos=True, banned_token_ids=family.banned_token_ids
    )
    await engine.start()
    try:
        groups: list[RolloutGroup | str] = []
        for prompt in prompts:
            try:
                output = await engine.generate(prompt, prompt.media, sampling)
            except Exception as error:  # whatever the engine says is the finding of this case
                groups.append(f"engine: {type(error).__name__}: {error}")
                continue
            groups.append(RolloutGroup(prompt, output.prompt_token_ids, output.completions, engine="vllm"))
        return groups
    finally:
        await engine.shutdown()


def compare(
    learner: TorchEngine, family: MultimodalAdapter, options: LearnerOptions, name: str, group: RolloutGroup | str
) -> CaseResult:
    if isinstance(group, str):
        return CaseResult(name, problem=group)

    def score(media: Mapping[str, bytes]) -> np.ndarray:
        (values,) = score_groups(learner, family, options, [group], media)
        return np.concatenate(values)

    sampled = np.concatenate([_logprobs(c) for c in group.completions])
    media = {m.digest: m.data for m in group.prompt.media}
    try:
        ours = score(media)
        moved = None
        if media:
            inverted = {key: _invert(data) for key, data in media.items()}
            moved = float(np.abs(score(inverted) - ours).max())
    except (EncodingMismatchError, AdapterError) as error:
        return CaseResult(name, len(group.prompt_token_ids), len(sampled), problem=str(error))
    difference = np.abs(ours - sampled)
    result = CaseResult(name, len(group.prompt_token_ids), len(sampled), moved=moved)
    return replace(result, largest=float(difference.max()), mean=float(difference.mean()))


def _logprobs(completion: Completion) -> np.ndarray:
    (segment,) = completion.segments
    assert segment.logprobs is not None
    return segment.logprobs


def _invert(data: bytes) -> bytes:
    """The same image with every pixel inverted: other pixels, the same tokens."""
    buffer = io.BytesIO()
    Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(data)))).save(buffer, "PNG")
    return buffer.getvalue()


def run_parity(
    model: str | None, *, tiny: str | None, images: int, tolerance: float, path: Path | None, console: Console
) -> bool:
    """`parity` of a model, or of the tiny model of a family (`all`: of every family), as a table and as JSON.

    Returns whether everything agreed. Raises ConfigError unless exactly one of `model` and `tiny` is given."""
    if (model is None) == (tiny is None):
        raise ConfigError(["give either a model or --tiny FAMILY (or --tiny all)"])
    if tiny is not None and tiny != "all" and tiny not in TINY:
        raise ConfigError([f"no tiny model of family {tiny!r}; there are: {', '.join(sorted(TINY))}, all"])
    families = sorted(TINY) if tiny == "all" else [tiny or ""]
    results: dict[str, list[CaseResult]] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-parity-") as folder:
        for family in families:
            source = model if model is not None else str(build_tiny(family, Path(folder) / family))
            name = model or family
            results[name] = parity(source, images=images)
            console.print(_table(name, results[name], tolerance))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({n: [asdict(r) for r in rs] for n, rs in results.items()}, indent=1) + "\n")
    return all(result.agrees(tolerance) for own in results.values() for result in own)


def _table(name: str, results: Sequence[CaseResult], tolerance: float) -> Table:
    table = Table(title=f"{name}: |log-probability of the learner - of vLLM|", title_justify="left")
    for column in ("case", "prompt tokens", "largest", "mean", "moved by other pixels", "agrees"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        moved = "" if r.moved is None else f"{r.moved:.2f}"
        verdict = "yes" if r.agrees(tolerance) else f"[bold red]no[/bold red] {escape(r.problem)}"
        table.add_row(r.case, str(r.prompt_tokens), f"{r.largest:.1e}", f"{r.mean:.1e}", moved, verdict)
    return table

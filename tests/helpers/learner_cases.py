"""Scored groups for learner tests, and what they must give: computed one completion at a time, in float64, from the
Hugging Face model's own logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.advantages import ADVANTAGES
from learner.batching.rows import TrainingRow
from learner.config import AlgorithmConfig, Clipped, Current, Kl, LearnerConfig
from learner.engines.protocol import TrainEngine
from learner.features.frozen_towers import FrozenTowers
from learner.types import LearnerOptions
from learner.update import Share, Updater
from rollout.config import RolloutConfig
from rollout.types import Completion, Prompt, PromptRef, RolloutGroup, Segment, Verdict
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.media.types import Media
from vlm.media.video_audio import decode
from vlm.tiny.noise import noise, noise_image

QUESTIONS = ("what is it?", "which colour does it have?", "count.", "describe the picture in a few words, please.")

FEW_ROWS = 2**13
"""Bytes of logits (`CHUNK_BYTES`) that are few rows of a tiny model, so that they are computed in several chunks."""

ROUNDED = 2.0**-20
"""By how much of its size a result may differ that float64 computes in two orders. The orders differ by 2^-52 a step,
but transformers' norms and rotary embeddings round to float32 within, and a value between two of its numbers may become
the one or the other, 2^-24 apart: sixteen of those."""


def exact_dtype(model: Path) -> Any:
    """float64; float32 for Aria, whose experts transformers multiplies with a kernel that has no other."""
    return "float32" if adapter_of(model).model_config.model_type == "aria" else "float64"


@functools.cache
def adapter_of(model: Path) -> MultimodalAdapter:
    return load_adapter(str(model))


def options(model: Path, **changes: Any) -> LearnerOptions:
    """Small, on the CPU, without clipping of gradients unless asked for."""
    plain = LearnerOptions(
        ModelConfig(str(model), dtype="float32"),
        total_steps=10,
        device="cpu",
        algorithm=AlgorithmConfig(kl=Kl(0.1), off_policy=Current()),
        learner=LearnerConfig(learning_rate=1e-2, max_grad_norm=1e9, micro_batch=4096, gradient_checkpointing=()),
        rollout=RolloutConfig(max_staleness=0),
        timeout=120.0,
    )
    return changed(plain, **changes)


def changed(chosen: LearnerOptions, **changes: Any) -> LearnerOptions:
    """`chosen` with other knobs, each in the section that has it."""
    for name in ("model", "algorithm", "learner", "rollout"):
        section = getattr(chosen, name)
        own = {knob.name for knob in fields(section)} & changes.keys()
        chosen = replace(chosen, **{name: replace(section, **{knob: changes.pop(knob) for knob in own})})
    return replace(chosen, **changes)


def make_group(
    adapter: MultimodalAdapter,
    seed: int,
    *,
    images: int = 1,
    media: Sequence[str] | None = None,
    completions: int = 3,
    version: int = 0,
    scores: Sequence[float | None] | None = None,
) -> RolloutGroup:
    """A group with random tokens and behaviour log-probabilities. `media`: kinds, instead of a number of images.
    `scores[k]` None: completion k was not scored."""
    random = np.random.default_rng(seed)
    kinds = ["image"] * images if media is None else media
    items = tuple(_item(kind, 10 * seed + i, 56 + 28 * i) for i, kind in enumerate(kinds))
    content: Any = [*({"type": kind} for kind in kinds), {"type": "text", "text": QUESTIONS[seed % len(QUESTIONS)]}]
    if not adapter.modalities:
        content = QUESTIONS[seed % len(QUESTIONS)]
    text = adapter.render([{"role": "user", "content": content}])
    encoded = adapter.encode(text, [decode(m, m.data) for m in items])
    unexpanded = np.asarray(adapter.tokenize(text), np.int32)
    prompt = Prompt(PromptRef(f"test:{seed}"), text, unexpanded, len(encoded.input_ids), items)
    scores = scores if scores is not None else [float(x) for x in random.integers(0, 3, completions)]
    made = []
    for k in range(len(scores)):
        length = int(random.integers(1, 9))
        tokens = random.integers(0, 250, length).astype(np.int32)
        logprobs = -random.random(length).astype(np.float32) * 6
        segment = Segment(tokens, logprobs, np.full(length, version, np.int32))
        made.append(Completion((segment,), "", "stop", k))
    verdicts = tuple(Verdict.scored(s) if s is not None else Verdict("timeout", reason="slow") for s in scores)
    return RolloutGroup(prompt, encoded.input_ids.numpy().astype(np.int32), tuple(made), verdicts, engine="rollout-0")


def _item(kind: str, seed: int, size: int) -> Media:
    return noise_image(seed, size, size) if kind == "image" else noise(kind, seed)


@dataclass(frozen=True)
class Case:
    """A sealed batch, ready for an update."""

    groups: list[RolloutGroup]
    advantages: list[list[float]]
    media: dict[str, bytes]

    def part(self, members: Sequence[int]) -> Case:
        return Case([self.groups[i] for i in members], [self.advantages[i] for i in members], self.media)

    def share(self, minibatches: Sequence[int] | None = None) -> Share:
        return Share(self.groups, self.advantages, self.media, minibatches)


def mixed_case(adapter: MultimodalAdapter) -> Case:
    """One image, none, two; different lengths; an unscored sibling; a group whose scores are equal."""
    groups = [
        make_group(adapter, 0, images=1, scores=[0.0, 1.0, 2.0, None]),
        make_group(adapter, 1, images=0, scores=[1.0, 0.0, 0.0, 1.0]),
        make_group(adapter, 2, images=2, scores=[1.0, 1.0, 1.0, 1.0]),
        make_group(adapter, 3, images=1, scores=[0.0, 0.5, 0.25, 3.0]),
    ]
    return make_case(groups)


def make_case(groups: list[RolloutGroup]) -> Case:
    advantages = []
    for group in groups:
        assert group.verdicts is not None
        rewards = np.array([[v.score if v.score is not None else 0.0 for v in group.verdicts]])
        advantages.append(ADVANTAGES["grpo"](rewards, np.array([[v.valid for v in group.verdicts]]))[0].tolist())
    return Case(groups, advantages, {m.digest: m.data for g in groups for m in g.prompt.media})


def rows_of(adapter: MultimodalAdapter, chosen: LearnerOptions, case: Case) -> list[TrainingRow]:
    """Of all groups."""
    nothing: Any = None  # no engine is needed
    return [row for part in Updater(nothing, adapter, chosen).rows(case.share()) for row in part]


def update(
    engine: TrainEngine,
    chosen: LearnerOptions,
    case: Case,
    *,
    version: int = 0,
    minibatches: Sequence[int] | None = None,
    towers: FrozenTowers | None = None,
) -> dict[str, Any]:
    """One update by `engine`; the fields of its RankStats."""
    stats = updater(engine, chosen, towers).update(case.share(minibatches), version)
    return {f.name: getattr(stats, f.name) for f in fields(stats)}


def updater(engine: TrainEngine, chosen: LearnerOptions, towers: FrozenTowers | None = None) -> Updater:
    return Updater(engine, engine.adapter, chosen, towers)  # type: ignore[attr-defined]


@dataclass
class Expected:
    """Loss, and gradients by parameter name."""

    loss: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    logprobs: list[list[Tensor]] = field(default_factory=list)
    """Per group and completion, float64 `[T]`."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


def expected_update(model: Path, case: Case, chosen: LearnerOptions, dtype: torch.dtype = torch.float64) -> Expected:
    """The update's loss and gradients, by a forward in `dtype` over each completion alone, unpadded, with its own copy
    of the images, and the formulas written out."""
    adapter = adapter_of(model)
    policy = adapter.model_class().from_pretrained(model, dtype=dtype).train()
    adapter.prepare_model(policy)
    result, total = Expected(), torch.zeros((), dtype=torch.float64)
    clip, temperature = chosen.algorithm.loss, chosen.rollout.temperature
    assert isinstance(clip, Clipped)
    for group, advantages in zip(case.groups, case.advantages, strict=True):
        assert group.verdicts is not None
        result.logprobs.append([])
        media = [decode(m, case.media[m.digest]) for m in group.prompt.media]
        for completion, advantage, verdict in zip(group.completions, advantages, group.verdicts, strict=True):
            (segment,) = completion.segments
            logprobs = _logprobs(policy, adapter, group.prompt.text, media, segment.token_ids, temperature)
            result.logprobs[-1].append(logprobs.detach())
            if not verdict.valid:
                continue
            old = torch.from_numpy(segment.logprobs).double()
            if isinstance(chosen.algorithm.off_policy, Current):
                old = logprobs.detach()
            for new, former in zip(logprobs, old, strict=True):
                ratio = (new - former).exp()
                bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
                # The reference is the very same model: k3 is 0, and so is its gradient.
                total = total - torch.min(ratio * advantage, bounded * advantage)
            result.tokens += len(logprobs)
    loss = total / result.tokens
    loss.backward()
    result.loss = loss.item()
    result.gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return result


def _logprobs(
    policy: torch.nn.Module,
    adapter: MultimodalAdapter,
    text: str,
    items: list[Any],
    tokens: np.ndarray,
    temperature: float,
) -> Tensor:
    encoded = adapter.encode(text, items)
    ids = torch.cat([encoded.input_ids, torch.from_numpy(tokens).long()])[None]
    given = {n: v.to(policy.dtype) if v.is_floating_point() else v for n, v in encoded.inputs.items()}
    given.pop("video_frames", None)  # ours, for batches
    positions = adapter.position_ids(ids, torch.ones_like(ids), encoded.inputs)
    logits = policy(input_ids=ids, position_ids=positions, **given, **adapter.token_inputs(ids)).logits[0]
    logits[:, list(adapter.banned_token_ids)] -= 100.0
    distributions = (logits / temperature).log_softmax(-1)
    first = len(encoded.input_ids)
    return torch.stack([distributions[first + t - 1, token] for t, token in enumerate(tokens.tolist())])

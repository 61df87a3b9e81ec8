"""The work that `bench.learner` gives to every system: models, shapes, samples, tensors, and their FLOPs.

Shape ──make_groups──▶ groups ──rows_of──▶ rows ──batches_of──▶ micro-batches of this learner
                                            └────plain_batches─▶ the tensors that a bare loop and TRL take
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from learner.batching.collate import collate_packed, collate_padded
from learner.batching.costs import row_costs
from learner.batching.packing import balance, fewest_bins, pack_padded
from learner.batching.rows import TrainingRow, encode_prompts, make_rows, size_of, to_sample
from learner.config import LearnerConfig
from learner.types import LearnerOptions
from rollout.types import Completion, Prompt, PromptRef, RolloutGroup, Segment, Verdict
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import ModelConfig
from vlm.media.images import digest
from vlm.media.types import Media
from vlm.tiny import TinySizes, build_tiny

RESERVED = 16
"""How many tokens of a tiny word-level vocabulary are not words: roles, special tokens, answer tags."""
FIRST_WORD = 4
"""Id of the first word."""


@dataclass(frozen=True)
class Model:
    """A tiny Qwen2.5-VL of one size."""

    vocabulary: int
    sizes: TinySizes
    repeats: int = 7
    """Default number of measured steps."""

    def build(self, directory: Path) -> Path:
        words = [f"w{i}" for i in range(self.vocabulary - RESERVED)]
        return build_tiny("qwen2_5_vl", directory, words=words, sizes=self.sizes)


MODELS = {
    "1M": Model(2048, TinySizes(max_image_tokens=256)),
    "50M": Model(
        4096,
        TinySizes(
            hidden=512,
            intermediate=1536,
            layers=15,
            heads=8,
            vision_hidden=192,
            vision_intermediate=512,
            vision_depth=4,
            vision_heads=4,
            max_image_tokens=256,
            initializer_range=0.04,
        ),
        repeats=3,
    ),
}


@dataclass(frozen=True)
class Shape:
    """Groups of K completions of `new` tokens. Each follows a question of `words` words about an image of `edge` x
    `edge` pixels, which has (edge / 28)^2 tokens. The chat template adds 9 tokens."""

    groups: dict[str, int]
    """Model -> number of groups, chosen so that a step takes some seconds."""
    edge: int
    words: int
    new: int
    K: int = 8


SHAPES = {
    "prompt-heavy": Shape({"1M": 3, "50M": 1}, edge=448, words=7, new=32),
    "balanced": Shape({"1M": 8, "50M": 1}, edge=112, words=39, new=64),
    "completion-heavy": Shape({"1M": 2, "50M": 1}, edge=56, words=3, new=512),
}
"""Shapes with prompts of 272, 64 and 16 tokens."""


def make_groups(
    adapter: MultimodalAdapter, shape: Shape, groups: int, vocabulary: int
) -> tuple[list[RolloutGroup], dict[str, bytes]]:
    """Make groups of random completions of one length. Nobody sampled them, so their log-probabilities mean nothing."""
    rng = np.random.default_rng(0)
    media: dict[str, bytes] = {}
    made = []
    for number in range(groups):
        image = Image.fromarray(rng.integers(0, 255, (shape.edge, shape.edge, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        key = digest(buffer.getvalue())
        media[key] = buffer.getvalue()
        question = " ".join(f"w{i}" for i in rng.integers(0, 100, shape.words))
        content = [{"type": "image"}, {"type": "text", "text": f" {question} "}]
        text = adapter.render([{"role": "user", "content": content}])
        ids = adapter.encode(text, [image]).input_ids.numpy().astype(np.int32)
        prompt = Prompt(PromptRef(f"bench:{number}"), text, ids, len(ids), (Media("image", key, None),))
        completions = tuple(_completion(rng, shape.new, vocabulary) for _ in range(shape.K))
        verdicts = tuple(Verdict.scored(float(r)) for r in rng.random(shape.K))
        made.append(RolloutGroup(prompt, ids, completions, verdicts))
    return made, media


def _completion(rng: np.random.Generator, new: int, vocabulary: int) -> Completion:
    tokens = rng.integers(FIRST_WORD, vocabulary - RESERVED, new).astype(np.int32)
    segment = Segment(tokens, np.full(new, -5.0, np.float32), np.zeros(new, np.int32))
    return Completion((segment,), "", "length", 0)


def rows_of(
    adapter: MultimodalAdapter,
    groups: Sequence[RolloutGroup],
    media: dict[str, bytes],
    *,
    share: bool,
    budget: int,
) -> list[TrainingRow]:
    """Return rows as the learner makes them if `share`, or else one completion per row."""
    rows: list[TrainingRow] = []
    for group, prompt in zip(groups, encode_prompts(adapter, groups, media), strict=True):
        assert group.verdicts is not None
        scored = zip(group.completions, group.verdicts, strict=True)
        samples = [to_sample(c, advantage=(v.score or 0.0) - 0.5) for c, v in scored]
        rows += make_rows(prompt, samples, adapter, _options(budget), shared=share)
    return rows


def batches_of(
    rows: Sequence[TrainingRow], adapter: MultimodalAdapter, budget: int, *, packed: bool = True
) -> list[MultimodalBatch]:
    """Return micro-batches of at most `budget` positions, as the learner makes them, or padded ones."""
    options = _options(budget)
    sizes = np.array([size_of(row, adapter, options) for row in rows], np.int64)
    bins = (fewest_bins if packed else pack_padded)(sizes, options.micro_batch)
    costs = row_costs(rows, adapter, media_cost=0.0)  # they are alike
    bins = balance(bins, sizes, options.micro_batch, costs, len(bins), additive=packed)
    collate = collate_packed if packed else collate_padded
    return [collate([rows[i] for i in members], adapter) for members in bins]


def _options(budget: int) -> LearnerOptions:
    return LearnerOptions(ModelConfig(""), 1, learner=LearnerConfig(micro_batch=budget))


def plain_batches(rows: Sequence[TrainingRow], adapter: MultimodalAdapter, budget: int) -> list[dict[str, Any]]:
    """Return micro-batches with one completion per row: equal parts of at most `budget` positions, under TRL's names,
    with an image for each row. All lengths of a shape are equal, so nothing is padded."""
    limit = budget // max(len(row) for row in rows)
    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // limit))
    total = torch.tensor(sum(int(row.samples[0].trainable.sum()) for row in rows))
    return [{**_plain_batch([rows[i] for i in part], adapter), "num_items_in_batch": total} for part in parts]


def _plain_batch(rows: Sequence[TrainingRow], adapter: MultimodalAdapter) -> dict[str, Any]:
    prompts = torch.stack([row.prompt.input_ids for row in rows])
    completions = torch.stack([row.samples[0].token_ids for row in rows])
    is_image = torch.cat([prompts, torch.zeros_like(completions)], 1) == adapter.model_config.image_token_id
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor([row.samples[0].advantage for row in rows]),
        "pixel_values": torch.cat([row.prompt.inputs["pixel_values"] for row in rows]),
        "image_grid_thw": torch.cat([row.prompt.inputs["image_grid_thw"] for row in rows]),
        "mm_token_type_ids": is_image.long(),
        "num_images": [1] * len(rows),
    }


def model_flops(model: Any, adapter: MultimodalAdapter, rows: Sequence[TrainingRow], *, images_once: bool) -> float:
    """Return the FLOPs of forward and backward over `rows`, as the mathematics needs them, without anything computed
    twice.

    A token costs 6 per parameter of the matrices that it passes: those of the language layers at each position of a
    row, the head's at each trained token, the vision tower's at each patch, the merger's at each four patches. A pair
    of query and key that sees it costs 12 per layer and channel of all heads. `images_once`: an image per prompt, or
    per row. Not counted: norms, softmax, rotations, optimizer, recomputed logits, pairs that a mask hides."""
    matrices = {"language": 0, "projector": 0, "vision": 0}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and module is not head:
            matrices[adapter.role(name)] += module.weight.numel()
    text, vision = model.config.get_text_config(), model.config.vision_config
    positions = sum(len(row) for row in rows)
    trained = sum(int(s.trainable.sum()) for row in rows for s in row.samples)
    pairs = text.num_hidden_layers * text.hidden_size * sum(map(_pairs, rows))
    prompts: list[EncodedPrompt] = [row.prompt for row in rows]
    if images_once:
        prompts = list({id(prompt): prompt for prompt in prompts}.values())
    patches = [int(prompt.inputs["image_grid_thw"].prod()) for prompt in prompts]
    window, full = (vision.window_size // vision.patch_size) ** 2, len(vision.fullatt_block_indexes)
    seen = sum(p * (full * p + (vision.depth - full) * min(p, window)) for p in patches)
    merged = sum(patches) // vision.spatial_merge_size**2
    passed = matrices["language"] * positions + head.weight.numel() * trained
    passed += matrices["vision"] * sum(patches) + matrices["projector"] * merged
    return 6.0 * passed + 12.0 * (pairs + vision.hidden_size * seen)


def _pairs(row: TrainingRow) -> int:
    """Count the pairs of query and key that see each other: the prompt sees itself, and each completion sees the prompt
    and itself."""

    def causal(length: int) -> int:
        return length * (length + 1) // 2

    prompt = len(row.prompt.input_ids)
    return causal(prompt) + sum(len(s) * prompt + causal(len(s)) for s in row.samples)


def chosen_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probabilities in the plain way: log-softmax over all rows at once."""
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]

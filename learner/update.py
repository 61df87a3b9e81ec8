"""One policy update on one rank, from scored groups to statistics. No Ray: references were resolved before.

groups ─▶ encode prompts ─▶ rows ─▶ micro-batches ─▶ (reference pass) ─▶ train_step(s) ─▶ statistics over all ranks
                                      │ global counts: trained tokens and completions of all ranks, known beforehand
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.divergence import KL_ESTIMATORS
from learner.algorithm.losses import Clip
from learner.algorithm.objective import GlobalCounts, LossTerms, Objective, TokenTerms, policy_update_loss
from learner.batching.packing import GroupCost, balance, fewest_bins, pack_padded
from learner.batching.samples import Row, Sample, collate, encode_prompts, make_rows, shares_prompts, size_of, to_sample
from learner.engines.protocol import MicroLoss, StepResult, TrainEngine, step_metrics
from learner.features.frozen_towers import ConstantTowers
from learner.refusal import refused_step
from learner.types import LearnerOptions, NothingToLearnError, RefusedStep
from rollout.types import PromptRef, RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch

logger = logging.getLogger(__name__)


class StalenessError(AssertionError):
    """A token was sampled by weights older than allowed, or newer than the learner's: a defect of admission."""


@dataclass
class Stopwatch:
    """Seconds by phase; `split(name)` gives the time since the last split to `name`."""

    seconds: dict[str, float]
    _last: float

    @classmethod
    def start(cls, **known: float) -> Stopwatch:
        return cls(dict(known), time.perf_counter())

    def split(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def run_update(
    engine: TrainEngine,
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    media: Mapping[str, bytes],
    version: int,
    fetch_seconds: float = 0.0,
    minibatches: Sequence[int] | None = None,
    towers: ConstantTowers | None = None,
) -> dict[str, Any]:
    """Train on this rank's share of the sealed batch (which may be empty); collective.

    `advantages[i][k]`: of completion k of group i, ignored where its verdict is not a score. `media`: encoded bytes by
    digest. `minibatches[i]`: in which of the `options.optimizer_steps` group i is trained; None: all in the first.
    `towers`: those that run ahead of all this, where features are cached.
    Returns those fields of UpdateStats that the group does not know, the same on every rank but for what each has seen
    of steps that were not taken; the figures are then of those that were, if any was.
    Raises EncodingMismatchError, StalenessError, NothingToLearnError."""
    watch = Stopwatch.start(fetch=fetch_seconds)
    rows: list[list[Row]] = [[] for _ in range(options.optimizer_steps)]
    owners: list[list[PromptRef]] = [[] for _ in rows]
    own = build_rows(adapter, options, groups, advantages, media, towers)
    for i, part in enumerate(own):
        rows[0 if minibatches is None else minibatches[i]] += part
        owners[0 if minibatches is None else minibatches[i]] += [groups[i].prompt.ref] * len(part)
    samples = [[sample for row in part for sample in row.samples] for part in rows]
    lag_sum, lag_max = check_staleness([s for part in samples for s in part], version, options.max_staleness)
    plans = [plan_batches(engine, part, adapter, options) for part in rows]
    batches = [
        [_collate([part[i] for i in members], adapter, towers) for members in plan]
        for part, plan in zip(rows, plans, strict=True)
    ]
    computed = sum(batch.num_tokens for part in batches for batch in part)
    tokens = [sum(int(s.trainable.sum()) for s in part) for part in samples]
    reduced = engine.all_reduce_sum([computed, lag_sum, *tokens, *map(len, samples)])
    halves = reduced[2 : 2 + len(rows)], reduced[2 + len(rows) :]
    counts = [GlobalCounts(*pair) for pair in zip(*halves, strict=True)]
    trained = sum(c.tokens for c in counts)
    if not trained:
        raise NothingToLearnError(
            "every completion was cut off at its length limit, and mask_truncated leaves those out"
        )
    watch.split("encode")
    batches = _with_other_policies(engine, options, batches, watch)
    seen = [[[refs[i] for i in members] for members in plan] for refs, plan in zip(owners, plans, strict=True)]
    steps, refused = take_steps(engine, options, batches, counts, seen)
    watch.split("train")
    taken = [step for step in steps if step[0].taken]
    results, shown = zip(*(taken or steps), strict=True)
    seconds = dict(zip(watch.seconds, engine.all_reduce_max(list(watch.seconds.values())), strict=True))
    return {
        "loss": float(np.mean([r.loss for r in results])),
        "grad_norm": float(np.mean([r.grad_norm for r in results])),
        "learning_rate": results[-1].learning_rate,
        "samples": int(sum(c.completions for _, c in taken)),
        "tokens": int(sum(c.tokens for _, c in taken)),
        "tokens_computed": int(reduced[0]),
        "micro_batches": sum(map(len, batches)),
        "staleness_mean": reduced[1] / trained,
        "staleness_max": int(engine.all_reduce_max([lag_max])[0]),
        "metrics": {
            **step_metrics(results, [c.tokens for c in shown], len(results) if options.needs_policy_before else 1),
            **(towers.take_metrics() if towers is not None else {}),
        },
        "seconds": {**seconds, "total": sum(seconds.values())},
        "attempted": tuple(i for i, count in enumerate(counts) if count.tokens),
        "refused": refused,
    }


def take_steps(
    engine: TrainEngine,
    options: LearnerOptions,
    batches: Sequence[Sequence[MultimodalBatch]],
    counts: Sequence[GlobalCounts],
    prompts: Sequence[Sequence[Sequence[PromptRef]]],
) -> tuple[list[tuple[StepResult, GlobalCounts]], tuple[RefusedStep, ...]]:
    """The optimizer steps of an update, but those with nothing to train; and which of them were not taken. A step
    behind such a one is as good as ever: it is on prompts of its own, from unchanged weights. Collective."""
    steps: list[tuple[StepResult, GlobalCounts]] = []
    refused: list[RefusedStep] = []
    for position, (micro, count) in enumerate(zip(batches, counts, strict=True)):
        if count.tokens:
            result = engine.train_step(micro, micro_loss(options, count))
            steps.append((result, count))
            if not result.taken:
                refused.append(refused_step(position, result, count.tokens, prompts[position]))
    return steps, tuple(refused)


def _with_other_policies(
    engine: TrainEngine, options: LearnerOptions, batches: list[list[MultimodalBatch]], watch: Stopwatch
) -> list[list[MultimodalBatch]]:
    """The batches with log-probabilities under the reference and, behind the first step, under the policy before it,
    as far as the objective asks for them."""
    if options.beta > 0 and options.kl_in == "loss":
        batches = [
            [replace(b, reference_logprobs=engine.logprobs(b, reference=True)) for b in part] for part in batches
        ]
        watch.split("reference")
    if options.needs_policy_before:  # in the first step that is the current one
        later = [[replace(b, before_logprobs=engine.logprobs(b)) for b in part] for part in batches[1:]]
        batches = [batches[0], *later]
        watch.split("before")
    return batches


def micro_loss(options: LearnerOptions, counts: GlobalCounts) -> MicroLoss:
    """The policy update's loss of one micro-batch, as its part of a global batch of `counts`."""
    objective = objective_of(options)

    def compute(batch: MultimodalBatch, logprobs: Tensor, entropy: Tensor) -> LossTerms:
        assert batch.behavior_logprobs is not None
        assert batch.advantages is not None
        terms = TokenTerms(
            logprobs=logprobs,
            entropy=entropy,
            behavior_logprobs=batch.behavior_logprobs,
            advantages=batch.advantages,
            mask=batch.loss_mask,
            completions=batch.completion_labels(),
            before_logprobs=batch.before_logprobs,
            reference_logprobs=batch.reference_logprobs,
        )
        return policy_update_loss(terms, objective, counts)

    return compute


def objective_of(options: LearnerOptions) -> Objective:
    return Objective(
        loss=options.loss,
        clip=Clip(options.clip_eps_low, options.clip_eps_high, options.clip_dual),
        against_behavior=options.old_policy == "behavior",
        aggregation=options.aggregation,
        max_length=options.max_completion_length,
        correction=options.correction,
        correction_range=options.correction_range,
        beta=options.beta if options.kl_in == "loss" else 0.0,
        kl=options.kl_estimator,
        entropy_bonus=options.entropy_bonus,
    )


def build_rows(
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    media: Mapping[str, bytes],
    towers: ConstantTowers | None = None,
) -> list[list[Row]]:
    """Rows of the scored completions of each group; each prompt is encoded once. Collective if there are `towers`."""
    rows = []
    for group, own, prompt in zip(groups, advantages, _encode(adapter, groups, media, towers), strict=True):
        if group.verdicts is None:
            raise ValueError(f"group {group.prompt.ref} was not scored")
        samples = [
            to_sample(completion, float(advantage), float(verdict.score))
            for completion, advantage, verdict in zip(group.completions, own, group.verdicts, strict=True)
            if verdict.score is not None and not (options.mask_truncated and completion.finish_reason == "length")
        ]
        samples = [s for s in samples if s.trainable.any()]
        rows.append(make_rows(prompt, samples, adapter, options))
        _say_if_split(group, rows[-1], adapter)
    return rows


def _encode(
    adapter: MultimodalAdapter,
    groups: Sequence[RolloutGroup],
    media: Mapping[str, bytes],
    towers: ConstantTowers | None,
) -> list[EncodedPrompt]:
    return encode_prompts(adapter, groups, media) if towers is None else towers.encode(groups, media)


def _collate(rows: Sequence[Row], adapter: MultimodalAdapter, towers: ConstantTowers | None) -> MultimodalBatch:
    if towers is None:
        return collate(rows, adapter)
    return collate(rows, adapter, precomputed=towers.kinds, replayed=towers.replayed)


def _say_if_split(group: RolloutGroup, rows: Sequence[Row], adapter: MultimodalAdapter) -> None:
    if len(rows) > 1 and shares_prompts(adapter):
        logger.warning(
            "group %s does not fit a micro-batch: its prompt is computed %d times; raise learner.micro_batch_*",
            *(group.prompt.ref, len(rows)),
        )


def plan_batches(
    engine: TrainEngine, rows: Sequence[Row], adapter: MultimodalAdapter, options: LearnerOptions
) -> list[list[int]]:
    """Indices of the rows of each micro-batch, as many on every rank. Collective."""
    limits, shared = options.micro_batch, shares_prompts(adapter)
    sizes = np.array([size_of(row, adapter, options) for row in rows], np.int64).reshape(-1, len(limits))
    bins = fewest_bins(sizes, limits) if shared else pack_padded(sizes, limits)
    most = int(engine.all_reduce_max([len(bins)])[0])
    return balance(bins, sizes, limits, row_costs(rows, adapter, engine.media_cost()), most, additive=shared)


def check_staleness(samples: Sequence[Sample], version: int, max_staleness: int) -> tuple[int, int]:
    """`(sum, maximum)` over trained tokens of how many versions they lag behind `version`. Raises StalenessError."""
    lags = [version - s.policy_versions[s.trainable].numpy() for s in samples]
    lag = np.concatenate(lags) if lags else np.zeros(0, np.int64)
    if lag.size == 0:
        return 0, 0
    if lag.max() > max_staleness or lag.min() < 0:
        raise StalenessError(
            f"tokens sampled by versions {version - lag.max()} to {version - lag.min()} cannot train version {version} "
            f"with max_staleness={max_staleness}"
        )
    return int(lag.sum()), int(lag.max())


def score_groups(
    engine: TrainEngine,
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    groups: Sequence[RolloutGroup],
    media: Mapping[str, bytes],
    *,
    reference: bool = False,
    towers: ConstantTowers | None = None,
) -> list[list[np.ndarray]]:
    """Log-probabilities under the current weights (or the reference's) of each completion's trainable tokens, float32
    `[T]`; collective."""
    rows: list[Row] = []
    samples: list[list[Sample]] = []
    for group, prompt in zip(groups, _encode(adapter, groups, media, towers), strict=True):
        samples.append([to_sample(completion) for completion in group.completions])
        rows += make_rows(prompt, samples[-1], adapter, options)
    scored: dict[int, np.ndarray] = {}
    for members in plan_batches(engine, rows, adapter, options):
        batch = _collate([rows[i] for i in members], adapter, towers)
        logprobs = engine.logprobs(batch, reference=reference)[batch.loss_mask]
        own = [sample for i in members for sample in rows[i].samples]
        parts = logprobs.split([int(s.trainable.sum()) for s in own])
        scored |= {id(sample): part.numpy() for sample, part in zip(own, parts, strict=True)}
    return [[scored[id(sample)] for sample in own] for own in samples]


def reference_kl(
    engine: TrainEngine,
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    groups: Sequence[RolloutGroup],
    media: Mapping[str, bytes],
    *,
    towers: ConstantTowers | None = None,
) -> list[list[float]]:
    """Of each group and completion: the estimated KL of the policy that sampled it to the reference, summed over its
    trainable tokens; collective."""
    estimate = KL_ESTIMATORS[options.kl_estimator]
    scored = score_groups(engine, adapter, options, groups, media, reference=True, towers=towers)
    result = []
    for group, own in zip(groups, scored, strict=True):
        sampled = [to_sample(completion) for completion in group.completions]
        behavior = [sample.logprobs[sample.trainable] for sample in sampled]
        result.append([float(estimate(b, torch.from_numpy(r)).sum()) for b, r in zip(behavior, own, strict=True)])
    return result


def row_costs(rows: Sequence[Row], adapter: MultimodalAdapter, media_cost: float) -> list[float]:
    """Time of each row; `media_cost` is the engine's."""
    cost, places = group_cost(adapter, media_cost), list(adapter.placeholder_ids.values())
    # Padded siblings have their images encoded once.
    siblings = Counter({} if shares_prompts(adapter) else (id(row.prompt) for row in rows))
    return [
        cost(
            len(row.prompt.input_ids),
            [len(s) for s in row.samples],
            np.isin(row.prompt.input_ids, places).sum() / max(1, siblings[id(row.prompt)]),
        )
        for row in rows
    ]


def group_cost(adapter: MultimodalAdapter, media_cost: float) -> GroupCost:
    """A token attends to four times the model's width at the price of its linear layers: 6 H^2 + 9 H I multiplications
    against 2 H per token attended to and layer would say five to seven, at equal rates; attention's is the lower."""
    hidden = int(adapter.model_config.get_text_config().hidden_size)
    return GroupCost(shares_prompts(adapter), 4 * hidden, media_cost)

"""One policy update on one rank, from scored groups to statistics. No Ray: references were resolved before.

groups ─▶ encode prompts ─▶ rows ─▶ micro-batches ─▶ (reference pass) ─▶ train_step ─▶ statistics over all ranks
                                      │ global denominator: trained tokens of all ranks, known before backward
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from learner.engine import MicroLoss, StepResult, TrainEngine
from learner.losses import LOSSES, ClipRange, LossTerms, TokenTerms, policy_update_loss
from learner.packing import pack
from learner.policy import attention_break_even
from learner.samples import Row, Sample, collate, encode_prompts, make_rows, to_sample
from learner.types import LearnerOptions
from rollout.types import RolloutGroup
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch


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
) -> dict[str, Any]:
    """Train one step on this rank's share of the sealed batch (which may be empty); collective.

    `advantages[i][k]`: of completion k of group i, ignored where its verdict is not a score. `media`: encoded bytes by
    digest. Returns those fields of UpdateStats that the group does not know, the same on every rank.
    Raises EncodingMismatchError, StalenessError."""
    watch = Stopwatch.start(fetch=fetch_seconds)
    rows = build_rows(adapter, options, groups, advantages, media)
    samples = [sample for row in rows for sample in row.samples]
    lag_sum, lag_max = check_staleness(samples, version, options.max_staleness)
    plan = plan_batches(engine, rows, options.micro_batch_tokens)
    batches = [collate([rows[i] for i in members], adapter) for members in plan]
    tokens = sum(int(sample.trainable.sum()) for sample in samples)
    computed = sum(batch.num_tokens for batch in batches)
    counts = engine.all_reduce_sum([tokens, len(samples), computed, lag_sum])
    watch.split("encode")
    if options.needs_reference:
        batches = [replace(b, reference_logprobs=engine.logprobs(b, reference=True)) for b in batches]
        watch.split("reference")
    result = engine.train_step(batches, micro_loss(options, denominator=counts[0]))
    watch.split("train")
    seconds = dict(zip(watch.seconds, engine.all_reduce_max(list(watch.seconds.values())), strict=True))
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "samples": int(counts[1]),
        "tokens": int(counts[0]),
        "tokens_computed": int(counts[2]),
        "micro_batches": len(batches),
        "staleness_mean": counts[3] / counts[0],
        "staleness_max": int(engine.all_reduce_max([lag_max])[0]),
        "metrics": _metrics(result, counts[0]),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def micro_loss(options: LearnerOptions, denominator: float) -> MicroLoss:
    """The policy update's loss of one micro-batch, over `denominator` trained tokens in the global batch."""
    policy_loss = LOSSES[options.loss]
    clip = ClipRange(options.clip_eps_low, options.clip_eps_high)

    def compute(batch: MultimodalBatch, logprobs: Tensor, entropy: Tensor) -> LossTerms:
        assert batch.behavior_logprobs is not None
        assert batch.advantages is not None
        # One optimizer step per batch: the learner's weights before the step are those of this very pass.
        old = batch.behavior_logprobs if options.old_policy == "behavior" else logprobs.detach()
        terms = TokenTerms(
            logprobs=logprobs,
            entropy=entropy,
            behavior_logprobs=batch.behavior_logprobs,
            old_logprobs=old,
            advantages=batch.advantages,
            mask=batch.loss_mask,
            reference_logprobs=batch.reference_logprobs,
        )
        return policy_update_loss(terms, policy_loss, clip, options.beta, denominator)

    return compute


def build_rows(
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    media: Mapping[str, bytes],
) -> list[Row]:
    """Rows of the scored completions of all groups; each prompt is encoded once."""
    rows: list[Row] = []
    for group, own, prompt in zip(groups, advantages, encode_prompts(adapter, groups, media), strict=True):
        if group.verdicts is None:
            raise ValueError(f"group {group.prompt.ref} was not scored")
        samples = [
            to_sample(completion, float(advantage), float(verdict.score))
            for completion, advantage, verdict in zip(group.completions, own, group.verdicts, strict=True)
            if verdict.score is not None
        ]
        samples = [s for s in samples if s.trainable.any()]
        rows += make_rows(prompt, samples, _break_even(adapter), options.micro_batch_tokens)
    return rows


def plan_batches(engine: TrainEngine, rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Indices of the rows of each micro-batch, as many on every rank: those with fewer add empty ones. Collective."""
    plan = pack([len(row) for row in rows], budget)
    most = int(engine.all_reduce_max([len(plan)])[0])
    return plan + [[] for _ in range(most - len(plan))]


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
) -> list[list[np.ndarray]]:
    """Log-probabilities under the current weights of each completion's trainable tokens, float32 `[T]`; collective."""
    rows: list[Row] = []
    samples: list[list[Sample]] = []
    for group, prompt in zip(groups, encode_prompts(adapter, groups, media), strict=True):
        samples.append([to_sample(completion) for completion in group.completions])
        rows += make_rows(prompt, samples[-1], _break_even(adapter), options.micro_batch_tokens)
    scored: dict[int, np.ndarray] = {}
    for members in plan_batches(engine, rows, options.micro_batch_tokens):
        batch = collate([rows[i] for i in members], adapter)
        logprobs = engine.logprobs(batch)
        for b, index in enumerate(members):
            lengths = [int(s.trainable.sum()) for s in rows[index].samples]
            parts = np.split(logprobs[b][batch.loss_mask[b]].numpy(), np.cumsum(lengths)[:-1])
            scored |= {id(sample): part for sample, part in zip(rows[index].samples, parts, strict=True)}
    return [[scored[id(sample)] for sample in own] for own in samples]


def _metrics(result: StepResult, tokens: float) -> dict[str, float]:
    return {**{name: total / tokens for name, total in result.sums.items()}, **result.maxima}


def _break_even(adapter: MultimodalAdapter) -> int | None:
    return attention_break_even(adapter.model_config) if adapter.shares_prompts else None

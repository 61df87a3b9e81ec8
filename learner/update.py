"""Updater: policy updates and scores on one rank, from groups to statistics. No Ray: references were resolved before.

groups ─ rows ─▶ rows ─ plan ─▶ micro-batches ─▶ (other policies' log-probabilities) ─ step ─▶ RankStats
                                    │ global counts: trained tokens and completions of all ranks, known beforehand
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.divergence import KL_ESTIMATORS
from learner.algorithm.objective import GlobalCounts, LossTerms, TokenTerms, policy_update_loss
from learner.batching.collate import collate
from learner.batching.costs import row_costs
from learner.batching.packing import balance, fewest_bins, pack_padded
from learner.batching.rows import (
    Sample,
    TrainingRow,
    encode_prompts,
    make_rows,
    shares_prompts,
    size_of,
    to_sample,
    token_lags,
)
from learner.engines.protocol import MicroLoss, StepResult, TrainEngine, step_metrics
from learner.features.frozen_towers import FrozenTowers
from learner.refusal import refused_step
from learner.types import LearnerOptions, NothingToLearnError, RankStats
from rollout.types import PromptRef, RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch

logger = logging.getLogger(__name__)


class PhaseTimer:
    """Seconds by phase; `split(name)` adds the time since the last split to `name`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def split(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Share:
    """One rank's share of a sealed batch, which may be empty."""

    groups: Sequence[RolloutGroup]
    advantages: Sequence[Sequence[float]]
    """`advantages[i][k]` is that of completion k of group i; it is ignored where the verdict is not a score."""
    media: Mapping[str, bytes]
    """Encoded bytes by digest."""
    minibatches: Sequence[int] | None = None
    """Which of the optimizer steps trains group i; None: the first step trains all groups."""


@dataclass(frozen=True)
class Minibatch:
    """The work of one rank in one optimizer step."""

    batches: Sequence[MultimodalBatch]
    prompts: Sequence[Sequence[PromptRef]]
    """The prompts of each micro-batch."""
    samples: Sequence[Sample]

    @property
    def tokens(self) -> int:
        return sum(int(sample.trainable.sum()) for sample in self.samples)

    def changed(self, change: Callable[[MultimodalBatch], MultimodalBatch]) -> Minibatch:
        return replace(self, batches=[change(batch) for batch in self.batches])


class Updater:
    """Trains and scores groups on one rank. Its methods are collective: every rank calls them, with or without
    groups."""

    def __init__(
        self,
        engine: TrainEngine,
        adapter: MultimodalAdapter,
        options: LearnerOptions,
        towers: FrozenTowers | None = None,
    ) -> None:
        """`towers`: the frozen towers, if something of them is cached."""
        self._engine, self._adapter, self._options, self._towers = engine, adapter, options, towers

    def update(self, share: Share, version: int, timer: PhaseTimer | None = None) -> RankStats:
        """Train on a share of the sealed batch. `version` is that of the weights before the update; `timer` may have
        measured phases before it.

        The statistics describe the steps that were taken, or all if none was. They are the same on every rank, except
        for what each rank saw of steps that were not taken.
        Raises EncodingMismatchError, StalenessError, NothingToLearnError."""
        timer = timer or PhaseTimer()
        minibatches = self._minibatches(share)
        samples = [sample for own in minibatches for sample in own.samples]
        lag_sum, lag_max = token_lags(samples, version, self._options.rollout.max_staleness)
        computed = sum(batch.num_tokens for own in minibatches for batch in own.batches)
        own_counts = [count for own in minibatches for count in (own.tokens, len(own.samples))]
        positions, lags, *counted = self._engine.all_reduce_sum([computed, lag_sum, *own_counts])
        counts = [GlobalCounts(*pair) for pair in zip(counted[::2], counted[1::2], strict=True)]
        trained = sum(count.tokens for count in counts)
        if not trained:
            raise NothingToLearnError(
                "every completion was cut off at its length limit, and algorithm.overlong=mask leaves those out"
            )
        timer.split("encode")
        minibatches = self._with_other_policies(minibatches, timer)
        attempted = tuple(i for i, count in enumerate(counts) if count.tokens)
        results = {i: self.step(minibatches[i], counts[i]) for i in attempted}
        timer.split("train")
        taken = tuple(i for i in attempted if results[i].taken)
        figures = {
            "completions_trained": sum(counts[i].completions for i in taken),
            "tokens_trained": sum(counts[i].tokens for i in taken),
            "positions_computed": positions,
            "micro_batches": sum(len(own.batches) for own in minibatches),
            "staleness_mean": lags / trained,
        }
        shown = [results[i] for i in taken or attempted]
        known = len(shown) if self._options.algorithm.needs_policy_before else 1
        seconds = dict(zip(timer.seconds, self._engine.all_reduce_max(list(timer.seconds.values())), strict=True))
        return RankStats(
            loss=float(np.mean([result.loss for result in shown])),
            grad_norm=float(np.mean([result.grad_norm for result in shown])),
            learning_rate=shown[-1].learning_rate,
            staleness_max=int(self._engine.all_reduce_max([lag_max])[0]),
            metrics={
                **step_metrics(shown, [counts[i].tokens for i in taken or attempted], known),
                **figures,
                **(self._towers.take_metrics() if self._towers is not None else {}),
            },
            seconds={**seconds, "total": sum(seconds.values())},
            attempted=attempted,
            refused=tuple(
                refused_step(i, result, counts[i].tokens, minibatches[i].prompts)
                for i, result in results.items()
                if not result.taken
            ),
        )

    def score(
        self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes], *, reference: bool = False
    ) -> list[list[np.ndarray]]:
        """Log-probabilities under the current weights, or under the reference's, of each completion's trainable tokens,
        float32 `[T]`."""
        rows: list[TrainingRow] = []
        samples: list[list[Sample]] = []
        for group, prompt in zip(groups, self._encode(groups, media), strict=True):
            samples.append([to_sample(completion) for completion in group.completions])
            rows += make_rows(prompt, samples[-1], self._adapter, self._options)
        scored: dict[int, np.ndarray] = {}
        for members in self.plan(rows):
            batch = self._collate([rows[i] for i in members])
            logprobs = self._engine.logprobs(batch, reference=reference)[batch.loss_mask]
            own = [sample for i in members for sample in rows[i].samples]
            parts = logprobs.split([int(s.trainable.sum()) for s in own])
            scored |= {id(sample): part.numpy() for sample, part in zip(own, parts, strict=True)}
        return [[scored[id(sample)] for sample in own] for own in samples]

    def reference_kl(self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]) -> list[list[float]]:
        """The estimated KL to the reference of the policy that sampled each completion, summed over its trainable
        tokens."""
        kl = self._options.algorithm.kl
        assert kl is not None
        estimate = KL_ESTIMATORS[kl.estimator]
        result = []
        for group, own in zip(groups, self.score(groups, media, reference=True), strict=True):
            sampled = [to_sample(completion) for completion in group.completions]
            behavior = [sample.logprobs[sample.trainable] for sample in sampled]
            result.append([float(estimate(b, torch.from_numpy(r)).sum()) for b, r in zip(behavior, own, strict=True)])
        return result

    def rows(self, share: Share) -> list[list[TrainingRow]]:
        """The rows of the scored completions of each group; each prompt is encoded once."""
        found = []
        prompts = self._encode(share.groups, share.media)
        for group, advantages, prompt in zip(share.groups, share.advantages, prompts, strict=True):
            if group.verdicts is None:
                raise ValueError(f"group {group.prompt.ref} was not scored")
            samples = [
                to_sample(completion, float(advantage))
                for completion, advantage, verdict in zip(group.completions, advantages, group.verdicts, strict=True)
                if verdict.score is not None
                and not (self._options.algorithm.overlong == "mask" and completion.finish_reason == "length")
            ]
            samples = [sample for sample in samples if sample.trainable.any()]
            found.append(make_rows(prompt, samples, self._adapter, self._options))
            if len(found[-1]) > 1 and shares_prompts(self._adapter):
                logger.warning(
                    "group %s does not fit a micro-batch: its prompt is computed %d times; raise learner.micro_batch",
                    *(group.prompt.ref, len(found[-1])),
                )
        return found

    def plan(self, rows: Sequence[TrainingRow]) -> list[list[int]]:
        """The indices of the rows of each micro-batch; every rank has as many micro-batches."""
        limits, shared = self._options.micro_batch, shares_prompts(self._adapter)
        sizes = np.array([size_of(row, self._adapter, self._options) for row in rows], np.int64)
        sizes = sizes.reshape(-1, len(limits))
        bins = fewest_bins(sizes, limits) if shared else pack_padded(sizes, limits)
        most = int(self._engine.all_reduce_max([len(bins)])[0])
        costs = row_costs(rows, self._adapter, self._engine.media_cost())
        return balance(bins, sizes, limits, costs, most, additive=shared)

    def step(self, minibatch: Minibatch, counts: GlobalCounts) -> StepResult:
        """Take one optimizer step on prompts of its own; `counts` are those of all ranks. If the step is not taken, the
        weights are unchanged, and the next step is as good as ever."""
        return self._engine.train_step(minibatch.batches, micro_loss(self._options, counts))

    def _minibatches(self, share: Share) -> list[Minibatch]:
        """The micro-batches of each optimizer step."""
        rows = self.rows(share)
        steps = [0] * len(rows) if share.minibatches is None else share.minibatches
        made = []
        for step in range(self._options.algorithm.optimizer_steps):
            members = [i for i, own in enumerate(steps) if own == step]
            own = [row for i in members for row in rows[i]]
            refs = [share.groups[i].prompt.ref for i in members for _ in rows[i]]
            plan = self.plan(own)
            made.append(
                Minibatch(
                    batches=[self._collate([own[i] for i in chosen]) for chosen in plan],
                    prompts=[[refs[i] for i in chosen] for chosen in plan],
                    samples=[sample for row in own for sample in row.samples],
                )
            )
        return made

    def _with_other_policies(self, minibatches: Sequence[Minibatch], timer: PhaseTimer) -> list[Minibatch]:
        """The minibatches with log-probabilities under the reference and, after the first step, under the policy before
        it, if the objective asks for them."""
        made, engine = list(minibatches), self._engine
        if self._options.algorithm.kl_in("loss"):
            made = [
                own.changed(lambda b: replace(b, reference_logprobs=engine.logprobs(b, reference=True))) for own in made
            ]
            timer.split("reference")
        if self._options.algorithm.needs_policy_before:  # in the first step that is the current one
            made[1:] = [own.changed(lambda b: replace(b, before_logprobs=engine.logprobs(b))) for own in made[1:]]
            timer.split("before")
        return made

    def _encode(self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]) -> list[EncodedPrompt]:
        if self._towers is None:
            return encode_prompts(self._adapter, groups, media)
        return self._towers.encode(groups, media)

    def _collate(self, rows: Sequence[TrainingRow]) -> MultimodalBatch:
        return collate(rows, self._adapter, None if self._towers is None else self._towers.cached)


def micro_loss(options: LearnerOptions, counts: GlobalCounts) -> MicroLoss:
    """The loss of one micro-batch of a policy update, as its part of a global batch of `counts`."""
    algorithm, max_length = options.algorithm, options.rollout.max_completion_length

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
        return policy_update_loss(terms, algorithm, counts, max_length=max_length)

    return compute

"""LearnerGroup: the learner as the driver sees it. It has one Ray actor per rank; every method blocks, with a limit.

    driver ── update(stored groups, summaries, version) ──▶ advantages (here, from summaries) ─▶ shards by cost
                                                            └▶ LearnerWorker.update on every rank ─▶ UpdateStats

The driver passes references: the workers fetch tokens and pixels themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import ray

from learner.algorithm.advantages import ADVANTAGES, contributes, has_baseline
from learner.algorithm.group_rewards import check_rewards, combined_rewards
from learner.batching.packing import GroupCost, shard
from learner.deaths import how_it_died
from learner.durable import StorageError
from learner.refusal import joined
from learner.types import (
    ContentsLostError,
    LearnerError,
    LearnerOptions,
    LearnerTimeoutError,
    NotFiniteError,
    NothingToLearnError,
    RankStats,
    UpdateStats,
    WeightTransferOptions,
)
from learner.worker import LearnerWorker
from rollout.types import GroupSummary, StoredGroup
from weight_sync.protocols import EngineHandle, TransferReport
from weight_sync.verify import WeightSyncError

TRANSFER_MARGIN = 90.0
"""Seconds that the ranks have beside the limit of a transfer itself: for the engines' health checks before it and after
a failure, for gathering the rest of the weights then, and to say how it ended."""
HEALTH = "health"
"""The group of calls that a rank answers while it computes."""
DEATH_SECONDS = 1.0
"""Seconds within which the death of a rank is known that made another rank fail."""


class LearnerGroup:
    """All ranks of the learner, in one process group.

    An error in any rank raises LearnerError at once, without waiting for the others, and leaves the group unusable:
    the ranks may wait for each other in a collective. Call `shutdown` and start another group from a checkpoint."""

    def __init__(
        self,
        options: LearnerOptions,
        actor_options: Sequence[Mapping[str, Any]],
        transfer: WeightTransferOptions | None = None,
    ) -> None:
        """`actor_options` are the Ray options of each rank's actor (num_cpus, num_gpus=1, resources,
        scheduling_strategy), as many as `learner.ranks`. Sending weights needs `transfer`. Nothing starts before
        `start`."""
        if len(actor_options) != options.learner.ranks:
            raise ValueError(f"{options.learner.ranks} ranks, but actor options for {len(actor_options)}")
        self.options = options
        self._transfer = transfer
        self._actor_options = [dict(o) for o in actor_options]
        self._workers: list[Any] = []
        self._cost = GroupCost(shares_prompts=False, break_even=1)

    def start(self, timeout: float) -> None:
        """Create the actors, join them in a process group, load the model (and the reference).

        Raises LearnerError or LearnerTimeoutError within `timeout` seconds; the actors are gone then."""
        deadline = time.monotonic() + timeout
        try:
            self._workers = [
                ray.remote(concurrency_groups={HEALTH: 1}, **given)(LearnerWorker).remote(
                    self.options, rank, self._transfer
                )
                for rank, given in enumerate(self._actor_options)
            ]
            where = self._wait("choosing an address", [self._workers[0].open_store.remote()], timeout)[0]
            left = deadline - time.monotonic()
            self._cost = self._wait("loading the model", [w.setup.remote(*where) for w in self._workers], left)[0]
        except BaseException:
            self.shutdown()
            raise

    def update(self, groups: Sequence[StoredGroup], summaries: Sequence[GroupSummary], version: int) -> UpdateStats:
        """Run one update on a sealed batch. `groups[i]` says where the group of `summaries[i]` and its verdicts are.

        `version` is the policy version of the weights before the update. The order of the groups does not matter: they
        are sorted by uid and epoch, so that a rerun computes the same batches.
        Raises NothingToLearnError, RewardError and ContentsLostError (before anything is trained), LearnerError,
        LearnerTimeoutError."""
        if len(groups) != len(summaries):
            raise ValueError(f"{len(groups)} groups but {len(summaries)} summaries")
        order = sorted(range(len(summaries)), key=lambda i: (summaries[i].ref.uid, summaries[i].ref.epoch))
        rewards, valid = combined_rewards(summaries, self.options)
        used = has_baseline(valid)
        if not used.any():
            raise NothingToLearnError(
                f"none of the {len(summaries)} groups at version {version} has two scored completions: "
                f"{_why(summaries)}"
            )
        kept = [i for i in order if used[i]]
        algorithm = self.options.algorithm
        # Which group is trained in which step does not depend on the number of ranks.
        parts = [kept[m :: algorithm.optimizer_steps] for m in range(algorithm.optimizer_steps)]
        costs = [self._cost(s.prompt_length, s.lengths, s.media_length) for s in summaries]
        deal = [shard([costs[i] for i in part], self.options.learner.ranks) for part in parts]
        # What each rank gets: (index of the group, optimizer step that trains it).
        shards = [
            [(part[j], m) for m, (part, dealt) in enumerate(zip(parts, deal, strict=True)) for j in dealt[rank]]
            for rank in range(self.options.learner.ranks)
        ]
        self._fetch(groups, summaries, [[i for i, _ in own] for own in shards])
        if kl := algorithm.kl_in("reward"):
            rewards -= kl.weight * self._reference_kl([[i for i, _ in own] for own in shards], rewards.shape)
        check_rewards(rewards, valid, summaries, self.options)
        advantages = ADVANTAGES[algorithm.advantage](rewards, valid)
        calls = [
            w.update.remote([tuple(advantages[i]) for i, _ in own], [m for _, m in own], version)
            for w, own in zip(self._workers, shards, strict=True)
        ]
        ranks: list[RankStats] = self._wait(f"running the update at version {version}", calls)
        refused = joined([rank.refused for rank in ranks], [[summaries[i].ref for i in part] for part in parts])
        if algorithm.reference_every and (version + 1) % algorithm.reference_every == 0:
            self._wait("refreshing the reference", [w.refresh_reference.remote() for w in self._workers])
        return UpdateStats(
            **{f.name: getattr(ranks[0], f.name) for f in fields(RankStats) if f.name != "refused"},
            refused=refused,
            groups_dropped=int((~used).sum()),
            groups_flat=int((used & ~contributes(rewards, valid)).sum()),
        )

    def _fetch(
        self, groups: Sequence[StoredGroup], summaries: Sequence[GroupSummary], shards: Sequence[Sequence[int]]
    ) -> None:
        """Let each rank get the contents of its groups: a rank that failed to in the middle of an update would leave
        the others in a collective. Raises ContentsLostError."""
        calls = [w.fetch.remote([groups[i] for i in own]) for w, own in zip(self._workers, shards, strict=True)]
        found = self._wait("fetching the groups of a batch", calls)
        lost = [summaries[own[j]].ref for own, missing in zip(shards, found, strict=True) for j in missing]
        if lost:
            raise ContentsLostError(lost)

    def _reference_kl(self, shards: Sequence[Sequence[int]], shape: tuple[int, ...]) -> np.ndarray:
        """`[G, K]`: for every completion, the KL to the reference of the policy that sampled it."""
        calls = [w.reference_kl.remote() for w in self._workers]
        result = np.zeros(shape)
        for own, values in zip(shards, self._wait("computing the reference's log-probabilities", calls), strict=True):
            for i, kl in zip(own, values, strict=True):
                result[i, : len(kl)] = kl
        return result

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write everything that `load_checkpoint` needs into `directory`, which must not exist yet and appears whole
        or not at all. Rank 0 writes, so with several nodes the path must be on a shared file system."""
        self._wait("saving a checkpoint", [w.save_checkpoint.remote(str(directory)) for w in self._workers])

    def load_checkpoint(self, directory: str | Path) -> None:
        """Continue from `directory`, whatever the number of ranks that wrote it."""
        self._wait("loading a checkpoint", [w.load_checkpoint.remote(str(directory)) for w in self._workers])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the policy in Hugging Face format, with tokenizer, processor and chat template. With LoRA this is the
        merged model, and the peft adapter is written to `directory/adapter`."""
        self._wait("saving the model", [w.save_pretrained.remote(str(directory)) for w in self._workers])

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        """Connect rank 0 with `engines`, in place of the former group.

        Raises WeightSyncError naming who did not join."""
        calls = [w.form_weight_group.remote(engines) for w in self._workers]
        self._wait("forming the weight-transfer group", calls, self._transfer_limit)

    def send_weights(self) -> TransferReport:
        """Send the current weights to the engines of the group, which must be paused.

        Raises WeightSyncError when an engine fails, LearnerTimeoutError when one is silent (NCCL)."""
        calls = [w.send_weights.remote() for w in self._workers]
        return self._wait("sending the weights", calls, self._transfer_limit)[0]

    def health(self) -> dict[str, Future[None]]:
        """Ask every rank whether it lives: an answer by the rank's name, also while it computes."""
        ask = [worker.check_health.options(concurrency_group=HEALTH) for worker in self._workers]
        return {f"learner rank {rank}": call.remote().future() for rank, call in enumerate(ask)}

    def kill(self, name: str) -> None:
        """End a rank by its name in `health`."""
        ray.kill(self._workers[int(name.rpartition(" ")[2])])

    @property
    def ranks(self) -> tuple[Any, ...]:
        """Ray's handles of the ranks' actors, in order."""
        return tuple(self._workers)

    @property
    def _transfer_limit(self) -> float | None:
        return None if self._transfer is None else self._transfer.timeout + TRANSFER_MARGIN

    def shutdown(self) -> None:
        """End every rank's process. Safe to call twice, and on a group that failed."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _wait(self, what: str, calls: list[ray.ObjectRef], timeout: float | None = None) -> list[Any]:
        """Return the results of one call per rank, in order. Raises at the first failure, and at the deadline. `what`
        completes "a rank failed while"."""
        limit = self.options.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        rank_of = {call: rank for rank, call in enumerate(calls)}
        results: list[Any] = [None] * len(calls)
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = ", ".join(str(rank_of[call]) for call in pending)
                raise LearnerTimeoutError(f"{what} did not finish within {limit:g} s; still running: rank {ranks}")
            for call in ready:
                try:
                    results[rank_of[call]] = ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, WeightSyncError | NothingToLearnError | NotFiniteError | StorageError):
                        raise error.cause from None  # an engine's failure or the data's, not the learner's
                    self._raise_death(what, {c: rank_of[c] for c in (*ready, *pending) if c is not call})
                    raise LearnerError(f"learner rank {rank_of[call]} failed while {what}: {error}") from error
                except ray.exceptions.RayError as error:
                    how = how_it_died(str(error))
                    raise LearnerError(f"learner rank {rank_of[call]} died while {what}{how}") from error
        return results

    def _raise_death(self, what: str, others: Mapping[ray.ObjectRef, int]) -> None:
        """Raise LearnerError if one of `others` died: all that another rank can say is that a connection closed."""
        ready, _ = ray.wait(list(others), num_returns=len(others), timeout=DEATH_SECONDS) if others else ([], [])
        for call in ready:
            try:
                ray.get(call)
            except ray.exceptions.RayActorError as error:
                raise LearnerError(f"learner rank {others[call]} died while {what}{how_it_died(str(error))}") from error
            except ray.exceptions.RayError:
                continue


def _why(summaries: Sequence[GroupSummary]) -> str:
    reasons = [r for s in summaries for r in s.invalid_reasons]
    return "; ".join(sorted(set(reasons))[:3]) or "no reason was given"

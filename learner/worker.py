"""LearnerWorker: one rank of the learner as a Ray actor. It fetches what references name, and calls the Updater.

LearnerGroup ──▶ LearnerWorker.update(groups) ──▶ Updater (learner/update.py) ──▶ TrainEngine
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from learner.batching.packing import GroupCost
from learner.types import LearnerOptions, RankStats, WeightTransferOptions
from rollout.types import RolloutGroup, StoredGroup
from weight_sync.protocols import EngineHandle, TransferReport

if TYPE_CHECKING:
    from learner.engines.protocol import TrainEngine
    from learner.update import Updater
    from weight_sync.sender import WeightSender


LOST = (ray.exceptions.ObjectLostError, ray.exceptions.RayActorError)
"""Errors of Ray for an object that went with the node or the process that kept it."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """This rank's share of a batch."""

    groups: Sequence[RolloutGroup]
    """With their verdicts."""
    media: Mapping[str, bytes]
    """Encoded bytes of their distinct media, by digest."""
    seconds: float


class LearnerWorker:
    """Every method but `open_store`, `fetch` and `check_health` is collective: the group calls it on all ranks."""

    def __init__(self, options: LearnerOptions, rank: int, transfer: WeightTransferOptions | None) -> None:
        # DeepSpeed and transformers read these at import, which therefore happens in `setup`. Each rank sees one
        # device of its own, so that its local rank is 0 wherever it runs.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.learner.ranks), LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.update(CROSS_RANK="0", CROSS_SIZE="1", DS_ACCELERATOR=options.device, TOKENIZERS_PARALLELISM="false")
        # DeepSpeed builds its optimizer for CPUs with ninja, which lies beside Python in an environment not activated.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        self.options, self.rank, self._transfer = options, rank, transfer
        self._store: Any = None
        self._engine: TrainEngine
        self._updater: Updater
        self._sender: WeightSender | None = None
        self._fetched = Fetched((), {}, 0.0)

    def __repr__(self) -> str:
        """The name of this actor in the dashboard, and before each line that it prints."""
        return f"learner-{self.rank}"

    def check_health(self) -> None:
        """Answered as long as this process runs."""

    def open_store(self) -> tuple[str, int]:
        """Rank 0 opens the place where the ranks meet. The system chooses the port, so that no two runs can take the
        same."""
        from learner.engines.process_group import open_store

        host = ray.util.get_node_ip_address()
        self._store, port = open_store(host, self.options.timeout)
        return host, port

    def setup(self, host: str, port: int) -> GroupCost:
        """Join the process group; load adapter, model and optimizer. Returns what a group costs this model."""
        import torch

        from learner.batching.costs import group_cost
        from learner.engines.deepspeed_engine import DeepSpeedEngine
        from learner.engines.process_group import join
        from learner.features.frozen_towers import make_towers
        from learner.features.store_actor import ObjectStore
        from learner.update import Updater
        from vlm.families.registry import load_adapter

        # DeepSpeed calls collectives under names that torch has since replaced, and every call would say so.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        options, model = self.options, self.options.model
        if options.device == "cpu":
            torch.set_num_threads(options.threads)
        join(options, self.rank, host, port, self._store)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(options.seed + self.rank)
        adapter = load_adapter(
            model.path,
            model.adapter,
            trust_remote_code=model.trust_remote_code,
            max_image_tokens=model.max_image_tokens,
        )
        self._engine = DeepSpeedEngine(options, adapter)
        towers = make_towers(
            self._engine,
            adapter,
            options,
            # Far less than anybody waits for this rank.
            lambda limit: ObjectStore(f"features-{host}:{port}", limit, min(60.0, options.timeout / 10)),
        )
        self._updater = Updater(self._engine, adapter, options, towers)
        return group_cost(adapter, self._engine.media_cost())

    def fetch(self, stored: Sequence[StoredGroup]) -> list[int]:
        """Get the groups that `reference_kl` and `update` are about. Returns the places of those whose contents are
        lost; there is nothing to train then. Not collective."""
        begin = time.perf_counter()
        try:
            groups, media = self._contents(stored)
        except LOST:
            return [place for place, each in enumerate(stored) if self._is_lost(each)]
        self._fetched = Fetched(groups, media, time.perf_counter() - begin)
        return []

    def _contents(self, stored: Sequence[StoredGroup]) -> tuple[list[RolloutGroup], dict[str, bytes]]:
        """Get groups with their verdicts, and the encoded bytes of their distinct media by digest."""
        groups = self._get([each.group for each in stored])
        verdicts = self._get([each.verdicts for each in stored])
        media = {m.digest: m.data for group in groups for m in group.prompt.media}
        held = {digest: data for digest, data in media.items() if isinstance(data, ray.ObjectRef)}
        media |= dict(zip(held, self._get(list(held.values())), strict=True))
        return [replace(group, verdicts=own) for group, own in zip(groups, verdicts, strict=True)], media

    def _is_lost(self, stored: StoredGroup) -> bool:
        try:
            self._contents([stored])
        except LOST:
            return True
        return False

    def _get(self, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        return list(ray.get(list(refs), timeout=self.options.timeout))

    def update(self, advantages: Sequence[Sequence[float]], minibatches: Sequence[int], version: int) -> RankStats:
        """Train on the groups that were fetched, with the advantages of their K completions; `minibatches` says which
        optimizer step trains each."""
        from learner.update import PhaseTimer, Share

        # Kept any longer, they would hold this batch in the object store beside the next one.
        fetched, self._fetched = self._fetched, Fetched((), {}, 0.0)
        timer = PhaseTimer()
        timer.seconds["fetch"] = fetched.seconds
        share = Share(fetched.groups, advantages, fetched.media, minibatches)
        return self._updater.update(share, version, timer)

    def reference_kl(self) -> list[list[float]]:
        """Estimate the KL to the reference of the completions of each group that was fetched, summed over tokens."""
        return self._updater.reference_kl(self._fetched.groups, self._fetched.media)

    def refresh_reference(self) -> None:
        self._engine.refresh_reference()

    def save_checkpoint(self, directory: str) -> None:
        from learner.engines.checkpoint import save_checkpoint

        save_checkpoint(self._engine, Path(directory))

    def load_checkpoint(self, directory: str) -> None:
        from learner.engines.checkpoint import load_checkpoint

        load_checkpoint(self._engine, Path(directory))

    def save_pretrained(self, directory: str) -> None:
        self._engine.save_pretrained(Path(directory))

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        from weight_sync.sender import WeightSender

        if self._transfer is None:
            raise RuntimeError("this learner was started without WeightTransferOptions: it cannot send weights")
        if self._sender is None:
            transfer = self._transfer
            self._sender = WeightSender(
                self._engine.weight_source(transfer.bucket_bytes),
                backend=transfer.backend,
                rank=self.rank,
                bucket_bytes=transfer.bucket_bytes,
                timeout=transfer.timeout,
                host=ray.util.get_node_ip_address(),
            )
        self._sender.form_group(engines)

    def send_weights(self) -> TransferReport | None:
        if self._sender is None:
            raise RuntimeError("send_weights before form_weight_group")
        return self._sender.send()

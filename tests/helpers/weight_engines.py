"""Engines as a weight transfer sees them, without vLLM: one that only records, one that receives over gloo. And a
learner of one rank to send to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from weight_sync.gloo import GlooInitInfo, join_group, received_buckets
from weight_sync.protocols import EngineHandle, ParamMeta, TransferReport
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.verify import WeightReport, tensor_digest


def fail() -> None:
    raise RuntimeError("out of order")


class FakeEngine:
    """Records what it was told; one phase of it can be replaced."""

    def __init__(self, name: str, journal: list[str], faults: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self.name, self.workers = name, 1
        self.journal, self.faults = journal, dict(faults or {})
        self.paused, self.held_version = False, 0
        self._pool = ThreadPoolExecutor(1)

    def _do(self, phase: str, act: Callable[[], Any]) -> Future[Any]:
        def run() -> Any:
            if phase in self.faults:
                return self.faults[phase]()
            self.journal.append(f"{self.name}.{phase}")
            return act()

        return self._pool.submit(run)

    def check_health(self) -> Future[None]:
        return self._do("health", lambda: None)

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self._do("init", lambda: None)

    def pause(self) -> Future[None]:
        return self._do("pause", lambda: setattr(self, "paused", True))

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self._do("receive", lambda: WeightReport({"w": "1"}))

    def commit(self, version: int) -> Future[None]:
        return self._do("commit", lambda: setattr(self, "held_version", version))

    def resume(self) -> Future[None]:
        return self._do("resume", lambda: setattr(self, "paused", False))


class ThreadEngine(FakeEngine):
    """Receives over gloo in a thread."""

    def __init__(
        self,
        name: str,
        faults: Mapping[str, Callable[[], Any]] | None = None,
        *,
        corrupt: bool = False,
        dies_at: int | None = None,
    ) -> None:
        """`corrupt`: it flips a bit of the first tensor of each bucket. `dies_at`: the bucket at which it is gone."""
        super().__init__(name, [], faults)
        self.corrupt, self.dies_at = corrupt, dies_at
        self.ranks: list[int] = []
        self.values: dict[str, Tensor] = {}

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self._do("init", lambda: self._join(GlooInitInfo(**init_info)))

    def _join(self, info: GlooInitInfo) -> None:
        self.ranks.append(info.rank_offset)
        self.info, self.group = info, join_group(info, info.rank_offset)

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self._do("receive", lambda: self._receive(update_info))

    def _receive(self, info: Mapping[str, Any]) -> WeightReport:
        rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        metadata = [ParamMeta(n, getattr(torch, d), tuple(s)) for n, d, s in rows]
        for index, bucket in enumerate(received_buckets(self.group, metadata, self.info.bucket_bytes)):
            if index == self.dies_at:
                self.group.abort()  # as the system does for a process that ends
                self.faults |= dict.fromkeys(("health", "init", "receive"), fail)
                fail()
            if self.corrupt:
                bucket[0][1].view(torch.uint8).view(-1)[0] ^= 1
            self.values |= bucket
        return WeightReport({name: tensor_digest(value) for name, value in self.values.items()})


class LocalLearner:
    """A learner of one rank in this process."""

    def __init__(self, model: nn.Module, timeout: float = 20.0, bucket_bytes: int = 256) -> None:
        source = PolicySource(model, bucket_bytes=bucket_bytes)
        self.sender = WeightSender(source, backend="gloo", rank=0, bucket_bytes=bucket_bytes, timeout=timeout)

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.sender.form_group(engines)

    def send_weights(self) -> TransferReport:
        report = self.sender.send()
        assert report is not None
        self.sent = report.sent
        return report

"""The interfaces that a synchronisation needs of its two sides. No Ray here: rollout/actor.py and learner/group.py
implement them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from weight_sync.verify import WeightReport


@dataclass(frozen=True, slots=True)
class ParamMeta:
    """One tensor to be sent, as declared before anything is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightSource(Protocol):
    """The learner's weights under the engine's names. The interface is that of vLLM's `WeightSource`, which takes
    seconds to import."""

    def metadata(self) -> list[ParamMeta]:
        """Describe what iteration will yield, in order, without gathering anything."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Start a new pass over `(name, full tensor)`. Collective: all learner ranks iterate to the end together."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One completed transfer, as seen by learner rank 0."""

    sent: Mapping[str, str]
    """Name -> digest (`verify.tensor_digest`) of every tensor as it was sent."""
    received: Mapping[str, WeightReport]
    """Engine name -> that engine's report."""
    gather_seconds: float = 0.0
    """Seconds that rank 0 waited for the source: gathering, merging LoRA, dequantizing."""
    transfer_seconds: float = 0.0
    """The rest: copying into buckets, broadcasting, and waiting for the slowest engine to receive and load them."""
    verify_seconds: float = 0.0
    """Seconds for the digests of what is sent."""


@dataclass(frozen=True, slots=True)
class SyncTimes:
    """Where the time of one synchronisation went, in seconds. Engines load while the next bucket is on its way, so
    `load` and their part of `verify` lie within `transfer`."""

    pause: float
    """From the first call to pause until the last engine resumed: what generation lost."""
    gather: float
    """The learner's gathers, and the merging of LoRA (`TransferReport.gather_seconds`)."""
    transfer: float
    load: float
    """Putting the weights in place, at the slowest engine."""
    verify: float
    """Digests at the learner, digests and coverage at the slowest engine, and their comparison."""


class EngineHandle(Protocol):
    """A rollout engine as seen from another process. Calls return a future at once, so that several engines work side
    by side; the caller sets the deadline. Picklable: the driver hands it to learner rank 0."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int:
        """The number of this engine's processes in a transfer group: tensor parallel x pipeline parallel size."""

    def check_health(self) -> Future[None]: ...

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]: ...

    def pause(self) -> Future[None]: ...

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]: ...

    def commit(self, version: int) -> Future[None]: ...

    def resume(self) -> Future[None]: ...


class WeightLearner(Protocol):
    """The learner group. Both calls block, run on every rank, and end within their own limit."""

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        """Call `WeightSender.form_group(engines)` on every rank. Replaces the former group."""

    def send_weights(self) -> TransferReport:
        """Call `WeightSender.send()` on every rank. Returns rank 0's report."""

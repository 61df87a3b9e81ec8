"""What a synchronisation needs of its two sides. No Ray here: rollout/actor.py and learner/group.py implement these."""

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
    """One tensor of the wire, as declared before anything is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightSource(Protocol):
    """The learner's weights under the engine's names. It has the shape of vLLM's `WeightSource`, which takes seconds to
    import."""

    def metadata(self) -> list[ParamMeta]:
        """What iteration will yield, in its order, without gathering anything."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh pass over `(name, full tensor)`. Collective over learner ranks: all iterate to the end together."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One completed transfer, as learner rank 0 saw it."""

    sent: Mapping[str, str]
    """Wire name -> digest (verify.tensor_digest) of every tensor as sent; empty if digests were not asked for."""
    received: Mapping[str, WeightReport]
    """Engine name -> what that engine says it received."""
    nbytes: int
    seconds: float


class EngineHandle(Protocol):
    """A rollout engine as seen from another process. Calls return at once with a future, so that several engines work
    side by side; the caller sets the deadline. Picklable: the driver hands it to learner rank 0."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int:
        """Processes of this engine in a transfer group: tensor parallel x pipeline parallel size."""

    def check_health(self) -> Future[None]: ...

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]: ...

    def pause(self) -> Future[None]: ...

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]: ...

    def commit(self, version: int) -> Future[None]: ...

    def resume(self) -> Future[None]: ...


class WeightLearner(Protocol):
    """The learner group. Both calls block, run on every rank, and end within their own limit."""

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        """Every rank: `WeightSender.form_group(engines)`. Replaces the former group."""

    def send_weights(self) -> TransferReport:
        """Every rank: `WeightSender.send()`; returns rank 0's report."""

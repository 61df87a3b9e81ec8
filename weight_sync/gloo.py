"""Broadcast of weights over gloo, for CPUs: the group, the bucket plan, and the learner's side.

The engine's side is weight_sync/vllm_worker.py, which registers both with vLLM's factories as "gloo". Nothing here
imports vLLM, so that a learner process starts fast: `GlooTrainer` has the interface of vLLM's
`TrainerWeightTransferEngine`, but not its base class.
"""

from __future__ import annotations

import socket
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from weight_sync.client import WeightSyncClient
from weight_sync.protocols import ParamMeta, WeightSource
from weight_sync.verify import WeightSyncError

ALIGNMENT = 16
"""Every tensor inside a bucket starts at a multiple of this many bytes, so that it can be viewed in its dtype."""
IN_FLIGHT = 2
"""Buckets being sent while the next is gathered."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive tensors `[start, stop)` of the metadata, packed into one buffer of `nbytes`."""

    start: int
    stop: int
    nbytes: int
    offsets: tuple[int, ...]


def plan_buckets(metadata: Sequence[ParamMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut the metadata into buckets of at most `bucket_bytes`. A larger tensor gets a bucket of its own.

    Both sides compute the buckets from the same metadata, so that only buffers travel."""
    buckets: list[Bucket] = []
    offsets: list[int] = []
    start, size = 0, 0
    for index, meta in enumerate(metadata):
        padded = -(-meta.nbytes // ALIGNMENT) * ALIGNMENT
        if offsets and size + padded > bucket_bytes:
            buckets.append(Bucket(start, index, size, tuple(offsets)))
            start, offsets, size = index, [], 0
        offsets.append(size)
        size += padded
    if offsets:
        buckets.append(Bucket(start, len(metadata), size, tuple(offsets)))
    return buckets


def view_in(buffer: Tensor, offset: int, meta: ParamMeta) -> Tensor:
    """View the tensor described by `meta` at byte `offset` of a uint8 `buffer`, without a copy."""
    return buffer[offset : offset + meta.nbytes].view(meta.dtype).view(meta.shape)


# ---------------------------------------------------------------------------------------------------- the group


@dataclass(frozen=True, slots=True)
class GlooInitInfo:
    """A worker needs this to join: where the store is, and the first rank of its engine."""

    host: str
    port: int
    prefix: str
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout: float


def open_store(host: str, timeout: float) -> dist.TCPStore:
    """Open rank 0's key-value store on a port that the system chooses (`store.port`)."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def join_group(info: GlooInitInfo, rank: int, store: dist.TCPStore | None = None) -> dist.ProcessGroupGloo:
    """Join as `rank`, outside torch's default group. Blocks until all have joined or `info.timeout` is over."""
    limit = timedelta(seconds=info.timeout)
    if store is None:
        store = dist.TCPStore(info.host, info.port, is_master=False, wait_for_workers=False, timeout=limit)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = limit
    # Gloo's default is the interface of the host's name, often a loopback alias: choose the one that reaches rank 0.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_address(info.host))]
    return dist.ProcessGroupGloo(dist.PrefixStore(info.prefix, store), rank, info.world_size, options)


def local_address(peer: str) -> str:
    """This machine's address on the route to `peer`; connecting a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        address: str = probe.getsockname()[0]
        return address


def broadcast(group: dist.ProcessGroupGloo, buffer: Tensor) -> dist.Work:
    """Start a broadcast from rank 0. The caller must `finish` it."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    work: dist.Work = group.broadcast([buffer], options)  # type: ignore[attr-defined]
    return work


class BroadcastError(RuntimeError):
    """A peer is gone, or the group's timeout has passed."""


def finish(work: dist.Work) -> None:
    """Wait for a broadcast. Raises BroadcastError."""
    try:
        work.wait()
    except RuntimeError as error:
        raise BroadcastError(str(error)) from error


# ---------------------------------------------------------------------------------------------------- engine side


def received_buckets(
    group: dist.ProcessGroupGloo, metadata: Sequence[ParamMeta], bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the named tensors of one bucket after another. While the caller works on one, the next arrives. Each bucket
    has a buffer of its own, so its tensors may be kept. Raises BroadcastError."""

    def post(bucket: Bucket) -> tuple[Tensor, dist.Work]:
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        return buffer, broadcast(group, buffer)

    buckets = plan_buckets(metadata, bucket_bytes)
    pending = [post(bucket) for bucket in buckets[:1]]
    for index, bucket in enumerate(buckets):
        buffer, work = pending.pop()
        finish(work)
        if index + 1 < len(buckets):
            pending.append(post(buckets[index + 1]))
        metas = metadata[bucket.start : bucket.stop]
        yield [(m.name, view_in(buffer, offset, m)) for m, offset in zip(metas, bucket.offsets, strict=True)]


# ---------------------------------------------------------------------------------------------------- learner side


@dataclass(frozen=True)
class GlooTrainerInitInfo:
    backend: ClassVar[str] = "gloo"

    host: str
    """The address under which the engines reach rank 0."""
    world_size: int
    bucket_bytes: int
    timeout: float
    """The limit of joining and of every broadcast, in seconds."""


class GlooTrainer:
    """Learner rank 0 broadcasts bucket by bucket. The other ranks have none: they only take part in the gathers."""

    def __init__(self, info: GlooTrainerInitInfo, client: WeightSyncClient, source: WeightSource) -> None:
        self.info, self.client, self.source = info, client, source
        self.group: dist.ProcessGroupGloo | None = None
        self._store: dist.TCPStore | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: WeightSyncClient, source: WeightSource
    ) -> GlooTrainer:
        """Form the group, each time with a new store and prefix, so that keys of a failed attempt are never seen."""
        trainer = cls(init_info, client, source)
        try:
            trainer._join()
        except BaseException:
            trainer.shutdown()
            raise
        return trainer

    def _join(self) -> None:
        """Open the store and join as rank 0, while the engines are told to join too."""
        self._store = open_store(self.info.host, self.info.timeout)
        info = GlooInitInfo(
            host=self.info.host,
            port=self._store.port,
            prefix=f"weights-{uuid.uuid4().hex}",
            rank_offset=1,
            world_size=self.info.world_size,
            bucket_bytes=self.info.bucket_bytes,
            timeout=self.info.timeout,
        )
        executor = ThreadPoolExecutor(1, "weight-transfer")
        joining = executor.submit(self.client.init_weight_transfer_engine, asdict(info))
        executor.shutdown(wait=False)
        try:
            self.group = join_group(info, 0, self._store)
        except RuntimeError as error:
            raise _cause(joining, "joining the transfer group", error) from error
        joining.result()

    def send_weights(self) -> None:
        metadata = self.source.metadata()
        update_info = {
            "names": [m.name for m in metadata],
            "dtype_names": [str(m.dtype).removeprefix("torch.") for m in metadata],
            "shapes": [list(m.shape) for m in metadata],
        }
        self.client.start_weight_update()
        executor = ThreadPoolExecutor(1, "weight-transfer")
        receiving = executor.submit(self.client.update_weights, update_info)
        executor.shutdown(wait=False)
        try:
            self._broadcast(metadata, receiving)
        except BroadcastError as error:
            raise _cause(receiving, "receiving the weights", error) from error
        receiving.result()
        self.client.finish_weight_update()

    def _broadcast(self, metadata: list[ParamMeta], receiving: Future[None]) -> None:
        assert self.group is not None
        in_flight: deque[tuple[dist.Work, Tensor]] = deque()
        spare: list[Tensor] = []  # a fresh buffer is mapped page by page, which takes as long as filling it
        tensors = iter(self.source)
        buckets = plan_buckets(metadata, self.info.bucket_bytes)
        size = min(self.info.bucket_bytes, max((bucket.nbytes for bucket in buckets), default=0))
        for bucket in buckets:
            reused = spare and bucket.nbytes <= size  # a larger one holds a single tensor, and is not kept
            whole = spare.pop() if reused else torch.empty(max(bucket.nbytes, size), dtype=torch.uint8)
            buffer = whole[: bucket.nbytes]
            for meta, offset in zip(metadata[bucket.start : bucket.stop], bucket.offsets, strict=True):
                name, tensor = next(tensors)
                if (name, tensor.dtype, tuple(tensor.shape)) != (meta.name, meta.dtype, meta.shape):
                    raise ValueError(f"the weight source declared {meta} but yielded {name} {tensor.shape}")
                view_in(buffer, offset, meta).copy_(tensor)
            if receiving.done():
                receiving.result()  # an engine gave up, and its own error says more than the broadcast's
            if len(in_flight) == IN_FLIGHT:
                work, sent = in_flight.popleft()
                finish(work)
                spare += [sent] if sent.numel() == size else []
            in_flight.append((broadcast(self.group, buffer), whole))
        for _ in tensors:
            raise ValueError("the weight source yielded more tensors than it declared")
        while in_flight:
            finish(in_flight.popleft()[0])

    def shutdown(self) -> None:
        group, self.group, self._store = self.group, None, None
        if group is not None:
            group.abort()


def _cause(call: Future[None], phase: str, error: RuntimeError) -> WeightSyncError:
    """Return the engines' own error if there is one: gloo only says that a connection closed or timed out."""
    try:
        call.result(timeout=5.0)
    except WeightSyncError as from_engines:
        return from_engines
    except TimeoutError:
        pass
    return WeightSyncError(phase, (), str(error))

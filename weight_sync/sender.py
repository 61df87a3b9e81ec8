"""WeightSender: the learner's end of weight synchronisation, one object on every rank.

rank 0    gather bucket ─▶ digest ─▶ broadcast ─▶ engines        (drives the engines through WeightSyncClient)
rank 1..  gather bucket      (the collective only)

Gathering is collective, so `send` is exactly one pass over the source on every rank, whatever fails on rank 0: after an
error rank 0 gathers what is left and drops it. The other ranks end with it, and know neither engines nor transport.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from weight_sync.client import WeightSyncClient
from weight_sync.protocols import EngineHandle, ParamMeta, TransferReport, WeightSource
from weight_sync.verify import WeightSyncError, digest_text, hash_words


class Transport(Protocol):
    """The part of vLLM's `TrainerWeightTransferEngine` that is used here."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class WeightSender:
    """Make one per learner rank; then call `form_group` and `send` on every rank in the same order.

    sender = WeightSender(source, backend="gloo", rank=rank, bucket_bytes=8 << 20, timeout=300.0, host=node_ip)
    sender.form_group(engine_handles)     # again whenever an engine came, went, or a transfer failed
    report = sender.send()                # a TransferReport on rank 0, None elsewhere
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        backend: str,
        rank: int,
        bucket_bytes: int = 8 * 2**20,
        timeout: float = 300.0,
        host: str = "127.0.0.1",
    ) -> None:
        """`host` is the address under which the engines reach this node (used on rank 0). `timeout`, in seconds, limits
        every wait of `form_group` and `send`. Raises ValueError for an unknown `backend`."""
        if backend not in TRANSPORTS:
            raise ValueError(f"unknown transport {backend!r}; known: {', '.join(sorted(TRANSPORTS))}")
        self.source = DigestingSource(source, enabled=rank == 0)
        self.backend, self.rank, self.host = backend, rank, host
        self.bucket_bytes, self.timeout = bucket_bytes, timeout
        self._client: WeightSyncClient | None = None
        self._transport: Transport | None = None

    def form_group(self, engines: Sequence[EngineHandle]) -> None:
        """Connect rank 0 with every worker of `engines` through a new store. A former group is dropped first. The other
        ranks have nothing to do.

        Raises WeightSyncError, which names the engines that did not join within `timeout`."""
        self.close()
        if self.rank != 0:
            return
        client = WeightSyncClient(engines, self.timeout)
        client.check_health("joining the transfer group")  # nobody waits then for an engine that is dead already
        try:
            self._transport = TRANSPORTS[self.backend](self, client)
        except WeightSyncError as error:
            traceback.clear_frames(error.__traceback__)  # as below
            raise client.blamed(error) from error
        self._client = client

    def send(self) -> TransferReport | None:
        """Send one full set of weights to all engines of the group, which must be paused. Collective.

        After an error the group is unusable and must be formed again. Raises WeightSyncError, which names the engines
        that are dead or hang, or else those that failed."""
        self.source.begin()
        if self.rank != 0:
            self._finish_pass()
            return None
        if self._transport is None or self._client is None:
            self._finish_pass()
            raise WeightSyncError(
                "sending the weights", (), "no weight-transfer group was formed yet, or the last one failed"
            )
        client, begin = self._client, time.perf_counter()
        try:
            self._transport.send_weights()
        except BaseException as error:
            # The engines wait until the connection closes, and it stays open as long as a frame of the error holds it.
            traceback.clear_frames(error.__traceback__)
            self.close()
            self._finish_pass()
            if isinstance(error, WeightSyncError) and (blamed := client.blamed(error)) is not error:
                raise blamed from error
            raise
        elapsed, source = time.perf_counter() - begin, self.source
        return TransferReport(
            source.digests(),
            dict(client.reports),
            gather_seconds=source.gather_seconds,
            transfer_seconds=elapsed - source.gather_seconds - source.hash_seconds,
            verify_seconds=source.hash_seconds,
        )

    def _finish_pass(self) -> None:
        self.source.finish()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # rank 0 sends what these gathers give it

    def close(self) -> None:
        """Leave the group; safe to call again."""
        transport, self._transport, self._client = self._transport, None, None
        if transport is not None:
            transport.shutdown()


class DigestingSource:
    """The source that a transport iterates over, one pass for each send. It remembers the digest of every tensor of the
    pass, if `enabled`."""

    def __init__(self, inner: WeightSource, enabled: bool) -> None:
        self._inner, self._enabled = inner, enabled
        self._hashes: dict[str, Tensor] = {}
        self._pass: Iterator[tuple[str, Tensor]] | None = None
        self.gather_seconds = self.hash_seconds = 0.0

    def metadata(self) -> list[ParamMeta]:
        return self._inner.metadata()

    def begin(self) -> None:
        """A send begins: forget the pass of the former one."""
        self._hashes, self._pass = {}, None
        self.gather_seconds = self.hash_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = iter(self._inner)  # held here: it can be continued after whoever iterates has failed
        begin = time.perf_counter()
        for name, tensor in self._pass:
            gathered = time.perf_counter()
            self.gather_seconds += gathered - begin
            if self._enabled:
                self._hashes[name] = hash_words(tensor)  # stays on its device: a GPU is not waited for in between
            self.hash_seconds += time.perf_counter() - gathered
            yield name, tensor
            begin = time.perf_counter()
        self.gather_seconds += time.perf_counter() - begin

    def finish(self) -> None:
        """Gather, and drop, what is left of this send's pass: all of it where none began."""
        for _ in iter(self._inner) if self._pass is None else self._pass:
            pass

    def digests(self) -> dict[str, str]:
        return {m.name: digest_text(m.dtype, m.shape, self._hashes[m.name]) for m in self.metadata() if self._enabled}


def _gloo(sender: WeightSender, client: WeightSyncClient) -> Transport:
    from weight_sync.gloo import GlooTrainer, GlooTrainerInitInfo

    info = GlooTrainerInitInfo(
        host=sender.host,
        world_size=client.world_size,
        bucket_bytes=sender.bucket_bytes,
        timeout=sender.timeout,
    )
    return GlooTrainer.trainer_init(info, client=client, source=sender.source)


class NcclTransport:
    """vLLM's own NCCL engine. A broadcast would wait for ever for an engine that failed: the engine's error ends it."""

    def __init__(self, trainer: Any, client: WeightSyncClient) -> None:
        self._trainer, self._client = trainer, client
        client.on_failure = self._abort

    def _abort(self) -> None:
        """End the current broadcast (`ncclCommAbort`), from the thread that learned of the failure."""
        communicator = self._trainer.model_update_group
        if communicator is not None:
            communicator.destroy()

    def send_weights(self) -> None:
        """Raises the engines' own error if there is one: an aborted broadcast may fail in any way."""
        try:
            with same_stream():
                self._trainer.send_weights()
        except Exception as error:
            if self._client.failure is not None and error is not self._client.failure:
                raise self._client.failure from error
            raise

    def shutdown(self) -> None:
        self._trainer.shutdown()


@contextmanager
def same_stream() -> Iterator[None]:
    """Restore the current stream afterwards: vLLM's communicator makes its own stream current for good."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


def _nccl(sender: WeightSender, client: WeightSyncClient) -> Transport:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(
        master_address=sender.host,
        master_port=free_port(),
        world_size=client.world_size,
        packed_buffer_size_bytes=sender.bucket_bytes,
        rank=0,
    )
    with same_stream():
        return NcclTransport(
            WeightTransferTrainerFactory.trainer_init(info, client=client, source=sender.source), client
        )


def free_port() -> int:
    """A TCP port that is free now. vLLM's NCCL rendezvous takes a port number, not a bound socket."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


TRANSPORTS: dict[str, Callable[[WeightSender, WeightSyncClient], Transport]] = {"gloo": _gloo, "nccl": _nccl}

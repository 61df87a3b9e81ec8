"""A process that receives weights over gloo as an engine does, but holds nothing else: no vLLM, nothing is sampled.

    ProcessEngine (here) ── pipe ──▶ child: join the group, receive bucket by bucket, digest, copy into place

It is what `bench/weight_sync.py` sends to, and what tests can kill.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from weight_sync.verify import WeightReport


class Receiver:
    """The child's side. `weights` stay allocated from the first transfer on, as an engine's parameters do."""

    def __init__(self, dies_at: int | None) -> None:
        self._dies_at = dies_at
        self.weights: dict[str, Any] = {}
        self._group: Any = None

    def join(self, init_info: Mapping[str, Any]) -> None:
        from weight_sync.gloo import GlooInitInfo, join_group

        self._info = GlooInitInfo(**init_info)
        self._group = None
        self._group = join_group(self._info, self._info.rank_offset)

    def receive(self, update_info: Mapping[str, Any]) -> WeightReport:
        import torch

        from weight_sync.gloo import received_buckets
        from weight_sync.protocols import ParamMeta
        from weight_sync.verify import digest_text, hash_words

        rows = zip(update_info["names"], update_info["dtype_names"], update_info["shapes"], strict=True)
        metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]
        hashes: dict[str, Any] = {}
        load = verify = 0.0
        for index, bucket in enumerate(received_buckets(self._group, metadata, self._info.bucket_bytes)):
            if index == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            begin = time.perf_counter()
            hashes |= {name: hash_words(tensor) for name, tensor in bucket}
            hashed = time.perf_counter()
            for name, tensor in bucket:
                if name not in self.weights:
                    self.weights[name] = torch.empty_like(tensor)
                self.weights[name].copy_(tensor)
            verify += hashed - begin
            load += time.perf_counter() - hashed
        digests = {m.name: digest_text(m.dtype, m.shape, hashes[m.name]) for m in metadata}
        return WeightReport(digests, load_seconds=load, verify_seconds=verify)

    def make_room(self, nbytes: int) -> None:
        import torch

        self.room = torch.zeros(nbytes, dtype=torch.uint8)

    def raw(self, bucket_bytes: int) -> None:
        """Receive into that room, and do nothing with it."""
        from weight_sync.gloo import broadcast, finish

        for start in range(0, self.room.numel(), bucket_bytes):
            finish(broadcast(self._group, self.room[start : start + bucket_bytes]))
        del self.room

    def nothing(self) -> None:
        pass


def serve(pipe: Connection, dies_at: int | None) -> None:
    import torch

    torch.set_num_threads(1)
    receiver = Receiver(dies_at)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(receiver, method)(*arguments)))
        except Exception as error:
            pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


class ProcessEngine:
    """The handle of such a process (`weight_sync.protocols.EngineHandle`)."""

    def __init__(self, name: str, dies_at: int | None = None) -> None:
        """`dies_at`: the bucket at which it kills itself, for tests."""
        self.name, self.workers = name, 1
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, dies_at), name=name, daemon=True)
        self.process.start()
        other.close()  # the death of the child then ends `recv`
        self._thread = ThreadPoolExecutor(1, name)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._thread.submit(self._call, method, arguments)

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            self._pipe.send((method, arguments))
            good, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process of {self.name} is gone") from error
        if not good:
            raise answer
        return answer

    def check_health(self) -> Future[None]:
        return self.call("nothing")

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self.call("join", dict(init_info))

    def pause(self) -> Future[None]:
        return self.call("nothing")

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self.call("receive", dict(update_info))

    def commit(self, version: int) -> Future[None]:
        return self.call("nothing")

    def resume(self) -> Future[None]:
        return self.call("nothing")

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._thread.shutdown(wait=False)

"""SimulatedEngine: simulates the latency of an engine without a model, for scale benchmarks and fault tests. It is
never a default.

    waiting ──(max_num_seqs slots)──▶ running ──one token each per step──▶ finished        one loop, as in a real engine
    step time = decode + per_sequence x running + prompt tokens admitted / prefill rate

Tokens and lengths depend only on the seeds. Weights are really received over gloo and digested, and then dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from rollout.engines.protocol import EngineDeadError, EngineOptions, EngineOutput, PromptRefusedError, SamplingParams
from rollout.types import Completion, Prompt, Segment
from vlm.adapter import MultimodalAdapter
from vlm.media.types import Media
from weight_sync.gloo import GlooInitInfo, broadcast, finish, join_group, plan_buckets, view_in
from weight_sync.protocols import ParamMeta
from weight_sync.verify import WeightReport, tensor_digest

Fault = Literal["none", "die", "hang", "slow"]


@dataclass(frozen=True, slots=True)
class Simulation:
    """The simulated speed, lengths and faults."""

    decode_seconds: float = 0.001
    """Seconds of one step of one sequence."""
    per_sequence_seconds: float = 0.0
    """Seconds that each running sequence adds to a step."""
    prefill_tokens_per_second: float = 1e6
    start_seconds: float = 0.0
    mean_tokens: float = 64.0
    """Median length of a completion, before the request's maximum cuts it."""
    length_sigma: float = 0.5
    """Standard deviation of the logarithm of lengths (log-normal)."""
    fault: Fault = "none"
    fault_after_groups: int = 0
    """The number of groups after which `fault` occurs."""
    slowdown: float = 10.0
    """Factor on the time of every step after the fault "slow"."""


@dataclass(eq=False)
class _Sequence:
    prompt_length: int
    length: int
    finished: asyncio.Future[None]
    versions: list[int] = field(default_factory=list)


class SimulatedEngine:
    """A simulated engine. See `RolloutEngine` for the contract, and `Simulation` for the simulation."""

    def __init__(
        self, options: EngineOptions, adapter: MultimodalAdapter, simulation: Simulation | None = None
    ) -> None:
        self._options, self._adapter = options, adapter
        self._simulation = simulation or Simulation()
        self._vocabulary = len(adapter.tokenizer)
        self._loop: asyncio.Task[None] | None = None
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._runnable = asyncio.Event()
        self._state: Literal["new", "running", "hung", "dead"] = "new"
        self._paused = False
        self._slowdown = 1.0
        self._version = 0
        self._groups = 0
        self._info: GlooInitInfo | None = None
        self._transfer: torch.distributed.ProcessGroupGloo | None = None

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        if self._options.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("the simulated engine was asked for device 'cuda', but torch sees no CUDA GPU here")
        await asyncio.sleep(self._simulation.start_seconds)
        self._state = "running"
        self._loop = asyncio.create_task(self._run())

    async def shutdown(self) -> None:
        self.fail("die")
        self._leave_group()

    def fail(self, fault: Fault) -> None:
        """Let the fault occur now."""
        if fault == "die":
            self._state = "dead"
            if self._loop is not None:
                self._loop.cancel()
            for sequence in [*self._running, *self._waiting]:
                if not sequence.finished.done():
                    sequence.finished.set_exception(EngineDeadError("the simulated engine died"))
            self._running.clear()
            self._waiting.clear()
        elif fault == "hang":
            self._state = "hung"
        elif fault == "slow":
            self._slowdown = self._simulation.slowdown

    async def check_health(self) -> None:
        await self._answer("answer a health check")

    def _alive(self) -> None:
        if self._state in ("new", "dead"):
            raise EngineDeadError("the simulated engine is not running: it was not started, was shut down, or died")

    async def _answer(self, question: str) -> None:
        """Return at once while the engine runs. A hanging engine is given up after `options.control_timeout`."""
        self._alive()
        if self._state == "hung":
            await asyncio.sleep(self._options.control_timeout)
            raise EngineDeadError(f"the engine did not {question} within {self._options.control_timeout:g} s; it hangs")

    # ------------------------------------------------------------------ sampling

    async def sample(self, prompt: Prompt, media: Sequence[Media], sampling: SamplingParams) -> EngineOutput:
        self._alive()
        limits = sampling.max_tokens_each or (sampling.max_tokens,) * sampling.n
        if len(limits) != sampling.n:
            raise ValueError(f"max_tokens_each has {len(limits)} entries for n={sampling.n} completions")
        if prompt.expanded_length + max(limits) > self._options.max_model_len:
            raise PromptRefusedError(
                f"prompt {prompt.ref} has {prompt.expanded_length} tokens including its images; with "
                f"{max(limits)} new ones, that exceeds the engine's max_model_len of "
                f"{self._options.max_model_len}"
            )
        seeds = [None if sampling.seed is None else sampling.seed + k for k in range(sampling.n)]
        draws = [self._draw(seed, limit, sampling) for seed, limit in zip(seeds, limits, strict=True)]
        loop = asyncio.get_running_loop()
        sequences = [_Sequence(prompt.expanded_length, len(ids), loop.create_future()) for ids, _, _ in draws]
        self._waiting.extend(sequences)
        self._wake()
        try:
            await asyncio.gather(*(sequence.finished for sequence in sequences))
        except BaseException:
            for sequence in sequences:
                self._forget(sequence)
            raise
        completions = tuple(
            self._completion(draw, sequence, seed) for draw, sequence, seed in zip(draws, sequences, seeds, strict=True)
        )
        self._count_group()
        return EngineOutput(self._expanded(prompt, media), completions)

    def queued(self) -> int:
        return len(self._waiting) + len(self._running)

    def _draw(self, seed: int | None, limit: int, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray, bool]:
        """Draw tokens, log-probabilities and whether the completion stopped by itself. The result is a function of the
        seed, uniform over the tokens that are not banned."""
        rng = np.random.default_rng(seed)
        factor = float(np.exp(rng.normal() * self._simulation.length_sigma))
        length = max(1, round(self._simulation.mean_tokens * factor))
        stopped = length <= limit and not sampling.ignore_eos
        length = length if stopped else limit
        allowed = np.setdiff1d(np.arange(self._vocabulary), np.asarray(sampling.banned_token_ids, int))
        stops = np.asarray(sampling.stop_token_ids or self._adapter.stop_token_ids, int)
        tokens = rng.choice(np.setdiff1d(allowed, stops), size=length).astype(np.int32)
        if stopped and len(stops):
            tokens[-1] = stops[0]
        return tokens, np.full(length, -np.log(len(allowed)), np.float32), stopped

    def _completion(
        self, draw: tuple[np.ndarray, np.ndarray, bool], sequence: _Sequence, seed: int | None
    ) -> Completion:
        tokens, logprobs, stopped = draw
        text = self._adapter.completion_text(tokens)
        segment = Segment(tokens, logprobs, np.asarray(sequence.versions, np.int32))
        return Completion((segment,), text, "stop" if stopped else "length", -1 if seed is None else seed)

    def _expanded(self, prompt: Prompt, media: Sequence[Media]) -> np.ndarray:
        """Return the ids with each placeholder repeated as often as its item has tokens."""
        lengths = iter(self._adapter.media_lengths(media))
        places = set(self._adapter.placeholder_ids.values())
        repeats = [next(lengths) if token in places else 1 for token in prompt.token_ids]
        return np.repeat(prompt.token_ids, repeats).astype(np.int32)

    async def _run(self) -> None:
        """Run the engine's loop: each step gives every running sequence one token."""
        simulation = self._simulation
        while True:
            await self._runnable.wait()
            admitted = 0
            while self._waiting and len(self._running) < self._options.rollout.max_num_seqs:
                self._running.append(self._waiting.popleft())
                admitted += self._running[-1].prompt_length
            step = simulation.decode_seconds + simulation.per_sequence_seconds * len(self._running)
            await asyncio.sleep((step + admitted / simulation.prefill_tokens_per_second) * self._slowdown)
            for sequence in list(self._running):
                sequence.versions.append(self._version)
                if len(sequence.versions) == sequence.length:
                    self._running.remove(sequence)
                    sequence.finished.set_result(None)
            self._wake()

    def _wake(self) -> None:
        busy = bool(self._running or self._waiting)
        if busy and not self._paused and self._state == "running":
            self._runnable.set()
        else:
            self._runnable.clear()

    def _forget(self, sequence: _Sequence) -> None:
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._wake()

    def _count_group(self) -> None:
        self._groups += 1
        if self._groups == self._simulation.fault_after_groups:
            self.fail(self._simulation.fault)

    # ------------------------------------------------------------------ weights

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        await self._answer("join the transfer group")
        self._leave_group()
        self._info = info = GlooInitInfo(**init_info)
        self._transfer = await asyncio.to_thread(join_group, info, info.rank_offset)

    def _leave_group(self) -> None:
        group, self._transfer = self._transfer, None
        if group is not None:
            group.abort()

    async def pause(self) -> None:
        await self._answer("pause")
        self._paused = True
        self._wake()

    async def receive_weights(self, update_info: Mapping[str, Any]) -> WeightReport:
        await self._answer("receive weights")
        if self._transfer is None or self._info is None:
            raise RuntimeError("this engine has not joined a weight-transfer group")
        return await asyncio.to_thread(_receive, self._transfer, self._info.bucket_bytes, update_info)

    async def commit(self, version: int) -> None:
        await self._answer("commit a version")
        self._version = version

    async def resume(self) -> None:
        await self._answer("resume")
        self._paused = False
        self._wake()

    async def version(self) -> int:
        await self._answer("tell its version")
        return self._version


def _receive(group: torch.distributed.ProcessGroupGloo, bucket_bytes: int, info: Mapping[str, Any]) -> WeightReport:
    """Take part in the broadcast, digest every tensor, and drop it."""
    rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
    metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]
    digests = {}
    for bucket in plan_buckets(metadata, bucket_bytes):
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        finish(broadcast(group, buffer))
        for meta, offset in zip(metadata[bucket.start : bucket.stop], bucket.offsets, strict=True):
            digests[meta.name] = tensor_digest(view_in(buffer, offset, meta))
    return WeightReport(digests)

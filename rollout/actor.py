"""RolloutActor: a thin Ray shell around one engine. It samples groups, and answers failures with plain data.

driver ── sample(prompt, sampling) ──▶ [media fetched] ─▶ engine ─▶ RolloutGroup | RolloutFailure ─▶ reward actor
       └─ with Together(batch, size): the engine is paused until all `size` groups of the batch wait in its queue
learner rank 0 ── rollout/handle.py ────▶ pause, receive, commit, resume

actor = ray.remote(RolloutActor).options(max_concurrency=1000, ...).remote(name, options, load_adapter, group_timeout=9)
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import ray

from rollout.engines.protocol import (
    EngineDeadError,
    EngineOptions,
    EngineOutput,
    PromptRefusedError,
    RolloutEngine,
    SamplingParams,
)
from rollout.joint_start import Holds, JointStart
from rollout.types import Prompt, RolloutFailure, RolloutGroup, Together
from vlm.adapter import MultimodalAdapter
from vlm.media.types import Media
from weight_sync.verify import WeightReport

EngineFactory = Callable[[EngineOptions, MultimodalAdapter], RolloutEngine]


def vllm_engine(options: EngineOptions, adapter: MultimodalAdapter) -> RolloutEngine:
    from rollout.engines.vllm_engine import VLLMEngine

    return VLLMEngine(options, adapter)


class RolloutActor:
    """Owns one engine in its own process. Every call may run beside others (`max_concurrency` high)."""

    def __init__(
        self,
        name: str,
        options: EngineOptions,
        adapter: Callable[[], MultimodalAdapter],
        *,
        group_timeout: float,
        engine: EngineFactory = vllm_engine,
    ) -> None:
        """`adapter` is called in this process, when the engine starts. `group_timeout` in seconds bounds one group."""
        self._name = name
        self._options = options
        self._load_adapter = adapter
        self._group_timeout = group_timeout
        self._make_engine = engine
        self._adapter: MultimodalAdapter | None = None
        self._engine: RolloutEngine | None = None
        self._started = asyncio.Lock()
        self._starts: dict[str, JointStart] = {}
        self._holds = Holds()
        self._pending: set[asyncio.Task[EngineOutput]] = set()

    def __repr__(self) -> str:
        """The dashboard shows this name, and Ray prints it in front of this actor's output."""
        return self._name

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start the engine. Raises RuntimeError with the engine's own log tail when it cannot."""
        async with self._started:
            if self._adapter is None:
                self._adapter = self._load_adapter()
            engine = self._make_engine(self._options, self._adapter)
            await engine.start()
            self._engine = engine
            # Requests allocate many small objects; looking through vLLM's and torch's modules each time the collector
            # runs took a quarter of this process's time.
            gc.collect()
            gc.freeze()

    async def shutdown(self) -> None:
        """End the engine; groups that are being sampled are answered as failures, since others wait for them."""
        engine, self._engine = self._engine, None
        for task in self._pending:
            task.cancel()
        if engine is not None:
            await engine.shutdown()

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            raise EngineDeadError(f"engine {self._name} is not running: it was not started, or was shut down")
        return self._engine

    # ------------------------------------------------------------------ sampling

    async def sample(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int | None = None,
        attempt: int | None = None,
        together: Together | None = None,
    ) -> RolloutGroup | RolloutFailure:
        """All K completions of one prompt. `seed` overrides the one in `sampling`, `attempt` the one in `prompt.ref`.
        With `together` it starts when the other groups of its batch do.

        It never raises for what can go wrong with an engine or a prompt: an exception would have to be unpickled in the
        driver, which would import the engine for it."""
        if seed is not None:
            sampling = replace(sampling, seed=seed)
        if attempt is not None:
            prompt = replace(prompt, ref=replace(prompt.ref, attempt=attempt))

        def failure(reason: str, *, dead: bool = False, retryable: bool = False) -> RolloutFailure:
            return RolloutFailure(prompt.ref, reason, self._name, engine_dead=dead, retryable=retryable)

        begin = time.perf_counter()
        try:
            start = None if together is None else self._joint_start(together, sampling.n)
            output = await asyncio.wait_for(self._tracked(prompt, sampling, start), self._group_timeout)
        except PromptRefusedError as error:
            return failure(str(error))
        except EngineDeadError as error:
            return failure(str(error), dead=True)
        except asyncio.CancelledError:
            if self._engine is not None:
                raise
            return failure(f"engine {self._name} was shut down", dead=True)
        except TimeoutError:
            return await self._explain_timeout(failure)
        except ray.exceptions.RayError as error:
            return failure(f"media of {prompt.ref} could not be fetched: {error}", retryable=True)
        except Exception as error:
            return failure(f"{type(error).__name__}: {error}", retryable=True)
        seconds = time.perf_counter() - begin
        return RolloutGroup(
            prompt,
            output.prompt_token_ids,
            output.completions,
            engine=self._name,
            generate_started=time.time() - seconds,
            generate_seconds=seconds,
        )

    def _joint_start(self, together: Together, n: int) -> JointStart:
        """The start that this group takes part in; it is forgotten with the last group that arrives for it."""
        start = self._starts.get(together.batch)
        if start is None:
            start = JointStart(self._running(), self._holds, together.size, n, self._group_timeout)
            self._starts[together.batch] = start
        start.arrived += 1
        if start.arrived == together.size:
            del self._starts[together.batch]
        return start

    async def _tracked(self, prompt: Prompt, sampling: SamplingParams, start: JointStart | None) -> EngineOutput:
        work = self._sample(prompt, sampling) if start is None else start.run(lambda: self._sample(prompt, sampling))
        task = asyncio.ensure_future(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return await task

    async def _sample(self, prompt: Prompt, sampling: SamplingParams) -> EngineOutput:
        media = await _fetch(prompt.media)
        sample = self._running().sample
        output = await sample(prompt, media, sampling)
        redone: dict[int, Any] = {}
        for k, completion in enumerate(output.completions):
            if completion.finish_reason == "abort":  # cut off, by no fault of its own: the same draw once more, alone
                again = await sample(prompt, media, _alone(sampling, k))
                redone[k] = again.completions[0]
        completions = tuple(redone.get(k, c) for k, c in enumerate(output.completions))
        cut = [k for k, c in enumerate(completions) if c.finish_reason == "abort"]
        if cut:
            raise RuntimeError(f"completions {cut} were aborted twice")
        return replace(output, completions=completions)

    async def _explain_timeout(self, failure: Callable[..., RolloutFailure]) -> RolloutFailure:
        reason = f"waited {self._group_timeout:g} s (a third of cluster.timeout) for its completions"
        try:
            await self._running().check_health()
        except EngineDeadError as error:
            return failure(f"{reason}; {error}", dead=True)
        return failure(reason, retryable=True)

    # ------------------------------------------------------------------ weights (see weight_sync.protocols)

    async def check_health(self) -> None:
        await self._running().check_health()

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        await self._running().init_weight_transfer(init_info)

    async def pause(self) -> None:
        await self._holds.pause(self._running(), self)

    async def receive_weights(self, update_info: Mapping[str, Any]) -> WeightReport:
        return await self._running().receive_weights(update_info)

    async def commit(self, version: int) -> None:
        await self._running().commit(version)

    async def resume(self) -> None:
        await self._holds.resume(self._running(), self)


def _alone(sampling: SamplingParams, k: int) -> SamplingParams:
    """The draw of completion `k` as a request of its own."""
    each = sampling.max_tokens_each
    return replace(
        sampling,
        n=1,
        seed=None if sampling.seed is None else sampling.seed + k,
        max_tokens=each[k] if each else sampling.max_tokens,
        max_tokens_each=(),
    )


async def _fetch(media: tuple[Media, ...]) -> tuple[Media, ...]:
    """Media with their bytes, fetched from the object store together."""

    async def resolve(item: Media) -> Media:
        if isinstance(item.data, ray.ObjectRef):
            reference: Awaitable[bytes] = item.data
            return replace(item, data=await reference)
        return item

    return tuple(await asyncio.gather(*(resolve(item) for item in media)))

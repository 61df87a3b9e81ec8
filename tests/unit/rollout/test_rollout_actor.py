"""RolloutActor in Ray, over simulated engines with every fault: what reaches the driver is always plain data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.actor import RolloutActor
from rollout.engines.protocol import EngineDeadError, EngineOptions, EngineOutput, PromptRefusedError, SamplingParams
from rollout.engines.simulated_engine import SimulatedEngine, Simulation
from rollout.types import Completion, Prompt, RolloutFailure, RolloutGroup, Segment, Together
from tests.contracts.engine_contract import make_prompt
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

OPTIONS = EngineOptions(ModelConfig("simulated"), device="cpu", max_model_len=512, control_timeout=0.5)
SAMPLING = SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return load_adapter(str(tiny_model))


# ---------------------------------------------------------------------------------------------------- without Ray


@dataclass
class Scripted:
    """An engine that answers what the test says, and remembers what it was asked."""

    answer: Callable[[SamplingParams], EngineOutput]
    asked: list[SamplingParams] = field(default_factory=list)

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def check_health(self) -> None: ...

    async def sample(self, prompt: Prompt, media: Any, sampling: SamplingParams) -> EngineOutput:
        self.asked.append(sampling)
        return self.answer(sampling)


def completion(reason: str, token: int, seed: int = 0) -> Completion:
    part = Segment(np.asarray([token], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32))
    return Completion((part,), "", reason, seed)  # type: ignore[arg-type]


def ask(adapter: MultimodalAdapter, engine: Any, sampling: SamplingParams = SAMPLING, timeout: float = 5.0) -> Any:
    async def play() -> Any:
        actor = RolloutActor(
            "e", OPTIONS, lambda: adapter, group_timeout=timeout, engine=lambda options, adapter: engine
        )
        await actor.start()
        try:
            return await actor.sample(make_prompt(adapter, "?"), sampling)
        finally:
            await actor.shutdown()

    return asyncio.run(play())


def test_an_aborted_completion_is_drawn_again_alone(adapter: MultimodalAdapter) -> None:
    def answer(sampling: SamplingParams) -> EngineOutput:
        if sampling.n == 1:
            return EngineOutput(np.zeros(2, np.int32), (completion("stop", 9),))
        return EngineOutput(np.zeros(2, np.int32), tuple(completion(r, i) for i, r in enumerate(("stop", "abort"))))

    engine = Scripted(answer)
    group = ask(adapter, engine, replace(SAMPLING, n=2, seed=40, max_tokens_each=(3, 4)))
    assert [c.finish_reason for c in group.completions] == ["stop", "stop"]
    assert [c.segments[0].token_ids[0] for c in group.completions] == [0, 9]
    again = engine.asked[1]
    assert (again.n, again.seed, again.max_tokens, again.max_tokens_each) == (1, 41, 4, ())


def test_aborted_twice_is_a_failure_that_may_be_retried(adapter: MultimodalAdapter) -> None:
    engine = Scripted(lambda sampling: EngineOutput(np.zeros(2, np.int32), (completion("abort", 1),) * sampling.n))
    failure = ask(adapter, engine)
    assert isinstance(failure, RolloutFailure) and failure.retryable and not failure.engine_dead
    assert "completions [0, 1, 2] were aborted twice" in failure.reason


@pytest.mark.parametrize(
    ("error", "dead", "retryable"),
    [
        (PromptRefusedError("too long"), False, False),
        (EngineDeadError("gone"), True, False),
        (RuntimeError("odd"), False, True),
    ],
)
def test_errors_become_data(adapter: MultimodalAdapter, error: Exception, dead: bool, retryable: bool) -> None:
    def answer(sampling: SamplingParams) -> EngineOutput:
        raise error

    failure = ask(adapter, Scripted(answer))
    assert isinstance(failure, RolloutFailure) and str(error) in failure.reason
    assert (failure.engine, failure.engine_dead, failure.retryable) == ("e", dead, retryable)


def test_a_slow_group_is_given_up_and_a_hanging_engine_is_told_from_it(adapter: MultimodalAdapter) -> None:
    slow = SimulatedEngine(OPTIONS, adapter, Simulation(decode_seconds=10.0))
    failure = ask(adapter, slow, timeout=0.2)
    assert failure.retryable and not failure.engine_dead and "0.2 s (a third of cluster.timeout)" in failure.reason

    class Hanging(SimulatedEngine):
        async def sample(self, *args: Any) -> EngineOutput:
            self.fail("hang")
            return await super().sample(*args)

    failure = ask(adapter, Hanging(OPTIONS, adapter, Simulation(decode_seconds=10.0)), timeout=0.2)
    assert failure.engine_dead and "hangs" in failure.reason


def test_a_shutdown_answers_groups_that_are_being_generated(adapter: MultimodalAdapter) -> None:
    """Whoever is chained behind them, a reward actor first of all, would wait for ever."""

    class Silent(Scripted):
        async def sample(self, prompt: Prompt, media: Any, sampling: SamplingParams) -> EngineOutput:
            self.asked.append(sampling)
            return await asyncio.get_running_loop().create_future()

    async def play() -> Any:
        engine = Silent(lambda sampling: None)  # type: ignore[arg-type, return-value]
        actor = RolloutActor("e", OPTIONS, lambda: adapter, group_timeout=60.0, engine=lambda *given: engine)
        await actor.start()
        running = asyncio.create_task(actor.sample(make_prompt(adapter, "?"), SAMPLING))
        while not engine.asked:
            await asyncio.sleep(0)
        await actor.shutdown()
        return await asyncio.wait_for(running, 5.0)

    failure = asyncio.run(play())
    assert isinstance(failure, RolloutFailure) and failure.engine_dead
    assert failure.reason == "engine e was shut down"


def test_an_actor_that_was_not_started_answers_too(adapter: MultimodalAdapter) -> None:
    actor = RolloutActor("e", OPTIONS, lambda: adapter, group_timeout=5.0)
    failure = asyncio.run(actor.sample(make_prompt(adapter, "?"), SAMPLING))
    assert isinstance(failure, RolloutFailure) and failure.engine_dead and "not running" in failure.reason


class Queue(Scripted):
    """Keeps a journal, and answers only while it is not paused; `fail` names a call that raises."""

    def __init__(self, fail: str = "") -> None:
        super().__init__(lambda sampling: EngineOutput(np.zeros(2, np.int32), (completion("stop", 1),) * sampling.n))
        self.fail, self.journal, self.waiting = fail, [], 0
        self.running = asyncio.Event()
        self.running.set()

    async def _note(self, call: str) -> None:
        self.journal.append(call)
        await asyncio.sleep(0)
        if call == self.fail:
            raise EngineDeadError(f"gone at {call}")

    async def pause(self) -> None:
        await self._note("pause")
        self.running.clear()

    async def resume(self) -> None:
        await self._note(f"resume with {self.waiting}")
        self.running.set()

    def queued(self) -> int:
        return self.waiting

    async def sample(self, prompt: Prompt, media: Any, sampling: SamplingParams) -> EngineOutput:
        if prompt.text == "refused":
            raise PromptRefusedError("too long")
        self.waiting += sampling.n
        await self.running.wait()
        self.waiting -= sampling.n
        return self.answer(sampling)


def ask_together(adapter: MultimodalAdapter, engine: Any, texts: Sequence[str], size: int, timeout: float) -> list[Any]:
    async def play() -> list[Any]:
        actor = RolloutActor("e", OPTIONS, lambda: adapter, group_timeout=timeout, engine=lambda *given: engine)
        await actor.start()
        calls = []
        for text in texts:
            prompt = replace(make_prompt(adapter, "?"), text=text)
            calls.append(asyncio.create_task(actor.sample(prompt, SAMPLING, together=Together("0", size))))
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(*calls)
        assert size != len(texts) or not actor._starts
        return answers

    return asyncio.run(play())


def test_groups_that_start_together_run_when_all_wait_or_were_refused(adapter: MultimodalAdapter) -> None:
    engine = Queue()
    answers = ask_together(adapter, engine, ["a", "refused", "b"], 3, 60.0)
    assert [type(a) for a in answers] == [RolloutGroup, RolloutFailure, RolloutGroup]
    assert engine.journal == ["pause", "resume with 6"]


def test_groups_that_start_together_do_not_resume_an_engine_that_receives_weights(adapter: MultimodalAdapter) -> None:
    engine = Queue()

    async def play() -> list[Any]:
        actor = RolloutActor("e", OPTIONS, lambda: adapter, group_timeout=60.0, engine=lambda *given: engine)
        await actor.start()
        await actor.pause()
        calls = [asyncio.create_task(actor.sample(make_prompt(adapter, "a"), SAMPLING, together=Together("0", 2)))]
        async with asyncio.timeout(30):
            while not actor._starts:
                await asyncio.sleep(0)
            start = actor._starts["0"]
            calls.append(
                asyncio.create_task(actor.sample(make_prompt(adapter, "b"), SAMPLING, together=Together("0", 2)))
            )
            await start._resumed
        assert engine.journal == ["pause", "pause"] and not engine.running.is_set()
        await actor.resume()
        return await asyncio.gather(*calls)

    answers = asyncio.run(play())
    assert all(isinstance(a, RolloutGroup) for a in answers) and engine.journal[2:] == ["resume with 6"]


def test_a_joint_start_that_misses_a_group_or_fails_is_the_failure_of_its_groups(adapter: MultimodalAdapter) -> None:
    engine = Queue()
    answers = ask_together(adapter, engine, ["a", "b"], 3, 0.1)
    assert all(isinstance(a, RolloutFailure) and a.retryable for a in answers)
    assert engine.journal[0] == "pause" and engine.running.is_set(), "the engine must not stay paused"
    for call in ("pause", "resume with 6"):
        answers = ask_together(adapter, Queue(fail=call), ["a", "b"], 2, 60.0)
        assert all(isinstance(a, RolloutFailure) and a.engine_dead and call in a.reason for a in answers)


# ---------------------------------------------------------------------------------------------------- in Ray


def simulated(simulation: Simulation, options: EngineOptions, adapter: MultimodalAdapter) -> SimulatedEngine:
    return SimulatedEngine(options, adapter, simulation)

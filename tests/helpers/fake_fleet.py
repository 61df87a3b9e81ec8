"""A fleet without Ray: engines, rewards, data and a learner that answer at once, as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from learner.durable import seal
from learner.types import LearnerError, UpdateStats
from rollout.engines.protocol import SamplingParams
from rollout.types import (
    Completion,
    GroupSummary,
    Prompt,
    PromptRef,
    RolloutFailure,
    RolloutGroup,
    Segment,
    StoredGroup,
    StoredPrompt,
    Together,
    Verdict,
)
from saccade.fleet.pool import EnginePool, Pool
from saccade.pipeline.admission import Strict, Windowed
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline
from saccade.pipeline.sealed_batch import SealedBatch
from weight_sync.protocols import TransferReport
from weight_sync.verify import WeightReport

T = TypeVar("T")

Script = Mapping[int, Sequence[Mapping[str, Any]]]
"""By row: the failure of attempt 0, of attempt 1, ..."""


def done(value: T) -> Future[T]:
    call: Future[T] = Future()
    call.set_result(value)
    return call


def failed(error: Exception) -> Future[Any]:
    call: Future[Any] = Future()
    call.set_exception(error)
    return call


def prompt(row: int) -> Prompt:
    return Prompt(PromptRef(f"d:{row}", 0, 0, row), "p", np.zeros(2, np.int32), expanded_length=2)


def stored(row: int) -> StoredPrompt:
    return StoredPrompt(prompt(row).ref, prompt(row))


class ActorLost(RuntimeError):
    """What Ray raises where an actor died."""

    def __init__(self, actor_id: str) -> None:
        super().__init__("\nThe actor died.")
        self.actor_id = actor_id


class FakeActor:
    """One that always starts, and lives until it is killed."""

    name: str
    killed = False

    @property
    def id(self) -> str:
        return f"{self.name} {id(self)}"

    def start(self) -> Future[None]:
        return done(None)

    def node(self) -> Future[str]:
        return done("here")

    def check_health(self) -> Future[None]:
        return failed(ActorLost(self.id)) if self.killed else done(None)

    def kill(self) -> None:
        self.killed = True


@dataclass
class FakeData(FakeActor):
    """Rows 0, 1, 2, ..."""

    row: int = 0
    name: str = "data"

    def take(self, n: int) -> Future[tuple[list[StoredPrompt], dict[str, Any]]]:
        if self.killed:
            return failed(ActorLost(self.id))
        self.row += n
        return done(([stored(row) for row in range(self.row - n, self.row)], {"row": self.row}))

    def read(self, refs: Sequence[PromptRef]) -> Future[list[StoredPrompt]]:
        if self.killed:
            return failed(ActorLost(self.id))
        return done([StoredPrompt(ref, prompt(ref.row)) for ref in refs])

    def load_state(self, state: Mapping[str, Any] | None) -> Future[None]:
        if self.killed:
            return failed(ActorLost(self.id))
        self.row = 0 if state is None else state["row"]
        return done(None)


@dataclass
class FakeEngine(FakeActor):
    """Fails as its script says; its groups are of the version that was committed last."""

    script: Script = field(default_factory=dict)
    name: str = "rollout-0"
    version: int = 0
    asked: list[tuple[int, int, int | None, Together | None]] = field(default_factory=list)
    """Row, attempt, seed and company of each group, in the order of the calls."""

    def sample(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int | None = None,
        attempt: int | None = None,
        together: Together | None = None,
    ) -> RolloutGroup | RolloutFailure | ActorLost:
        """A group, a failure, or what a dead engine leaves of either."""
        if self.killed:
            return ActorLost(self.id)
        prompt = replace(prompt, ref=replace(prompt.ref, attempt=attempt or 0))
        self.asked.append((prompt.ref.row, prompt.ref.attempt, seed, together))
        failures = self.script.get(prompt.ref.row, ())
        if prompt.ref.attempt < len(failures):
            return RolloutFailure(prompt.ref, engine=self.name, **failures[prompt.ref.attempt])
        segment = Segment(np.zeros(1, np.int32), np.zeros(1, np.float32), np.full(1, self.version, np.int32))
        completions = tuple(Completion((segment,), "x", "stop", seed=k) for k in range(sampling.n))
        return RolloutGroup(prompt, prompt.token_ids, completions, engine=self.name)

    def has_answered(self, group: Any) -> bool:
        return True

    def pause(self) -> Future[None]:
        return done(None)

    def commit(self, version: int) -> Future[None]:
        self.version = version
        return done(None)

    def resume(self) -> Future[None]:
        return done(None)

    def seeds(self, row: int) -> list[int | None]:
        return [seed for asked, _, seed, _ in self.asked if asked == row]


@dataclass
class FakeRewards(FakeActor):
    """Scores 0, 1, ...; all 1 for the rows that are flat, and none in time for those that are slow."""

    flat: Collection[int] = ()
    slow: Collection[int] = ()
    name: str = "reward-0"
    held: Collection[int] = ()
    """Rows of which nothing is heard before a test releases them."""
    waiting: dict[int, tuple[Future[GroupSummary], GroupSummary]] = field(default_factory=dict)

    def score(
        self, group: RolloutGroup | RolloutFailure | ActorLost
    ) -> tuple[tuple[Verdict, ...], Future[GroupSummary]]:
        if self.killed:
            return (), failed(ActorLost(self.id))
        if isinstance(group, ActorLost):
            return (), failed(group)
        if isinstance(group, RolloutFailure):
            return (), done(GroupSummary.of_failure(group))
        row, count = group.prompt.ref.row, len(group.completions)
        verdicts = tuple(Verdict.scored(1.0 if row in self.flat else float(k)) for k in range(count))
        if row in self.slow:
            verdicts = (Verdict("timeout", reason="no score in 60 s"),) * count
        summary = GroupSummary.of(replace(group, verdicts=verdicts))
        if row in self.held:
            call: Future[GroupSummary] = Future()
            self.waiting[row] = call, summary
            return verdicts, call
        return verdicts, done(summary)

    def release(self, row: int) -> None:
        """Say now what was held back of `row`."""
        call, summary = self.waiting.pop(row)
        call.set_result(summary)


@dataclass
class FakeLearner:
    """Keeps the groups of each update; fails in the updates that a test names."""

    engines: Sequence[FakeEngine]
    fails: Collection[int] = ()
    trained: list[RolloutGroup] = field(default_factory=list)

    def update(self, groups: Sequence[StoredGroup], summaries: Sequence[GroupSummary], version: int) -> UpdateStats:
        assert [s.ref for s in summaries] == [g.group.prompt.ref for g in groups]
        if version in self.fails:
            raise LearnerError("rank 0 failed")
        self.trained += [replace(g.group, verdicts=g.verdicts) for g in groups]
        return UpdateStats(
            loss=0.1, grad_norm=1.0, learning_rate=1e-6, groups_dropped=0, groups_flat=0, staleness_max=0
        )

    def save_checkpoint(self, directory: str | Path) -> None:
        path = Path(directory)
        path.mkdir()
        (path / "weights").write_text("w")
        seal(path)

    def load_checkpoint(self, directory: str | Path) -> None:
        assert (Path(directory) / "weights").exists()

    def form_weight_group(self, engines: Sequence[FakeEngine]) -> None:
        self.engines = engines

    def send_weights(self) -> TransferReport:
        return TransferReport({}, {engine.name: WeightReport({}) for engine in self.engines})


def make_dispatcher(engines: Sequence[Any], rewards: Sequence[Any], **changes: Any) -> Dispatcher:
    defaults: dict[str, Any] = {
        "sampling": SamplingParams(n=2),
        "run_seed": 5,
        "max_attempts": 2,
        "group_timeout": 60.0,
        "reward_timeout": 60.0,
    }
    return Dispatcher(EnginePool(engines), Pool(rewards), **{**defaults, **changes})


def make_pipeline(
    script: Script | None = None,
    flat: Collection[int] = (),
    slow: Collection[int] = (),
    *,
    staleness: int = 0,
    batches: int = 99,
    windowed: bool = False,
    data: FakeData | None = None,
    difficulty: Difficulty | None = None,
    dispatcher: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RolloutPipeline:
    """Three prompts a step through one engine, with one further attempt."""
    made = make_dispatcher([FakeEngine(script or {})], [FakeRewards(flat, slow)], **(dispatcher or {}))
    given = {"prompts_per_step": 3, **changes}
    admission = Windowed(staleness, batches, 3) if windowed else Strict(staleness, batches)
    return RolloutPipeline(PromptStream(Pool([data or FakeData()]), 60.0, difficulty), made, admission, **given)


class Driven:
    """A pipeline whose loops run as far as a test says."""

    def __init__(self, pipeline: RolloutPipeline) -> None:
        self.pipeline, self.groups = pipeline, pipeline.groups
        self._runner = asyncio.Runner()
        self.begin()

    def begin(self) -> None:
        """Let the loops begin."""
        self._loops = self.pipeline.running()
        self._runner.run(self._loops.__aenter__())

    def end(self) -> None:
        """Let the loops end, as where the learner is lost."""
        self._runner.run(self._loops.__aexit__(None, None, None))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something beside the loops, to its end."""
        return self._runner.run(work)

    def settle(self) -> None:
        """Let the loops run until each of them waits."""

        async def turns() -> None:
            for _ in range(100):
                await asyncio.sleep(0)

        self._runner.run(turns())

    def admit(self, version: int) -> int:
        """Admit at `version`; returns how many groups were sent to the first engine for it."""
        asked = self.pipeline.dispatcher.pool.members[0].actor.asked
        before = len(asked)
        self.pipeline.admit(version)
        self.settle()
        return len(asked) - before

    def batch(self, step: int, timeout: float | None = None) -> SealedBatch:
        """The batch of `step`. Raises TimeoutError where it is not there after `timeout` seconds."""
        return self._runner.run(asyncio.wait_for(self.pipeline.batch(step), timeout))

    def state(self) -> dict[str, Any]:
        return self._runner.run(self.pipeline.state())

    def close(self) -> None:
        self.end()
        self._runner.close()

"""A run: everything that `saccade/loop.py` moves, checked, saved, and brought back to its newest checkpoint.

`saccade/opening.py` starts and ends it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learner.durable import StorageError
from learner.types import LearnerError, UpdateStats
from saccade import checkpoints
from saccade.config.load import config_tree
from saccade.config.run_config import RunConfig
from saccade.config.saved_paths import absolute
from saccade.errors import MismatchError, RunError
from saccade.finished import RunResult
from saccade.fleet.actors import Actors
from saccade.fleet.deaths import explain, learner_lost
from saccade.fleet.engine_fleet import EngineFleet
from saccade.fleet.head import HeadLostError, HeadWatch
from saccade.fleet.protocols import Learner
from saccade.fleet.waiting import first_lines, in_thread
from saccade.observe.display import Display
from saccade.observe.journal import Journal
from saccade.observe.metrics import MetricsLog, StepRecord, read_metrics
from saccade.pipeline.evaluate import Evaluator, Results
from saccade.pipeline.groups import Group, GroupBuffer, State
from saccade.pipeline.health import Health
from saccade.pipeline.rollouts import RolloutPipeline
from saccade.pipeline.sealed_batch import SealedBatch

MOST_LEARNERS = 3
"""Learners that may be lost in a row without a step beyond the last loss."""
BEGINNING: Mapping[str, Any] = {
    "version": 0,
    "refused_in_row": 0,
    "cursor": None,
    "difficulty": None,
    "ledger": GroupBuffer().state(),
}
"""The state of a run before its first step, as a checkpoint would have it."""


@dataclass
class Run:
    """The state of a run. `version` counts updates, those included whose step was not taken; the engines hold the same
    version between updates."""

    config: RunConfig
    actors: Actors
    fleet: EngineFleet
    rollouts: RolloutPipeline
    evaluator: Evaluator | None
    log: MetricsLog
    display: Display
    head: HeadWatch
    desk: Any = None
    """Where the run can be asked from outside; None in tests."""
    resumes: tuple[Path, Mapping[str, Any]] | None = None
    """The checkpoint to continue from, and its state."""
    version: int = 0
    health: Health = field(init=False)
    journal: Journal = field(init=False)
    evaluations: dict[int, Results] = field(default_factory=dict)
    _saved: int = -1
    _due_since: float = field(default_factory=time.monotonic)
    """When a checkpoint was due last, on the clock of `time.monotonic`."""
    _overdue: bool = False
    """Whether the last checkpoint that was due found no room."""
    _lost_at: int = -1
    """The last version at which a learner was lost."""
    _learners_lost: int = 0
    """Learners lost since a step beyond that."""

    _phase: str = "start"
    _phase_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.journal = Journal(self.directory)
        self.rollouts.groups.on_end = self._ended
        model = self.config.model
        self.health = Health(model.dtype, model.path)

    @property
    def learner(self) -> Learner:
        return self.actors.learner

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    def _ended(self, group: Group, detail: str) -> None:
        """Note the end of a group; one that was trained went into the step that follows on this version."""
        step = self.version + 1 if group.state is State.TRAINED else None
        self.journal.add("group", state=group.state, **asdict(group.ref), step=step, detail=detail)

    def enter(self, phase: str) -> None:
        """Say what the run does from now on, to whoever asks why it is stuck."""
        self._phase, self._phase_since = phase, time.monotonic()

    @property
    def doing(self) -> tuple[str, float]:
        """The phase that goes on, and its seconds so far."""
        return self._phase, time.monotonic() - self._phase_since

    async def begin(self) -> None:
        """Continue from a checkpoint, or begin."""
        if self.resumes is not None:
            await restore(self, *self.resumes)
            return
        self.journal.add("begin", step=0)
        lora = self.config.model.lora
        if lora is not None and lora.quantize != "none":
            await self.sync_weights()  # the engines have loaded the weights that the learner has rounded

    async def update(self, batch: SealedBatch) -> UpdateStats:
        """Train on a batch. An engine that joins before the next sync gets what this led to, as the next version."""
        async with self.fleet.turn:
            update = await in_thread(lambda: self.learner.update(batch.groups, batch.summaries, self.version))
            self.fleet.version = self.version + 1
            return update

    async def sync_weights(self) -> None:
        """Send the learner's weights to every engine and commit them as the current version."""
        await self.fleet.sync(self.version)

    async def recover(self, error: Exception) -> bool:
        """Go on from the newest checkpoint with another learner, and the same engines, where `error` means that a rank
        died or hangs; returns whether it does. Where learners are lost again and again without a step, it does not.

        Raises what stands in the way, unless that is the loss of the next learner."""
        reason = await in_thread(lambda: explain(error, self.actors.questions(), self.head))
        if isinstance(reason, HeadLostError) or not (learner_lost(error) or learner_lost(reason)):
            return False
        self._learners_lost = 0 if self.version > self._lost_at else self._learners_lost
        self._learners_lost, self._lost_at = self._learners_lost + 1, max(self.version, self._lost_at)
        if self._learners_lost > MOST_LEARNERS:
            return False
        self.enter("another learner starts")
        self.say(f"the learner was lost and is replaced; {self._newest()}: {first_lines(reason, 1)}")
        try:
            async with self.fleet.turn:
                await self.actors.renew_learner(self.say)
                self.fleet.renew(self.learner)
            saved = checkpoints.newest(self.directory / "checkpoints", self.display.phase) if self._saved >= 0 else None
            await restore(self, *(saved or (None, BEGINNING)))
        except Exception as again:
            if not await self.recover(again):
                raise
        return True

    def say(self, text: str) -> None:
        """Say and note who came and went."""
        self.journal.add("fleet", text=text)
        self.display.phase(text)

    def judge(self, update: UpdateStats) -> None:
        """Raise MismatchError where engine and learner do not compute the same; called before an update is booked."""
        for line in self.health.judge(update):
            self.display.phase(f"step {self.version + 1}: {line}")

    def heed(self, update: UpdateStats) -> None:
        """Say which of its steps were not taken. Raises NotFiniteError where these are too many in a row."""
        for line in self.health.observe(update):
            self.display.phase(f"step {self.version}: {line}")

    def record(self, batch: SealedBatch, update: UpdateStats, staleness: int, seconds: Mapping[str, float]) -> None:
        """Write down the step that just ended."""
        record = StepRecord.of(
            self.version,
            batch.summaries,
            update,
            **batch.counts(),
            staleness=staleness,
            seconds=seconds,
            sync=self.fleet.times,
        )
        self.log.step(record)
        self.journal.write()
        self.display.step(record, self.config.steps)

    async def evaluate_if_due(self) -> None:
        """Evaluate at the start, at the end, and every `evaluation.every` steps."""
        every = self.config.evaluation.every
        due = self.version in (0, self.config.steps) or (every and self.version % every == 0)
        if self.evaluator is None or not due or self.version in self.evaluations:
            return
        self.enter("evaluate")
        begin = time.perf_counter()
        results = await self.evaluator.run()
        self.evaluations[self.version] = results
        self.log.evaluation(self.version, results, time.perf_counter() - begin)
        self.display.evaluation(self.version, results)

    async def checkpoint_if_due(self) -> None:
        if due := self.config.checkpoint.due(self.version, time.monotonic() - self._due_since):
            self._due_since = time.monotonic()
        if self._overdue or due:
            try:
                await self.checkpoint()
            except StorageError as error:
                if due or not self._overdue:
                    self.display.phase(
                        f"no checkpoint of step {self.version}: {error}; {self._newest()}; "
                        "the run continues and tries again after each step"
                    )
                self._overdue = True

    def _newest(self) -> str:
        return f"the newest checkpoint is from step {self._saved}" if self._saved >= 0 else "there is no checkpoint yet"

    async def checkpoint(self) -> None:
        """Save weights, optimizer, cursor and ledger as of now, unless that was done already."""
        if self._saved == self.version:
            return
        self.enter("checkpoint")
        self.log.flush()
        self.journal.write()
        state = {
            "version": self.version,
            **await self.rollouts.state(),
            "refused_in_row": self.health.refused_in_row,
            "config": config_tree(absolute(self.config)),
        }
        given = (self.directory / "checkpoints", self.version, state, self.learner.save_checkpoint)
        async with self.fleet.turn:
            path = await in_thread(lambda: checkpoints.save(*given, self.config.checkpoint.keep))
        self._saved, self._overdue = self.version, False
        self.display.phase(f"checkpoint of step {self.version} in {path}")
        with suppress(RunError):  # the data actor may be lost just now: the next checkpoint has its remark
            if remark := (await in_thread(self.actors.data_report)).train.remark:
                self.display.phase(f"data.train: {remark}")

    async def checkpoint_after(self, error: Exception) -> Exception:
        """Save the state before `error` ends the run. Returns the error to show: who died, if that is its cause.

        Nothing is saved where the learner itself failed, or trained on what it disagrees about with the engines: the
        former checkpoint stays."""
        reason = explain(error, self.actors.questions(), self.head)
        if isinstance(error, LearnerError | MismatchError) or learner_lost(reason):
            what = "the last update was discarded" if isinstance(error, MismatchError) else "the learner failed"
            self.display.phase(f"{what}; {self._newest()}")
            return reason
        if self.version == 0 and self._saved < 0:
            return reason  # nothing was trained: a checkpoint would only stand in the way of the next attempt
        try:
            await self.checkpoint()
        except Exception as second:
            self.display.phase(f"no checkpoint of step {self.version} could be written: {first_lines(second)}")
        return reason

    def save_model(self) -> None:
        """Write the trained model in Hugging Face format to `output_dir/model`."""
        self.learner.save_pretrained(self.directory / "model")
        checkpoints.check_visible(self.directory / "model")
        self.log.model(self.version)

    def result(self, *, interrupted: bool = False) -> RunResult:
        model = None if interrupted else self.directory / "model"
        return RunResult(self.directory, model, self.version, self.evaluations, interrupted)


async def restore(run: Run, path: Path | None, state: Mapping[str, Any]) -> None:
    """Continue from a checkpoint: weights to learner and engines, the data cursor, and all that was in flight. Without
    a `path` the learner keeps the weights with which it started."""
    run.version = state["version"]
    run.journal.add("begin", step=run.version)
    run.health.refused_in_row = state["refused_in_row"]
    if path is not None:
        run.display.phase(f"resuming from {path}")
        run._saved = run.version
        await in_thread(lambda: run.learner.load_checkpoint(path / "learner"))
    if cut := run.log.truncate_after(run.version):
        run.display.phase(f"metrics.jsonl: {cut} unreadable line(s) dropped; a run was killed while writing")
    run.evaluations = {e["step"]: e["results"] for e in read_metrics(run.directory, "evaluation")}
    await run.sync_weights()
    await run.rollouts.load_state(state, run.version)
    if path is not None and (changed := checkpoints.changed_knobs(state["config"], config_tree(absolute(run.config)))):
        run.display.phase("changed since the checkpoint: " + "; ".join(changed))


__all__ = ["BEGINNING", "Run", "RunResult", "restore"]

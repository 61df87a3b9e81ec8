"""A run: everything that `driver/loop.py` moves, started, checked, saved and ended.

open_run: preflight ─▶ Ray ─▶ placement ─▶ actors start side by side ─▶ weight group ─▶ (resume) ─▶ Run ─▶ teardown
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver import checkpoints
from driver.actors import Actors, start_actors
from driver.cluster import connect
from driver.config import ConfigError, RunConfig, dump_config
from driver.display import Display
from driver.errors import RunError, RunStopped
from driver.evaluate import Evaluator, Results
from driver.ledger import Ledger
from driver.metrics import MetricsLog, StepRecord, group_statistics, read_metrics
from driver.placement import place
from driver.preflight import preflight
from driver.rollouts import RolloutPipeline, SealedBatch
from driver.timing import union_seconds
from driver.wiring import config_adapter, evaluation_sampling, sampling_params
from learner.group import LearnerGroup
from learner.types import LearnerError, UpdateStats
from rollout.types import PromptRef
from weight_sync.sync import sync_weights


@dataclass(frozen=True)
class RunResult:
    """What `train` returns."""

    output_dir: Path
    model_dir: Path | None
    """The trained model in Hugging Face format; None if the run was interrupted."""
    steps: int
    """Optimizer steps done, over all resumes."""
    evaluations: Mapping[int, Results]
    """Step -> results, over all resumes."""
    interrupted: bool = False


@dataclass
class Run:
    """The state of a run. `version` counts optimizer steps; the engines hold the same version between steps."""

    config: RunConfig
    actors: Actors
    learner: LearnerGroup
    ledger: Ledger
    rollouts: RolloutPipeline
    evaluator: Evaluator | None
    log: MetricsLog
    display: Display
    version: int = 0
    evaluations: dict[int, Results] = field(default_factory=dict)
    _saved: int = -1

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    def sync_weights(self) -> None:
        """Send the learner's weights to every engine and commit them as the current version."""
        sync_weights(self.learner, self.actors.handles, self.version, timeout=self.config.weight_sync.timeout)

    def record(self, batch: SealedBatch, update: UpdateStats, staleness: int, seconds: Mapping[str, float]) -> None:
        """Write down the step that just ended."""
        record = StepRecord(
            step=self.version,
            version=self.version,
            **group_statistics(batch.summaries),
            groups_without_signal=update.groups_dropped + update.groups_flat,
            dropped=batch.dropped,
            staleness=staleness,
            loss=update.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            learner=dict(update.metrics),
            seconds=dict(seconds),
            busy=_busy(batch, update),
        )
        self.log.step(record)
        self.display.step(record, self.config.steps)

    def evaluate_if_due(self) -> None:
        """At the start, at the end, and every `evaluation.every` steps."""
        every = self.config.evaluation.every
        due = self.version in (0, self.config.steps) or (every and self.version % every == 0)
        if self.evaluator is None or not due or self.version in self.evaluations:
            return
        begin = time.perf_counter()
        results = self.evaluator.run(self.config.seed)
        self.evaluations[self.version] = results
        self.log.evaluation(self.version, results, time.perf_counter() - begin)
        self.display.evaluation(self.version, results)

    def checkpoint_if_due(self) -> None:
        every = self.config.checkpoint.every
        if every and self.version % every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save weights, optimizer, cursor and ledger as of now; nothing if that was done already."""
        if self._saved == self.version:
            return
        state = {
            "version": self.version,
            "ledger": self.ledger.state(),
            "cursor": self.actors.data_state(),
            "config": self.config.model_dump(mode="json"),
        }
        directory = self.directory / "checkpoints"
        keep = self.config.checkpoint.keep
        path = checkpoints.save(directory, self.version, state, self.learner.save_checkpoint, keep)
        self.display.phase(f"checkpoint of step {self.version} in {path}")
        self._saved = self.version

    def checkpoint_after(self, error: Exception) -> None:
        """Save the state before `error` ends the run, unless the learner itself failed: its ranks may be waiting for
        each other, and the former checkpoint is what there is."""
        if isinstance(error, LearnerError):
            saved = f"that of step {self._saved}" if self._saved >= 0 else "none yet"
            self.display.phase(f"the learner failed; the newest checkpoint: {saved}")
            return
        try:
            self.checkpoint()
        except Exception as second:
            self.display.phase(f"no checkpoint of step {self.version} could be written: {second}")

    def save_model(self) -> None:
        """Write the trained model in Hugging Face format to `output_dir/model`."""
        self.learner.save_pretrained(self.directory / "model")

    def result(self, *, interrupted: bool = False) -> RunResult:
        model = None if interrupted else self.directory / "model"
        return RunResult(self.directory, model, self.version, self.evaluations, interrupted)


@contextmanager
def open_run(config: RunConfig, *, resume: bool, address: str | None, display: Display | None) -> Iterator[Run]:
    """Start everything, yield the run, end everything. Raises ConfigError before any process starts."""
    display = display or SilentDisplay()
    preflight(config, resume=resume)
    directory = Path(config.output_dir)
    saved = checkpoints.newest(directory / "checkpoints") if resume else None
    with connect(config, address, display), stop_on_signals(display) as check_stop:
        placement = place(config)
        actors = None
        try:
            display.phase(f"starting {config.rollout.engines} engine(s), {config.learner.ranks} learner rank(s)")
            actors = start_actors(config, placement, check_stop)
            run = _assemble(config, actors, display, check_stop)
            if saved is not None:
                _restore(run, *saved)
            yield run
        finally:
            display.close()
            if actors is not None:
                actors.shutdown()
            placement.release()


def _assemble(config: RunConfig, actors: Actors, display: Display, check_stop: Any) -> Run:
    """Wire actors, ledger, pipeline and logs together, and form the weight-transfer group."""
    directory = Path(config.output_dir)
    log = MetricsLog(directory, config.cluster.metrics_port)
    (directory / "config.yaml").write_text(dump_config(config))
    ledger = Ledger()
    rollouts = RolloutPipeline(
        data=actors.data,
        engines=actors.engines,
        rewards=actors.rewards,
        ledger=ledger,
        sampling=sampling_params(config, config_adapter(config)),
        run_seed=config.seed,
        prompts_per_step=config.learner.prompts_per_step,
        max_attempts=config.rollout.max_attempts,
        group_timeout=config.rollout.group_timeout,
        reward_timeout=config.reward.timeout,
        hold_while_admitting=config.rollout.max_staleness == 0,
        check_stop=check_stop,
    )
    assert actors.learner is not None
    actors.learner.form_weight_group(actors.handles)
    evaluator = open_evaluator(config, actors) if config.data.eval else None
    return Run(config, actors, actors.learner, ledger, rollouts, evaluator, log, display)


def open_evaluator(config: RunConfig, actors: Actors) -> Evaluator:
    return Evaluator(
        prompts=actors.eval_prompts(config.evaluation.max_prompts),
        engines=actors.engines,
        rewards=actors.rewards,
        sampling=evaluation_sampling(config, config_adapter(config)),
        group_by=config.evaluation.group_by,
        timeout=config.rollout.group_timeout + config.reward.timeout,
    )


@contextmanager
def open_engines(config: RunConfig, *, address: str | None, display: Display | None) -> Iterator[Evaluator]:
    """Engines and rewards without a learner, for an evaluation of the model as it lies on disk."""
    display = display or SilentDisplay()
    if not config.data.eval:
        raise ConfigError(["data.eval names no files: there is nothing to evaluate on"])
    preflight(config, resume=True)
    with connect(config, address, display), stop_on_signals(display) as check_stop:
        placement = place(config, training=False)
        actors = None
        try:
            display.phase(f"starting {config.rollout.engines} engine(s)")
            actors = start_actors(config, placement, check_stop, training=False)
            yield open_evaluator(config, actors)
        finally:
            display.close()
            if actors is not None:
                actors.shutdown()
            placement.release()


def _restore(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Continue from a checkpoint: weights to learner and engines, the data cursor, and all that was in flight."""
    run.display.phase(f"resuming from {path}")
    run.version = run._saved = state["version"]
    run.learner.load_checkpoint(path / "learner")
    run.log.truncate_after(run.version)
    run.evaluations = {e["step"]: e["results"] for e in read_metrics(run.directory, "evaluation")}
    run.sync_weights()
    run.actors.load_data_state(state["cursor"])
    run.ledger = run.rollouts.ledger = Ledger.from_state(state["ledger"])
    run.rollouts.skip_to(run.version)
    batches: dict[int, list[PromptRef]] = {}
    for batch, ref in run.ledger.outstanding():
        batches.setdefault(batch, []).append(ref)
    for batch, refs in sorted(batches.items()):
        run.rollouts.admit(batch, run.actors.read_prompts(refs), already_issued=True)


def _busy(batch: SealedBatch, update: UpdateStats) -> dict[str, float]:
    """Seconds of work: each engine's with a group of this batch in it, the rewards' calls, the learner's phases."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for s in batch.summaries:
        spans.setdefault(s.engine, []).append((s.generate_started, s.generate_started + s.generate_seconds))
    busy = {f"generate/{engine}": union_seconds(times) for engine, times in sorted(spans.items())}
    busy["reward"] = sum(s.reward_seconds for s in batch.summaries)
    return busy | {f"learn/{name}": value for name, value in update.seconds.items()}


class SilentDisplay:
    """For use as a library: prints nothing."""

    def phase(self, text: str) -> None: ...

    def step(self, record: StepRecord, total: int) -> None: ...

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def stop_on_signals(display: Display) -> Iterator[Any]:
    """Turn the first SIGINT or SIGTERM into RunStopped at the next safe point; a second one interrupts at once.

    Yields the function that raises. Outside the main thread signals are left alone."""
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        display.phase("stopping: the state is saved first; once more to stop at once")

    def check() -> None:
        if requested.is_set():
            raise RunStopped

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


__all__ = ["Run", "RunError", "RunResult", "open_run"]

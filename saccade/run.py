"""A run: everything that `saccade/loop.py` moves, started, checked, saved and ended.

open_run: resolve ─▶ Ray ─▶ placement ─▶ actors start side by side ─▶ weight group ─▶ (resume) ─▶ Run ─▶ teardown
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.durable import StorageError, atomic_file
from learner.types import LearnerError, UpdateStats
from rollout.data.elsewhere import address_problem
from rollout.engines.protocol import SamplingParams
from saccade import checkpoints
from saccade.config.load import config_tree, dump_config, require_evaluation
from saccade.config.options import evaluation_sampling, require_trainable, sampling_params
from saccade.config.run_config import RunConfig
from saccade.config.saved_paths import absolute
from saccade.errors import MismatchError
from saccade.finished import RunResult
from saccade.fleet.actors import Actors
from saccade.fleet.deaths import DeathError, explain
from saccade.fleet.head import HeadWatch
from saccade.fleet.protocols import Learner
from saccade.fleet.run_folder import held
from saccade.fleet.started import Started, on_ray
from saccade.fleet.waiting import first_lines, in_thread
from saccade.observe.display import Display, SilentDisplay
from saccade.observe.metrics import MetricsLog, StepRecord, read_metrics
from saccade.pipeline.admission import make_admission
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.evaluate import Evaluator, Results
from saccade.pipeline.health import Health
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline, SealedBatch
from saccade.preflight import Resolved, resolve
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightSyncError


@dataclass
class Run:
    """The state of a run. `version` counts updates, those included whose step was not taken; the engines hold the same
    version between updates."""

    config: RunConfig
    actors: Actors
    rollouts: RolloutPipeline
    evaluator: Evaluator | None
    log: MetricsLog
    display: Display
    head: HeadWatch
    version: int = 0
    health: Health = field(init=False)
    evaluations: dict[int, Results] = field(default_factory=dict)
    _saved: int = -1
    _due_since: float = field(default_factory=time.monotonic)
    """When a checkpoint was due last, on the clock of `time.monotonic`."""
    _overdue: bool = False
    """Whether the last checkpoint that was due found no room."""

    def __post_init__(self) -> None:
        model = self.config.model
        self.health = Health(model.dtype, model.path)

    @property
    def learner(self) -> Learner:
        return self.actors.learner

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    def sync_weights(self) -> None:
        """Send the learner's weights to every engine and commit them as the current version."""
        sync_weights(self.learner, self.actors.pool.members, self.version, timeout=self.config.cluster.sync_timeout)

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
        )
        self.log.step(record)
        self.display.step(record, self.config.steps)

    async def evaluate_if_due(self) -> None:
        """Evaluate at the start, at the end, and every `evaluation.every` steps."""
        every = self.config.evaluation.every
        due = self.version in (0, self.config.steps) or (every and self.version % every == 0)
        if self.evaluator is None or not due or self.version in self.evaluations:
            return
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
        self.log.flush()
        state = {
            "version": self.version,
            **await self.rollouts.state(),
            "refused_in_row": self.health.refused_in_row,
            "config": config_tree(absolute(self.config)),
        }
        given = (self.directory / "checkpoints", self.version, state, self.learner.save_checkpoint)
        path = await in_thread(lambda: checkpoints.save(*given, self.config.checkpoint.keep))
        self._saved, self._overdue = self.version, False
        self.display.phase(f"checkpoint of step {self.version} in {path}")
        if remark := (await in_thread(self.actors.data_report)).train.remark:
            self.display.phase(f"data.train: {remark}")

    async def checkpoint_after(self, error: Exception) -> Exception:
        """Save the state before `error` ends the run. Returns the error to show: who died, if that is its cause.

        Nothing is saved where the learner itself failed, or trained on what it disagrees about with the engines; nor
        after a failed transfer for which several ranks gather, since they may be waiting for each other. The former
        checkpoint stays in these cases."""
        config = self.config.learner
        reason = explain(error, self.actors.questions(), self.head)
        dead = isinstance(reason, DeathError) and any(who.startswith("learner") for who in reason.dead)
        cut_off = isinstance(error, WeightSyncError) and config.ranks > 1 and config.zero_stage == 3
        if isinstance(error, LearnerError | MismatchError) or cut_off or dead:
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


@contextmanager
def open_run(config: RunConfig, *, resume: bool, address: str | None, display: Display | None) -> Iterator[Run]:
    """Start everything, yield the run, end everything. Raises ConfigError before any process starts."""
    directory, display = Path(config.output_dir), display or SilentDisplay()
    with ExitStack() as stack:
        # `resolve` reports a folder that cannot be made, together with all else that is wrong.
        files = [path for path in (directory, *directory.parents) if os.path.exists(path) and not os.path.isdir(path)]
        blocked = files or address_problem(config.output_dir)
        if not blocked and (remark := stack.enter_context(held(directory))):
            display.phase(remark)
        yield from _open_run(config, resume, address, display)


def _open_run(config: RunConfig, resume: bool, address: str | None, display: Display) -> Iterator[Run]:
    resolved = resolve(config, resume=resume)
    for line in resolved.lines:
        display.phase(line)
    directory = Path(config.output_dir).absolute()  # the actors have working directories of their own
    config = config.model_copy(update={"output_dir": str(directory)})
    saved = checkpoints.newest(directory / "checkpoints", display.phase) if resume else None
    with on_ray(config, address, display, training=True) as started:
        require_trainable(config, resolved.adapter, started.placement.device)
        display.phase(f"starting {config.rollout.engines} engine(s), {config.learner.ranks} learner rank(s)")
        started.start_actors(config, resolved.adapter, resolved.media_kinds, training=True)
        if saved is None:
            (directory / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first step
        run = _assemble(config, resolved, started, display)
        with closing(run.log):
            if saved is not None:
                restore(run, *saved)
            elif config.model.lora is not None and config.model.lora.quantize != "none":
                run.sync_weights()  # the engines have loaded the weights that the learner has rounded
            yield run


def _assemble(config: RunConfig, resolved: Resolved, started: Started, display: Display) -> Run:
    """Put actors, pipeline and logs together, and form the weight-transfer group."""
    actors = started.actors
    directory = Path(config.output_dir)
    log = MetricsLog(directory, config.cluster.metrics_port, display.phase, config.steps)
    atomic_file(directory / "config.yaml", dump_config(absolute(config)))
    rollouts = RolloutPipeline(
        prompts=PromptStream(
            actors.data,
            config.cluster.group_timeout,
            None if config.algorithm.reward_range is None else Difficulty(*config.algorithm.reward_range),
        ),
        dispatcher=_dispatcher(config, started, sampling_params(config, resolved.adapter)),
        admission=make_admission(config.rollout, config.steps, config.learner.prompts_per_step),
        prompts_per_step=config.learner.prompts_per_step,
        refill=round(config.algorithm.refill * config.learner.prompts_per_step),
        max_failed_share=config.reward.max_failed_share,
    )
    actors.learner.form_weight_group(actors.pool.members)
    evaluator = open_evaluator(config, resolved, started, display) if config.data.eval else None
    return Run(config, actors, rollouts, evaluator, log, display, started.head)


def _dispatcher(config: RunConfig, started: Started, sampling: SamplingParams, *, keep: bool = True) -> Dispatcher:
    return Dispatcher(
        pool=started.actors.pool,
        rewards=started.actors.rewards,
        sampling=sampling,
        run_seed=config.seed,
        group_timeout=config.cluster.group_timeout,
        reward_timeout=config.reward.timeout,
        check_stop=started.check,
        keep=keep,
    )


def open_evaluator(config: RunConfig, resolved: Resolved, started: Started, display: Display) -> Evaluator:
    actors = started.actors
    group_by = config.data.columns.get("group")
    prompts = actors.held_out(config.evaluation.max_prompts, group_by, config.cluster.start_timeout)
    held_out = actors.data_report().evaluation
    if held_out is not None and held_out.remark:
        display.phase(f"data.eval: {held_out.remark}")
    dispatcher = _dispatcher(config, started, evaluation_sampling(config, resolved.adapter), keep=False)
    return Evaluator(prompts, dispatcher, display.phase)


@contextmanager
def open_engines(config: RunConfig, *, address: str | None, display: Display | None) -> Iterator[Evaluator]:
    """Engines and rewards without a learner, for an evaluation of the model as it lies on disk."""
    display = display or SilentDisplay()
    require_evaluation(config)
    resolved = resolve(config, resume=True)
    for line in resolved.lines:
        display.phase(line)
    with on_ray(config, address, display, training=False) as started:
        display.phase(f"starting {config.rollout.engines} engine(s)")
        started.start_actors(config, resolved.adapter, resolved.media_kinds, training=False)
        yield open_evaluator(config, resolved, started, display)


def restore(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Continue from a checkpoint: weights to learner and engines, the data cursor, and all that was in flight."""
    run.display.phase(f"resuming from {path}")
    run.version = run._saved = state["version"]
    run.health.refused_in_row = state["refused_in_row"]
    run.learner.load_checkpoint(path / "learner")
    if cut := run.log.truncate_after(run.version):
        run.display.phase(f"metrics.jsonl: {cut} unreadable line(s) dropped; a run was killed while writing")
    run.evaluations = {e["step"]: e["results"] for e in read_metrics(run.directory, "evaluation")}
    run.sync_weights()
    run.rollouts.load_state(state, run.version, run.config.cluster.start_timeout)
    if changed := checkpoints.changed_knobs(state["config"], config_tree(absolute(run.config))):
        run.display.phase("changed since the checkpoint: " + "; ".join(changed))


__all__ = ["Run", "RunResult", "open_run"]

"""Opens a run, and ends it whatever happens.

open_run: resolve ─▶ Ray ─▶ placement ─▶ actors start side by side ─▶ Run ─▶ (resume) ─▶ the loop ─▶ teardown
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from learner.durable import atomic_file
from rollout.data.elsewhere import address_problem
from rollout.engines.protocol import SamplingParams
from saccade import checkpoints
from saccade.config.load import dump_config, require_evaluation
from saccade.config.options import evaluation_sampling, require_trainable, sampling_params
from saccade.config.run_config import RunConfig
from saccade.config.saved_paths import absolute
from saccade.fleet.desk import close_desk, open_desk
from saccade.fleet.engine_fleet import EngineFleet
from saccade.fleet.run_folder import held
from saccade.fleet.started import Started, on_ray
from saccade.observe.display import Display, SilentDisplay
from saccade.observe.journal import JOURNAL
from saccade.observe.metrics import MetricsLog
from saccade.pipeline.admission import make_admission
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.evaluate import Evaluator, Results
from saccade.pipeline.held_out import HeldOut
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline
from saccade.preflight import Resolved, resolve
from saccade.run import Run


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
    saved = _newest(directory, display) if resume else None
    with on_ray(config, address, display, training=True) as started:
        require_trainable(config, resolved.adapter, started.placement.device)
        display.phase(f"starting {config.rollout.engines} engine(s), {config.learner.ranks} learner rank(s)")
        started.start_actors(config, resolved.adapter, resolved.media_kinds, training=True)
        if saved is None:
            (directory / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first step
        run = _assemble(config, resolved, started, display, saved)
        with closing(run.log), ExitStack() as stack:
            stack.callback(close_desk, run.desk)
            yield run


def _newest(directory: Path, display: Display) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state; None where a run began in this folder and ended before its first one."""
    if (directory / JOURNAL).exists() and not checkpoints.found(directory / "checkpoints"):
        display.phase(f"{directory}: the run ended before its first checkpoint; it starts from its beginning")
        return None
    return checkpoints.newest(directory / "checkpoints", display.phase)


def _assemble(
    config: RunConfig,
    resolved: Resolved,
    started: Started,
    display: Display,
    saved: tuple[Path, dict[str, Any]] | None,
) -> Run:
    """Put actors, pipeline and logs together."""
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
    evaluator = open_evaluator(config, resolved, started, display) if config.data.eval else None
    fleet = EngineFleet(actors.engines, actors.learner, config.cluster.sync_timeout)
    rollouts.dispatcher.read = rollouts.prompts.read
    run = Run(config, actors, fleet, rollouts, evaluator, log, display, started.head, open_desk(directory), saved)
    actors.keep(fleet, run.say, rollouts.prompts.renew)
    return run


def _dispatcher(config: RunConfig, started: Started, sampling: SamplingParams, *, keep: bool = True) -> Dispatcher:
    return Dispatcher(
        pool=started.actors.engines,
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
    stream = PromptStream(actors.data, config.cluster.start_timeout)
    held = HeldOut(stream, config.evaluation.max_prompts, group_by, prompts)
    return Evaluator(prompts, dispatcher, display.phase, held)


@contextmanager
def open_engines(
    config: RunConfig, *, address: str | None, display: Display | None
) -> Iterator[Callable[[], Coroutine[Any, Any, Results]]]:
    """Engines and rewards without a learner. Yields what evaluates the model as it lies on disk."""
    display = display or SilentDisplay()
    require_evaluation(config)
    resolved = resolve(config, resume=True)
    for line in resolved.lines:
        display.phase(line)
    with on_ray(config, address, display, training=False) as started:
        display.phase(f"starting {config.rollout.engines} engine(s)")
        started.start_actors(config, resolved.adapter, resolved.media_kinds, training=False)
        evaluator, actors = open_evaluator(config, resolved, started, display), started.actors

        actors.keep(EngineFleet(actors.engines, None, config.cluster.sync_timeout), display.phase)

        async def measure() -> Results:
            async with actors.kept():
                return await evaluator.run()

        yield measure

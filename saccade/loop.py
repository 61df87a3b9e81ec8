"""The algorithm. Read this file first.

    engines:   generate b0 ─┬─ generate b1 ──┬─ generate b2 ──┬─ ...      (Ray actors, all the time)
    rewards:        score b0└──── score b1   └──── score b2   └──── ...   (chained behind each group)
    learner:                 ── train b0 ──    ── train b1 ──             (one call per step)
    driver:    admit ▸ batch ▸ update ▸ sync ▸ record, and again

Who waits for whom: four things go on beside each other. Three are in `saccade/pipeline/rollouts.py`: places are given
to prompts as soon as the engines' weights are new enough, each group is followed through engine and rewards, and the
batch of a step is sealed. The fourth is `step`: it waits for its batch; then for the learner, while the engines
continue with the groups already admitted (`max_staleness` batches of them); `sync_weights` pauses the engines for the
length of a transfer. With max_staleness 0 nothing is admitted before the engines hold the newest weights, so
generation and training alternate, strictly on-policy.

Who dies: engines, rewards and the data actor are replaced beside all this (`saccade/fleet/keeper.py`), and their groups
sent to others. A learner that is lost takes the run back to its newest checkpoint (`Run.recover`).
"""

from __future__ import annotations

from learner.durable import StorageError
from learner.types import ContentsLostError
from saccade.config.run_config import RunConfig
from saccade.errors import RunStopped
from saccade.finished import finished
from saccade.fleet.waiting import to_end
from saccade.observe.display import Display, SilentDisplay
from saccade.observe.timing import Stopwatch
from saccade.opening import open_engines, open_run
from saccade.pipeline.admission import checked_lag
from saccade.pipeline.evaluate import Results
from saccade.run import Run, RunResult
from saccade.watchdog import watched


def train(
    config: RunConfig, *, resume: bool = False, address: str | None = None, display: Display | None = None
) -> RunResult:
    """Train by `config`; returns where the model is and what was measured.

    `resume` continues from the newest checkpoint in `config.output_dir`; `address` joins a running Ray cluster. Raises
    ConfigError before anything starts, and RunError when the run cannot continue; it saves a checkpoint before that.
    """
    if resume and (done := finished(config)):
        display = display or SilentDisplay()
        display.phase(
            f"{done.output_dir}: all {config.steps} steps are done and the model is saved; to train longer, raise steps"
        )
        return done
    with open_run(config, resume=resume, address=address, display=display) as run:
        return to_end(_train(run, config))


async def _train(run: Run, config: RunConfig) -> RunResult:
    async with watched(run), run.actors.kept():
        await run.begin()
        interrupted = await _to_the_end(run, config)
    if interrupted:
        return run.result(interrupted=True)
    try:
        await run.checkpoint()
    except StorageError:
        run.save_model()  # a part of the checkpoint's size: it may find room
        raise
    run.save_model()
    return run.result()


async def _to_the_end(run: Run, config: RunConfig) -> bool:
    """Do all steps. Returns whether the user stopped it before."""
    while True:
        try:
            async with run.rollouts.running():
                await run.evaluate_if_due()
                while run.version < config.steps:
                    await step(run, config)
            return False
        except RunStopped:
            await run.checkpoint()
            return True
        except Exception as error:
            if not await run.recover(error):
                reason = await run.checkpoint_after(error)
                if reason is error:
                    raise
                raise reason from error


async def step(run: Run, config: RunConfig) -> None:
    """Do one update, from prompts admitted to weights that the engines sample with. Where its optimizer step was not
    taken, the next version has the same weights, and the ledger has its prompts with the reason. Where a node took
    groups of its batch with it, these are issued again, and the step is still to be done."""
    watch = Stopwatch(run.enter)
    run.rollouts.admit(run.version)

    with watch.phase("rollout"):
        batch = await run.rollouts.batch(run.version)
    staleness = checked_lag(batch.summaries, run.version, config.rollout.max_staleness)

    with watch.phase("learn"):
        try:
            update = await run.update(batch)
        except ContentsLostError as error:
            await run.rollouts.give_back(batch, error.refs)
            return
    run.judge(update)
    run.rollouts.book(batch, update.refused)
    run.version += 1
    run.rollouts.check()

    with watch.phase("sync"):
        await run.sync_weights()

    run.record(batch, update, staleness, watch.seconds())
    run.heed(update)
    await run.evaluate_if_due()
    await run.checkpoint_if_due()


def evaluate(config: RunConfig, *, address: str | None = None, display: Display | None = None) -> Results:
    """Evaluate `config.model.path` on `config.data.eval`, with engines and rewards but no learner."""
    with open_engines(config, address=address, display=display) as measure:
        return to_end(measure())


__all__ = ["RunConfig", "evaluate", "step", "train"]

"""Run checkpoints: complete or absent, the newest first, old ones removed."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from learner.durable import StorageError, clear_leftovers, seal
from learner.types import NotFiniteError, RefusedStep, UpdateStats
from rollout.data.actor import DataActorReport
from rollout.data.source import DataReport, Refusal
from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade import checkpoints
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.sections import CheckpointConfig
from saccade.demo.demo import prepare_folder
from saccade.errors import MismatchError, RunError
from saccade.finished import finished
from saccade.fleet import run_folder
from saccade.fleet.engine_fleet import EngineFleet
from saccade.fleet.pool import EnginePool
from saccade.loop import step as one_step
from saccade.loop import train
from saccade.pipeline.groups import DropReason
from saccade.pipeline.sealed_batch import SealedBatch
from saccade.run import Run, RunResult
from tests.helpers.fake_fleet import make_pipeline


def write_learner(path):
    path.mkdir()
    (path / "weights").write_text("w")
    seal(path)


def test_the_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoints.save(tmp_path, step, {"version": step}, write_learner, keep=2)
    assert checkpoints.found(tmp_path) == [2, 10]
    path, state = checkpoints.newest(tmp_path, print)
    assert path.name == "step-000010"
    assert state["version"] == 10
    assert (path / "learner" / "weights").read_text() == "w"


def test_a_failure_while_writing_leaves_the_former_one(tmp_path):
    checkpoints.save(tmp_path, 1, {"version": 1}, write_learner, keep=2)

    def broken(path):
        write_learner(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 2, {"version": 2}, broken, keep=2)
    assert checkpoints.found(tmp_path) == [1]
    checkpoints.save(tmp_path, 2, {"version": 2}, write_learner, keep=2)  # the leftovers are in nobody's way
    assert checkpoints.found(tmp_path) == [1, 2]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints.save(tmp_path, 1, {"version": 1, "note": "old"}, write_learner, keep=1)
    checkpoints.save(tmp_path, 1, {"version": 1, "note": "new"}, write_learner, keep=1)
    assert checkpoints.newest(tmp_path, print)[1]["note"] == "new"


def test_a_learner_on_a_node_with_other_storage_is_told(tmp_path):
    with pytest.raises(RunError, match="storage that all nodes share"):
        checkpoints.save(tmp_path, 1, {}, lambda path: None, keep=1)
    assert checkpoints.found(tmp_path) == []


def test_nothing_to_resume_and_foreign_formats_are_said(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        checkpoints.newest(tmp_path / "absent", print)
    path = checkpoints.save(tmp_path, 1, {}, write_learner, keep=1)
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        checkpoints.newest(tmp_path, print)


def test_a_checkpoint_says_which_rows_were_not_used_as_they_are(tmp_path):
    refusal = Refusal("a.json", 7, "missing image", "image 0: no file x")
    report = DataReport(100, 40, {"missing image": 2}, (refusal, refusal), truncated=3)
    said: list[str] = []
    run = Run(
        config=parse_config(
            {"output_dir": str(tmp_path), "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
        ),
        actors=SimpleNamespace(
            data_report=lambda: DataActorReport(report, None, 0, 0),
            learner=SimpleNamespace(save_checkpoint=write_learner),
        ),
        fleet=EngineFleet(EnginePool(), None, 60.0),
        rollouts=make_pipeline(),
        evaluator=None,
        log=SimpleNamespace(flush=lambda: None),
        display=SimpleNamespace(phase=said.append),
        head=None,
    )
    asyncio.run(run.checkpoint())
    assert said[1:] == [
        "data.train: 2 of 40 rows refused: 2 missing image; 3 truncated; the first: a.json row 7: image 0: no file x"
    ]
    report, run.version = DataReport(100, 80), 1
    asyncio.run(run.checkpoint())
    assert len(said) == 3


@pytest.mark.parametrize("name", ["run.json", "learner/weights", "learner/digests.json", "digests.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, name):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"version": step}, write_learner, keep=3)
    (tmp_path / "step-000002" / name).write_bytes(b"{")
    said: list[str] = []
    path, state = checkpoints.newest(tmp_path, said.append)
    assert (path.name, state["version"]) == ("step-000001", 1)
    assert "step-000002" in said[0] and "damaged" in said[0] and name in said[0]
    checkpoints.save(tmp_path, 2, {"version": 2}, write_learner, keep=1)
    assert checkpoints.newest(tmp_path, print)[1]["version"] == 2
    (tmp_path / "step-000002" / name).unlink()
    with pytest.raises(RunError, match=r"no checkpoint in .* is usable.*damaged"):
        checkpoints.newest(tmp_path, print)


def test_a_folder_is_held_by_one_run_and_freed_with_its_process(tmp_path):
    folder = tmp_path / "run"
    with run_folder.held(folder):
        for refused in (lambda: run_folder.held(folder).__enter__(), lambda: prepare_folder(tmp_path)):
            with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} on .*, since 20"):
                refused()
    assert not folder.exists()  # nothing was written into it
    code = "import os, sys, signal; from pathlib import Path; from saccade.fleet.run_folder import held\n"
    code += "with held(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    assert (folder / "run.lock").exists() and run_folder.in_use(folder) is None
    with run_folder.held(folder):
        pass


@pytest.mark.parametrize("then", ["removed", "made anew", "not writable"])
def test_what_became_of_the_folder_hides_no_error_of_the_run(tmp_path, monkeypatch, then):
    folder = tmp_path / "run"

    def refuse(path, **given):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def run():
        if then == "not writable":  # as after a change of its owner
            for method in ("unlink", "iterdir", "rmdir"):
                monkeypatch.setattr(type(folder), method, refuse)
        else:
            shutil.rmtree(folder)
        if then == "made anew":  # by another run, which holds it
            folder.mkdir()
            (folder / "run.lock").touch()
        raise RunError("its own")

    with pytest.raises(RunError, match="its own"), run_folder.held(folder):
        run()
    monkeypatch.undo()
    assert folder.exists() == (then != "removed")
    assert (folder / "run.lock").exists() == (then != "removed")


def test_a_checkpoint_that_finds_no_room_is_tried_again_after_the_next_step(tmp_path):
    said: list[str] = []
    full = [True]

    def save_learner(path):
        if full[0]:
            raise StorageError("x cannot be written: No space left on device")
        write_learner(path)

    run = Run(
        config=parse_config(
            {
                "output_dir": str(tmp_path),
                "steps": 9,
                "model": {"path": "m"},
                "data": {"train": ["a.json"]},
                "checkpoint": {"every": 3},
            }
        ),
        actors=SimpleNamespace(
            data_report=lambda: DataActorReport(DataReport(100, 1), None, 0, 0),
            learner=SimpleNamespace(save_checkpoint=save_learner),
        ),
        fleet=EngineFleet(EnginePool(), None, 60.0),
        rollouts=make_pipeline(),
        evaluator=None,
        log=SimpleNamespace(flush=lambda: None),
        display=SimpleNamespace(phase=said.append),
        head=None,
    )
    for run.version in (1, 2, 3, 4, 5, 6, 7):  # said whenever one is due, not after each attempt
        asyncio.run(run.checkpoint_if_due())
    assert [text.split(":")[0] for text in said] == ["no checkpoint of step 3", "no checkpoint of step 6"]
    assert "No space left" in said[0]
    full[0] = False
    for run.version in (8, 10):
        asyncio.run(run.checkpoint_if_due())
    assert checkpoints.found(tmp_path / "checkpoints") == [8]


def test_a_checkpoint_is_due_by_steps_or_by_time(tmp_path):
    def every(given: object) -> CheckpointConfig:
        tree = {"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
        return parse_config({**tree, "checkpoint": {"every": given}}).checkpoint

    assert [every(3).due(version, 1e9) for version in (1, 3, 4, 6)] == [False, True, False, True]
    assert not every(0).due(0, 1e9)
    for given, seconds in (("90 s", 90), ("15 min", 900), (" 0.5h ", 1800)):
        assert [every(given).due(1, seconds + more) for more in (-1, 0)] == [False, True]
    assert CheckpointConfig().due(1, 900) and not CheckpointConfig().due(50, 899)
    assert every("15").every == 15
    for wrong in (-1, "0 min", True, "5 days", "often"):
        with pytest.raises(ConfigError, match=r"checkpoint.every.*such as 15 min"):
            every(wrong)


def test_of_runs_that_start_together_one_gets_the_folder(tmp_path):
    together = threading.Barrier(8)
    inside = threading.Barrier(8)  # nobody leaves before all have tried

    def start(_: int) -> str:
        together.wait(60)
        try:
            with run_folder.held(tmp_path):
                inside.wait(60)
                return "held"
        except ConfigError as error:
            inside.wait(60)
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(start, range(8)))
    assert answers.count("held") == 1
    assert all("is in use by another run" in answer for answer in answers if answer != "held")


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_and_a_resume_are_refused_while_another_run_goes_on(tmp_path, resume):
    """And leave what is there as it is; the leftovers of a write under way look like those of a killed one."""
    config = parse_config(
        {"output_dir": str(tmp_path / "run"), "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
    )
    with run_folder.held(tmp_path / "run"):
        under_way = tmp_path / "run/checkpoints/.step-000002.partial-01234567"
        under_way.mkdir(parents=True)
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} on "):
            train(config, resume=resume)
        assert under_way.exists()
    with run_folder.held(tmp_path / "run"):
        assert not under_way.exists()


def test_a_lock_left_by_another_machine_that_nobody_holds_is_none(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "elsewhere", "pid": 1, "started": "2020-01-01T00:00:00+00:00"}')
    with run_folder.held(tmp_path) as remark:
        assert remark is None
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.held(tmp_path) as remark:
        assert remark is not None and "does not support file locks" in remark
        assert run_folder.in_use(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_said_before_anything_starts():
    """The kernel's own folder is read-only for everybody, for root too."""
    config = {"output_dir": "/sys/kernel/saccade", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
    with pytest.raises(StorageError, match=r"/sys/kernel/saccade cannot be written: .*make the folder writable"):
        train(parse_config(config))


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_nobody_may_look_is_said_too(tmp_path, monkeypatch, resume):
    """As below another user's home; root may look everywhere."""
    closed, real = tmp_path / "home", {name: getattr(os, name) for name in ("stat", "mkdir", "open")}

    def refusing(name):
        def call(path, *args, **options):
            if str(path).startswith(f"{closed}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[name](path, *args, **options)

        return call

    closed.mkdir()
    for name in real:
        monkeypatch.setattr(os, name, refusing(name))
    config = {"output_dir": f"{closed}/runs/x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
    with pytest.raises(StorageError, match=r"home/runs/x cannot be written: Permission denied .*another output_dir"):
        train(parse_config(config), resume=resume)


def run_of(directory, summaries, stats):
    """A run whose every batch has these summaries, and whose every update these figures; and what it says."""

    async def batch_of(version):
        groups = run.rollouts.groups.issue(version, [StoredPrompt(s.ref, None) for s in summaries])
        for group in groups:
            run.rollouts.groups.score(group)
        run.rollouts.groups.seal(version, groups)
        batch = [replace(s, oldest_version=version) for s in summaries]
        return SealedBatch((), tuple(batch), 0)

    rollouts = make_pipeline()
    rollouts.batch = batch_of
    said: list[str] = []
    run = Run(
        config=parse_config(
            {
                "output_dir": str(directory),
                "steps": 9,
                "model": {"path": "m"},
                "data": {"train": ["a.json"]},
                "learner": {"prompts_per_step": 2},
            }
        ),
        actors=SimpleNamespace(
            data_report=lambda: DataActorReport(DataReport(100, 1), None, 0, 0),
            learner=SimpleNamespace(save_checkpoint=write_learner, update=lambda *given: stats),
        ),
        fleet=EngineFleet(rollouts.dispatcher.pool, None, 60.0),
        rollouts=rollouts,
        evaluator=None,
        log=SimpleNamespace(flush=lambda: None),
        display=SimpleNamespace(phase=said.append, step=lambda record, total: None),
        head=None,
    )
    return run, said


def update_stats(**changes: object) -> UpdateStats:
    known = {"loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-6, "groups_dropped": 0, "groups_flat": 0}
    return UpdateStats(**{**known, "staleness_max": 0, "seconds": {"total": 1.0}, **changes})  # type: ignore[arg-type]


def test_prompts_of_a_step_that_was_not_taken_are_dropped_and_the_third_such_step_ends_the_run(tmp_path):
    synced, recorded = [], []
    summaries = [
        GroupSummary(PromptRef(f"d:{i}"), (1.0, 0.0), valid, {}, (1, 1), ("stop", "stop"), 2, 0, invalid_reasons=why)
        for i, (valid, why) in enumerate([((True, True), ()), ((True, True), ()), ((True, False), ("timeout: 9 s",))])
    ]
    refused = RefusedStep(0, ("kl",), (), float("nan"), float("nan"), 0.0, (summaries[1].ref,))
    stats = update_stats(groups_dropped=1, refused=(refused,))
    run, said = run_of(tmp_path, summaries, stats)
    run.log.step = recorded.append

    async def sync() -> None:
        synced.append(run.version)

    run.sync_weights = sync
    asyncio.run(one_step(run, run.config))
    assert (run.version, synced, run.rollouts.groups.trained, run.rollouts.groups.outstanding()) == (1, [1], 1, [])
    assert run.rollouts.groups.dropped == {
        (DropReason.NOT_TAKEN, "kl not finite"): 1,
        (DropReason.UNSCORED, "timeout: 9 s"): 1,
    }
    assert recorded[0].steps_not_taken == 1 and "step 1: the gradient is not finite" in said[0]
    asyncio.run(one_step(run, run.config))
    with pytest.raises(NotFiniteError, match="3 optimizer steps in a row"):
        asyncio.run(one_step(run, run.config))
    asyncio.run(run.checkpoint())
    state = checkpoints.newest(tmp_path / "checkpoints", print)[1]
    assert (state["version"], state["refused_in_row"]) == (3, 0)
    assert [DropReason.NOT_TAKEN, "kl not finite", 3] in state["ledger"]["dropped"]


def test_nothing_is_booked_of_an_update_in_which_engine_and_learner_disagree(tmp_path):
    """Its prompts are issued again by a resume, from the checkpoint before it."""
    summaries = [
        GroupSummary(PromptRef(f"d:{i}"), (1.0, 0.0), (True, True), {}, (1, 1), ("stop", "stop"), 2, 0) for i in (0, 1)
    ]
    stats = update_stats(metrics={"mismatch_mean": 2.0})
    run, said = run_of(tmp_path, summaries, stats)
    with pytest.raises(MismatchError, match=r"differ by 2 on average"):
        asyncio.run(one_step(run, run.config))
    assert (run.version, run.rollouts.groups.trained, len(run.rollouts.groups.outstanding())) == (0, 0, 2)
    error = MismatchError("they differ")
    run.actors.questions, run.head = dict, SimpleNamespace(gone=lambda: False)
    assert asyncio.run(run.checkpoint_after(error)) is error and checkpoints.found(tmp_path / "checkpoints") == []
    assert said == ["the last update was discarded; there is no checkpoint yet"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run_and_is_never_half_there(tmp_path, monkeypatch):
    real = shutil.rmtree

    def busy(path, **options):
        if "000001" not in path.name:
            return real(path, **options)
        (path / "run.json").unlink()
        raise OSError(errno.EBUSY, "Device or resource busy")

    checkpoints.save(tmp_path, 1, {"version": 1}, write_learner, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        checkpoints.save(tmp_path, 2, {"version": 2}, write_learner, keep=1)
    assert checkpoints.found(tmp_path) == [2] and len(list(tmp_path.iterdir())) == 2
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_run_with_nothing_left_to_do_is_told_from_one_that_was_not_evaluated_or_not_saved(tmp_path):
    """Without starting anything: no model, data or Ray of this configuration exists."""
    given = {"output_dir": str(tmp_path), "steps": 2, "model": {"path": "m"}, "data": {"train": ["a"], "eval": ["b"]}}
    config, lines = parse_config(given), []

    def add(line):
        lines.append(json.dumps(line) + "\n")
        (tmp_path / "metrics.jsonl").write_text("".join(lines))

    for step in (1, 2):
        checkpoints.save(tmp_path / "checkpoints", step, {}, write_learner, keep=2)
        assert finished(config) is None
    (tmp_path / "model").mkdir()  # of an earlier end
    add({"kind": "model", "step": 1})
    add({"kind": "evaluation", "step": 2, "results": {"all": {"score": 1.0}}})
    assert finished(config) is None
    add({"kind": "model", "step": 2})
    said: list[str] = []
    result = train(config, resume=True, display=SimpleNamespace(phase=said.append))
    assert result == RunResult(tmp_path, tmp_path / "model", 2, {2: {"all": {"score": 1.0}}})
    assert said == [f"{tmp_path}: all 2 steps are done and the model is saved; to train longer, raise steps"]
    assert finished(parse_config(given | {"steps": 3})) is None
    assert finished(parse_config(given | {"steps": 1})) == result
    lines.pop(1)
    add({"kind": "step", "step": 2})
    assert finished(config) is None  # never evaluated
    with run_folder.held(tmp_path):
        assert finished(parse_config(given | {"steps": 1})) is None  # and the run says who holds it

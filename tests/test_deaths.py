"""Of the errors that one death brings about, the one that is shown: who died, where, and what to do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from learner.deaths import how_it_died
from learner.group import LearnerGroup
from learner.types import LearnerError
from rollout.engines.protocol import EngineDeadError
from saccade.errors import MismatchError, RunError, RunStopped
from saccade.fleet.actors import Actors
from saccade.fleet.deaths import DeathError, explain, find_dead, first_lines
from saccade.fleet.head import HeadLostError
from saccade.run import Run
from tests.learner_cases import options
from weight_sync.verify import WeightSyncError

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tactor_id: 5a1a29\n\tpid: 18534\n"
    "\tnamespace: ae1c47dd\n\tip: 10.0.0.7\nThe actor is dead because its worker process has died. Worker exit type: "
    "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) ..."
)
NODE = KILLED.partition("The actor is dead")[0] + (
    "The actor died because its node has died. Node Id: ad03ad. \nthe actor's node was terminated unexpectedly: health "
    "check failed due to missing too many heartbeats"
)
PRESSURE = KILLED.replace(
    "Worker unexpectedly exits with a connection error code 2. End of file.",
    "Killed by Ray: the node is low on memory.",
)
GLOO = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:1234"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KILLED, "it was killed or crashed; where memory ran out, dmesg of that machine says so"),
        (PRESSURE, "Killed by Ray: the node is low on memory."),
        (
            NODE,
            "The actor died because its node has died. Node Id: ad03ad. the actor's node was terminated unexpectedly: "
            "health check failed due to missing too many heartbeats",
        ),
        (KILLED.partition("The actor is dead")[0], "Ray does not say how"),
    ],
)
def test_of_rays_account_stay_the_process_its_machine_and_the_reason(text: str, expected: str):
    assert how_it_died(text) == f" (process 18534 at 10.0.0.7, Ray's actor 5a1a29): {expected}"


def test_an_account_without_a_process_is_passed_on():
    assert how_it_died("The actor died because of an error raised in its creation task.\n") == (
        ": The actor died because of an error raised in its creation task."
    )


def test_the_first_lines_of_a_remote_error_are_its_own_words():
    assert first_lines(RuntimeError("\n a\n\nb \nc\nd")) == "a / b / c"
    assert first_lines(KeyError()) == "KeyError"
    assert first_lines(SimpleNamespace(cause=ValueError("its own"))) == "its own"  # type: ignore[arg-type]


class Process:
    """An actor of a run."""

    def pid(self) -> int:
        return os.getpid()

    def check_health(self, core: str) -> None:
        if core != "lives":
            raise EngineDeadError(core)

    def read(self, path: str) -> None:
        """Waits until somebody writes."""
        with open(path) as waiting:
            waiting.read()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        """What a rank says whose peer is gone."""
        raise RuntimeError(GLOO)


@pytest.fixture
def processes(local_ray: ModuleType) -> Iterator[dict[str, Any]]:
    found = {name: local_ray.remote(Process).options(num_cpus=0).remote() for name in ("a", "b", "c")}
    local_ray.get([actor.pid.remote() for actor in found.values()])
    yield found
    for actor in found.values():
        local_ray.kill(actor)


def kill(ray: ModuleType, actor: Any) -> int:
    pid: int = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    return pid


def answers(actor: Any) -> Any:
    return actor.pid.remote


HEAD = SimpleNamespace(gone=lambda: False, text="the head died")


@pytest.mark.e2e
def test_the_dead_are_named_in_place_of_what_others_say_of_it(local_ray, processes, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    waiting = processes["c"].read.remote(str(tmp_path / "fifo"))  # computes: it is not taken for dead
    engine = partial(processes["a"].check_health.remote, "lives")
    asked = {
        "engine rollout-0": engine,
        "learner rank 0": answers(processes["b"]),
        "learner rank 1": answers(processes["c"]),
    }
    error = WeightSyncError("receiving the weights", (), GLOO)
    assert find_dead(asked, 0.5) == {}
    pid = kill(local_ray, processes["b"])
    shown = explain(error, asked, HEAD)
    assert isinstance(shown, DeathError) and isinstance(shown, RunError) and shown.dead == ("learner rank 0",)
    first, noticed, advice = str(shown).splitlines()
    assert first.startswith(f"learner rank 0 died (process {pid} at ") and "it was killed or crashed" in first
    assert noticed == f"It was noticed as: weight sync failed while receiving the weights: {GLOO}"
    assert "--resume" in advice
    assert explain(shown, asked, HEAD) is shown
    (tmp_path / "fifo").write_text("")
    local_ray.get(waiting)


@pytest.mark.e2e
def test_who_is_asked_whether_it_lives_imports_nothing_of_ours_for_it(local_ray):
    """It took a reward actor, which knows neither torch nor transformers, up to twenty seconds, and its end waited."""

    class Bare:
        def modules(self) -> set[str]:
            import sys

            return {name.split(".")[0] for name in sys.modules}

    actor = local_ray.remote(Bare).options(num_cpus=0).remote()
    assert find_dead(Actors(data=actor, rewards=[actor]).questions(), 60.0) == {}
    assert not local_ray.get(actor.modules.remote()) & {"saccade", "learner", "rollout", "torch", "transformers"}
    local_ray.kill(actor)


@pytest.mark.e2e
def test_an_engine_whose_core_died_is_named_with_its_last_words(processes):
    asked = {"engine rollout-1": partial(processes["a"].check_health.remote, "vLLM died; the end of its log: | OOM")}
    shown = explain(RuntimeError(GLOO), asked, HEAD)
    assert str(shown).startswith(
        "engine rollout-1 died: vLLM died; the end of its log: | OOM\nIt was noticed as: [gloo"
    )


def test_a_lost_head_comes_before_everything_and_a_stop_is_none():
    def never() -> Any:
        raise AssertionError("nobody is asked")

    lost = SimpleNamespace(gone=lambda: True, text="the head died")
    shown = explain(RuntimeError(GLOO), {"x": never}, lost)
    assert isinstance(shown, HeadLostError) and str(shown) == "the head died"
    stop = RunStopped()
    assert explain(stop, {"x": never}, lost) is stop
    mistake = TypeError("ours")
    assert explain(mistake, {}, HEAD) is mistake


@pytest.mark.e2e
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_died_is_named_not_the_one_that_gloo_told_of_it(processes, tmp_path, rank):
    group = LearnerGroup(options(tmp_path, ranks=2), [{}, {}])
    calls = [processes["a"].fail.remote(), processes["b"].die.remote()]
    with pytest.raises(
        LearnerError, match=rf"^learner rank {rank} died in saving a checkpoint \(process \d+ at .*killed"
    ):
        group._wait("saving a checkpoint", calls if rank == 1 else calls[::-1])
    with pytest.raises(LearnerError, match=r"learner rank 1 failed in loading(.|\n)*gloo"):
        group._wait("loading", [processes["a"].pid.remote(), processes["a"].fail.remote()])


@pytest.mark.parametrize(
    ("error", "dead", "saved"),
    [
        (RunError("a group was lost with its actor"), ["engine rollout-0"], True),
        (WeightSyncError("receiving the weights", ("rollout-0",), GLOO), ["engine rollout-0"], True),
        (RunError("a group was lost with its actor"), ["learner rank 1"], False),
        (LearnerError("rank 0 failed"), [], False),
        (MismatchError("they differ by 1"), [], False),
    ],
)
def test_the_state_is_saved_unless_the_learner_is_what_failed(error, dead, saved, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(
        "saccade.run.explain", lambda e, asked, head: DeathError(dict.fromkeys(dead, ""), "x") if dead else e
    )
    monkeypatch.setattr(Run, "checkpoint", lambda self: said.append("saved"))
    run = object.__new__(Run)
    run.config = SimpleNamespace(learner=SimpleNamespace(ranks=2, zero_stage=2))  # type: ignore[assignment]
    run.actors, run.head = SimpleNamespace(questions=dict), HEAD  # type: ignore[assignment]
    run.display = SimpleNamespace(phase=said.append)  # type: ignore[assignment]
    run._saved = 4
    shown = run.checkpoint_after(error)
    why = "nothing of the last update is kept" if isinstance(error, MismatchError) else "the learner failed"
    assert said == (["saved"] if saved else [f"{why}; the newest checkpoint: that of step 4"])
    assert (shown is error) == (not dead)

"""Of the errors that one death brings about, the one that is shown: who died, where, and what to do."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from learner.deaths import how_it_died
from learner.types import LearnerError
from saccade.errors import MismatchError, RunError, RunStopped
from saccade.fleet.deaths import DeathError, explain
from saccade.fleet.head import HeadLostError
from saccade.fleet.waiting import first_lines
from saccade.run import Run
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


HEAD = SimpleNamespace(gone=lambda: False, text="the head died")


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

    async def saves(self: Run) -> None:
        said.append("saved")

    monkeypatch.setattr(Run, "checkpoint", saves)
    run = object.__new__(Run)
    run.config = SimpleNamespace(learner=SimpleNamespace(ranks=2, zero_stage=2))  # type: ignore[assignment]
    run.actors, run.head = SimpleNamespace(questions=dict), HEAD  # type: ignore[assignment]
    run.display = SimpleNamespace(phase=said.append)  # type: ignore[assignment]
    run._saved = 4
    shown = asyncio.run(run.checkpoint_after(error))
    why = "the last update was discarded" if isinstance(error, MismatchError) else "the learner failed"
    assert said == (["saved"] if saved else [f"{why}; the newest checkpoint is from step 4"])
    assert (shown is error) == (not dead)

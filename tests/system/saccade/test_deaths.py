"""Of the errors that one death brings about, the one that is shown: who died, where, and what to do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from learner.group import LearnerGroup
from learner.types import LearnerError
from saccade.errors import RunError
from saccade.fleet.actors import Actors
from saccade.fleet.deaths import DeathError, explain, find_dead
from saccade.fleet.handles import RayData, RayRewards
from saccade.fleet.pool import Pool
from tests.helpers.learner_cases import options
from tests.helpers.process import Process
from tests.unit.saccade.test_deaths import GLOO, HEAD
from weight_sync.verify import WeightSyncError


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


@pytest.mark.slow
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
    assert noticed == f"It was first noticed as: weight sync failed while receiving the weights: {GLOO}"
    assert "--resume" in advice
    assert explain(shown, asked, HEAD) is shown
    (tmp_path / "fifo").write_text("")
    local_ray.get(waiting)


def test_who_is_asked_whether_it_lives_imports_nothing_of_ours_for_it(local_ray):
    """It took a reward actor, which knows neither torch nor transformers, up to twenty seconds, and its end waited."""

    class Bare:
        def modules(self) -> set[str]:
            import sys

            return {name.split(".")[0] for name in sys.modules}

    actor = local_ray.remote(Bare).options(num_cpus=0).remote()
    assert (
        find_dead(
            Actors(rewards=Pool([RayRewards("reward-0", actor)]), data=Pool([RayData("data", actor)])).questions(), 60.0
        )
        == {}
    )
    assert not local_ray.get(actor.modules.remote()) & {"saccade", "learner", "rollout", "torch", "transformers"}
    local_ray.kill(actor)


def test_an_engine_whose_core_died_is_named_with_its_last_words(processes):
    asked = {"engine rollout-1": partial(processes["a"].check_health.remote, "vLLM died; the end of its log: | OOM")}
    shown = explain(RuntimeError(GLOO), asked, HEAD)
    assert str(shown).startswith(
        "engine rollout-1 died: vLLM died; the end of its log: | OOM\nIt was first noticed as: [gloo"
    )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_died_is_named_not_the_one_that_gloo_told_of_it(processes, tmp_path, rank):
    group = LearnerGroup(options(tmp_path, ranks=2), [{}, {}])
    calls = [processes["a"].fail.remote(GLOO), processes["b"].die.remote()]
    with pytest.raises(
        LearnerError, match=rf"^learner rank {rank} died while saving a checkpoint \(process \d+ at .*killed"
    ):
        group._wait("saving a checkpoint", calls if rank == 1 else calls[::-1])
    with pytest.raises(LearnerError, match=r"learner rank 1 failed while loading(.|\n)*gloo"):
        group._wait("loading", [processes["a"].pid.remote(), processes["a"].fail.remote(GLOO)])

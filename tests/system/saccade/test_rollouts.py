"""The pipeline over real Ray actors: references go from actor to actor, and a lost actor is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.handle import RayEngineHandle
from saccade.errors import RunError
from saccade.fleet.handles import RayData, RayRewards
from saccade.fleet.pool import Pool
from saccade.fleet.waiting import wait_for
from saccade.pipeline.admission import Strict
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline
from tests.helpers.fake_actors import Data, Engine, Rewards
from tests.helpers.fake_fleet import Driven, make_dispatcher


@pytest.fixture(scope="module")
def fleet(local_ray) -> Iterator[tuple]:
    """A data actor, an engine that fails once for row 1, and a reward actor."""
    rewards = type("RewardActor", (Rewards,), {"score": local_ray.method(num_returns=2)(Rewards.score)})
    slow = {"reason": "no answer in time", "retryable": True}
    made = [local_ray.remote(c).options(num_cpus=0) for c in (Data, Engine, rewards)]
    actors = made[0].remote(), made[1].remote({1: [slow]}), made[2].remote()
    local_ray.get([actor.__ray_ready__.remote() for actor in actors])  # on a busy machine that takes a while
    yield actors
    for actor in actors:
        local_ray.kill(actor)


@pytest.fixture
def run(fleet: tuple) -> Iterator[Driven]:
    data, engine, rewards = fleet
    dispatcher = make_dispatcher([RayEngineHandle("rollout-0", engine)], [RayRewards("reward-0", rewards)])
    driven = Driven(
        RolloutPipeline(PromptStream(Pool([RayData("data", data)]), 60.0), dispatcher, Strict(1, 9), prompts_per_step=3)
    )
    yield driven
    driven.close()


def test_a_batch_is_generated_scored_retried_and_sealed_by_reference(local_ray, run):
    run.pipeline.admit(0)
    first, second = run.batch(0), run.batch(1)
    assert [s.ref.row for b in (first, second) for s in b.summaries] == [0, 1, 2, 3, 4, 5]
    assert [s.ref.attempt for s in first.summaries] == [0, 1, 0] and first.summaries[0].rewards == (0.0, 1.0)
    group = local_ray.get(first.groups[2].group)
    assert group.prompt.ref.row == 2 and group.verdicts is None, "the group is the one that its engine stored"
    assert [v.score for v in local_ray.get(first.groups[2].verdicts)] == [0.0, 1.0]


def test_what_an_actor_raised_is_said_in_its_own_words(fleet):
    with pytest.raises(RunError, match=r"^while waiting for prompts: (can only|unsupported operand)"):
        wait_for(RayData("data", fleet[0]).take("x"), 60.0, "prompts")  # type: ignore[arg-type]


def test_a_lost_reward_actor_is_named_not_awaited_forever(local_ray, fleet, run):
    """Last: the fleet has no rewards afterwards."""
    local_ray.kill(fleet[2])
    run.pipeline.admit(0)
    with pytest.raises(RunError, match="reward-0 died"):
        run.batch(0)

"""RewardActor in a real Ray: chained on a rollout's reference, two return values, images fetched, children that end."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewards.config import RewardSpec
from rollout.types import GroupSummary, PromptRef, RolloutFailure, RolloutGroup
from tests.unit.rewards.test_reward_actor import PATIENCE, make_group
from tests.unit.rewards.test_reward_actor import source as source
from vlm.media.types import Media


def start_actor(ray: ModuleType, specs: list[RewardSpec], timeout: float = PATIENCE) -> Any:
    from rewards.actor import RewardActor

    actor = ray.remote(RewardActor).options(num_cpus=0.5).remote(specs, timeout)
    ray.get(actor.start.remote(), timeout=PATIENCE)
    return actor


def test_scoring_is_chained_on_a_rollout_and_survives_its_rewards(local_ray: ModuleType, source: Path) -> None:
    ray = local_ray
    actor = start_actor(ray, [RewardSpec("format", 0.5), RewardSpec(f"{source}:length")], timeout=3.0)

    @ray.remote(num_cpus=0)
    def rollout(*texts: str) -> RolloutGroup:
        return make_group(*texts)

    calls = [rollout.remote(*texts) for texts in (("a", "abc"), ("hang", "b"), ("exit", "b"), ("a", "abc"))]
    pairs = [actor.score.remote(call) for call in calls]
    first, hung, exited, last = (ray.get(summary, timeout=PATIENCE) for _, summary in pairs)

    assert isinstance(first, GroupSummary)
    assert first.rewards == last.rewards == (2.0, 4.0)
    assert first.valid == (True, True) and first.oldest_version == 5 and first.lengths == (1, 2)
    assert first.parts == {"format": (0.0, 0.0), "mine:length": (2.0, 4.0)}
    assert hung.valid == exited.valid == (False, False)
    assert all(reason.startswith("timeout: ") and "3 s" in reason for reason in hung.invalid_reasons)
    assert all(reason.startswith("error: ") and "exit status 3" in reason for reason in exited.invalid_reasons)
    assert exited.invalid_excerpts == ("exit", "b") and first.invalid_excerpts == ()
    assert first.part_seconds.keys() == {"format", "mine:length"} and min(first.part_seconds.values()) > 0

    verdicts = ray.get(pairs[0][0], timeout=PATIENCE)
    assert [v.score for v in verdicts] == [2.0, 4.0] and first.reward_seconds > 0
    ray.kill(actor)


def test_failures_pass_images_arrive_and_the_child_dies_with_its_actor(
    local_ray: ModuleType, source: Path, tmp_path: Path
) -> None:
    ray = local_ray
    names = [RewardSpec(f"{source}:length", 0.0), RewardSpec(f"{source}:image_bytes")]
    actor = start_actor(ray, names)

    failure = RolloutFailure(PromptRef("rows:1"), "too long", "rollout-0")
    verdicts, summary = ray.get(actor.score.remote(failure), timeout=PATIENCE)
    assert verdicts == () and summary.failure == failure and summary.oldest_version == -1

    image = Media("image", "0" * 64, ray.put(b"encoded"))
    _, summary = ray.get(actor.score.remote(make_group("a", "b", media=(image,))), timeout=PATIENCE)
    assert summary.rewards == (8.0, 9.0)  # 7 bytes, and 1 or 2 tokens

    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    actor.score.remote(make_group("hold pipe", "b", media=(image,), fifo=str(fifo)))
    assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 100) == b"open\n"
    ray.kill(actor)
    assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 100) == b"", "the child outlived its actor"
    os.close(reader)


def test_rewards_that_cannot_be_loaded_fail_the_start_with_the_reason(local_ray: ModuleType) -> None:
    from rewards.functions.user import RewardSetupError

    with pytest.raises(RewardSetupError, match="no_such_module"):
        start_actor(local_ray, [RewardSpec("no_such_module:f")])

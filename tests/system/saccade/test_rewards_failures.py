"""Rewards that fail for too much of a batch stop the run, and say why; what each reward costs is among the metrics."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from rewards.actor import RewardActor
from rewards.config import RewardSpec
from saccade.errors import RunError
from saccade.fleet.handles import RayRewards
from saccade.fleet.pool import Pool
from tests.helpers.fake_fleet import Driven, make_pipeline


def test_the_batch_of_a_broken_reward_is_not_sealed(local_ray: ModuleType, tmp_path: Path) -> None:
    ray = local_ray
    (tmp_path / "mine.py").write_text(
        "def mine(completions, prompts):\n"
        "    if mine.calls:\n"
        "        raise ValueError(f'call {mine.calls}')\n"
        "    mine.calls += 1\n"
        "    return [1.0 for _ in completions]\n\n"
        "mine.calls = 0\n"
    )
    actor = ray.remote(RewardActor).options(num_cpus=0).remote([RewardSpec(f"{tmp_path}/mine.py:mine")], 60.0)
    for share, passes in ((0.7, True), (0.6, False)):  # two of three groups fail
        ray.get(actor.start.remote())
        run = Driven(make_pipeline(max_failed_share=share))
        run.pipeline.dispatcher.rewards = Pool([RayRewards("reward-0", actor)])
        run.admit(0)
        if passes:
            assert [s.valid for s in run.batch(0).summaries] == [(True, True), (False, False), (False, False)]
        else:
            with pytest.raises(RunError, match=r"6 of 6 completions(.|\n)*6 x error: .*ValueError: call 1"):
                run.batch(0)
        run.close()
    ray.kill(actor)

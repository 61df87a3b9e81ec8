"""A run whose processes are killed, one kind after another: it goes on, and trains every prompt once."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.harness import Chaos


def test_every_prompt_is_trained_once_whoever_is_killed(tmp_path: Path) -> None:
    with Chaos(tmp_path, "simulated", seed=0, timeout=600) as chaos:
        chaos.wait_for_step()
        for kind in ("rollout actor", "data actor", "reward actor", "learner rank", "driver"):
            chaos.kill(kind)
        chaos.stop()
        chaos.check()
    assert len(chaos.result.kills) == 5
    assert (chaos.result.lost, chaos.result.doubled, chaos.result.left_behind) == (0, 0, [])

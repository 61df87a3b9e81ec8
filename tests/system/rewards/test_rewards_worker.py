"""RewardWorker against rewards that hang, crash and exit: each costs one group its verdicts, never the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.process.worker import RewardWorker
from tests.unit.rewards.test_rewards_worker import TIMEOUT

SEPARABLE = """
import os, time

class Each:
    separable = True

    def __call__(self, request):
        from rollout.types import Verdict
        if "hang" in request.completions:
            time.sleep(10_000)
        if "exit" in request.completions:
            os._exit(3)
        return [Verdict.scored(len(text)) for text in request.completions]

each = Each()
"""


def test_only_the_guilty_completion_of_a_separable_reward_goes_without_a_score(tmp_path: Path) -> None:
    (tmp_path / "separable.py").write_text(SEPARABLE)
    worker = RewardWorker([RewardSpec(f"{tmp_path}/separable.py:each")], TIMEOUT)
    verdicts = worker.score(ScoringRequest("", ("a", "exit", "abc"))).verdicts
    assert [v.score for v in verdicts] == [1.0, None, 3.0]
    assert verdicts[1].status == "error" and "exit status 3 while it scored the completion" in verdicts[1].reason
    verdicts = worker.score(ScoringRequest("", ("a", "hang", "abc"))).verdicts
    assert [v.score for v in verdicts] == [1.0, None, 3.0]
    assert verdicts[1].status == "timeout" and "longer than 1 s for the completion" in verdicts[1].reason
    worker.close()


BOMBS = ["\\frac{1}{" * 10_000 + "1" + "}" * 10_000, "10^{10^{10}}", "((((9!)!)!)!)!", "\\int " * 5_000, "1+" * 50_000]


@pytest.mark.parametrize("scope", ["answer", "completion"])
def test_mathematics_that_never_ends_costs_its_own_verdict_at_most(scope: str) -> None:
    """What the reward's own bounds let through is killed at the limit, and the siblings are scored."""
    worker = RewardWorker([RewardSpec("accuracy", options={"scope": scope})], 4.0)
    worker.start()
    right = "<answer>3</answer>" if scope == "answer" else "so it is $3$"
    bombs = [f"<answer>{bomb}</answer>" if scope == "answer" else f"so it is ${bomb}$" for bomb in BOMBS]
    verdicts = worker.score(ScoringRequest("", (right, *bombs, right), answer="3")).verdicts
    worker.close()
    assert verdicts[0].score == verdicts[-1].score == 1.0
    for verdict in verdicts[1:-1]:
        assert verdict.score == 0.0 or (verdict.status in ("timeout", "error") and verdict.reason)

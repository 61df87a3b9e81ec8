"""The producer over real Ray actors with a scripted engine: order, retries, failures, staleness, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from rollout.engines.protocol import SamplingParams
from rollout.types import (
    Completion,
    GroupSummary,
    Prompt,
    PromptRef,
    RolloutFailure,
    RolloutGroup,
    Segment,
    StoredPrompt,
    Verdict,
    draw_seed,
)
from saccade.errors import RunError, RunStopped
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.ledger import Ledger
from saccade.pipeline.rollouts import RolloutPipeline, SealedBatch, check_staleness


def prompt(row: int) -> Prompt:
    return Prompt(PromptRef(f"d:{row}", 0, 0, row), "p", np.zeros(2, np.int32), expanded_length=2)


class ScriptedData:
    def load(self) -> None:
        self.row = 0

    def take(self, n: int) -> list[StoredPrompt]:
        rows = range(self.row, self.row + n)
        self.row += n
        return [StoredPrompt(p.ref, p) for p in map(prompt, rows)]


class ScriptedEngine:
    """Fails as told: {row: [failure of attempt 0, of attempt 1, ...]}."""

    def load(self, script: dict[int, list[dict]]) -> None:
        self.script = script
        self.seeds: dict[int, list[int]] = {}

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, seed: int, attempt: int
    ) -> RolloutGroup | RolloutFailure:
        prompt = replace(prompt, ref=replace(prompt.ref, attempt=attempt))
        self.seeds.setdefault(prompt.ref.row, []).append(seed)
        failures = self.script.get(prompt.ref.row, [])
        if prompt.ref.attempt < len(failures):
            return RolloutFailure(prompt.ref, engine="rollout-0", **failures[prompt.ref.attempt])
        segment = Segment(np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32))
        completions = tuple(Completion((segment,), "x", "stop", seed=k) for k in range(sampling.n))
        return RolloutGroup(prompt, prompt.token_ids, completions, engine="rollout-0")

    def seen(self) -> dict[int, list[int]]:
        return self.seeds

    def hold(self) -> int:
        return 0

    def release(self, groups: int, n: int, ended: int) -> None: ...


class ScriptedReward:
    """Scores 0, 1, ...; all 1 for the rows that `load` names as flat, and nothing in time for those it names slow."""

    def load(self, flat: set[int], slow: set[int]) -> None:
        self.flat, self.slow = flat, slow

    def score(self, group):
        if isinstance(group, RolloutFailure):
            return group, GroupSummary.of_failure(group)
        equal = group.prompt.ref.row in getattr(self, "flat", ())
        verdicts = tuple(Verdict.scored(1.0 if equal else float(k)) for k in range(len(group.completions)))
        if group.prompt.ref.row in getattr(self, "slow", ()):
            verdicts = (Verdict("timeout", reason="no score in 60 s"),) * len(verdicts)
        scored = RolloutGroup(group.prompt, group.prompt_token_ids, group.completions, verdicts, engine=group.engine)
        return scored, GroupSummary.of(scored)


@pytest.fixture(scope="module")
def actors(local_ray) -> Iterator[tuple]:
    """One data actor and one engine for the module; `load` starts them anew."""
    scored = type("Reward", (ScriptedReward,), {"score": local_ray.method(num_returns=2)(ScriptedReward.score)})
    made = tuple(local_ray.remote(c).options(num_cpus=0).remote() for c in (ScriptedData, ScriptedEngine, scored))
    yield made
    for actor in made:
        local_ray.kill(actor)


@pytest.fixture
def pipeline(actors, local_ray) -> Callable[..., RolloutPipeline]:
    data, engine, reward = actors

    def build(script=None, flat: set[int] = frozenset(), slow: set[int] = frozenset(), **changes) -> RolloutPipeline:
        local_ray.get([data.load.remote(), engine.load.remote(script or {}), reward.load.remote(flat, slow)])
        options = {
            "sampling": SamplingParams(n=2),
            "run_seed": 5,
            "prompts_per_step": 3,
            "max_attempts": 2,
            "group_timeout": 60.0,
            "reward_timeout": 60.0,
        }
        return RolloutPipeline(data, [engine], [reward], Ledger(), **{**options, **changes})

    return build


class _TwoResults:
    """A handle whose `score` gives two references, as RewardActor's does."""

    def __init__(self, actor) -> None:
        self.score = actor.score.options(num_returns=2)


def rows(batch: SealedBatch) -> list[int]:
    return [s.ref.row for s in batch.summaries]


def test_batches_are_admitted_once_and_sealed_in_order_of_admission(pipeline, local_ray):
    run = pipeline()
    assert run.admit_through(1) == 6
    assert run.admit_through(1) == 0
    first, second = run.collect(0), run.collect(1)
    assert (rows(first), rows(second)) == ([0, 1, 2], [3, 4, 5])
    assert [b for b, _ in run.ledger.outstanding()] == [0, 0, 0, 1, 1, 1]
    assert first.summaries[0].rewards == (0.0, 1.0)
    assert local_ray.get(first.groups[2]).prompt.ref.row == 2
    seeds = local_ray.get(run.engines[0].seen.remote())
    assert seeds[4] == [draw_seed(5, "d:4", 0)]


@pytest.mark.parametrize("hold", [False, True])
def test_after_a_resume_what_was_issued_comes_first_and_no_earlier_than_due(pipeline, local_ray, hold):
    run = pipeline(hold_while_admitting=hold)
    again = {
        batch: [StoredPrompt(p.ref, p) for p in (prompt(batch * 10 + i) for i in range(2))]  # one of three was dropped
        for batch in (4, 5)
    }
    for batch, prompts in again.items():
        for stored in prompts:
            run.ledger.issue(stored.ref, batch)
    run.go_on_from(4, again)
    assert run.admit_through(4) == 2
    assert local_ray.get(run.engines[0].seen.remote()).keys() == {40, 41}
    assert rows(run.collect(4)) == [40, 41]
    assert run.admit_through(6) == 2 + 3
    assert rows(run.collect(5)) == [50, 51]
    assert rows(run.collect(6)) == [0, 1, 2]


def test_a_retry_repeats_the_seed_and_a_refused_prompt_is_dropped_with_its_reason(pipeline, local_ray):
    slow = {"reason": "no answer in time", "retryable": True}
    run = pipeline({0: [slow], 1: [{"reason": "too long"}], 2: [slow, slow]})
    run.admit_through(0)
    batch = run.collect(0)
    assert rows(batch) == [0]
    assert batch.dropped == 2
    assert run.ledger.dropped == {"too long": 1, "no answer in time": 1}
    seeds = local_ray.get(run.engines[0].seen.remote())
    assert seeds[0][0] == seeds[0][1]
    assert len(seeds[2]) == 2


def test_a_batch_of_nothing_and_a_dead_engine_end_the_run_with_the_reason(pipeline):
    run = pipeline({r: [{"reason": "broken image"}] for r in range(3)})
    run.admit_through(0)
    with pytest.raises(RunError, match="broken image"):
        run.collect(0)
    run = pipeline({1: [{"reason": "killed by signal 9", "engine_dead": True}]})
    run.admit_through(0)
    with pytest.raises(RunError, match=r"engine rollout-0 died .* killed by signal 9"):
        run.collect(0)


def test_a_lost_reward_actor_is_named_not_awaited_forever(pipeline, local_ray):
    run = pipeline()
    reward = local_ray.remote(ScriptedReward).options(num_cpus=0).remote()
    local_ray.kill(reward)
    run.rewards = [_TwoResults(reward)]
    run.admit_through(0)
    with pytest.raises(RunError, match="lost with its actor"):
        run.collect(0)


def test_stopping_leaves_everything_outstanding(pipeline):
    def stop() -> None:
        raise RunStopped

    run = pipeline(check_stop=stop)
    run.admit_through(0)
    with pytest.raises(RunStopped):
        run.collect(0)
    assert [r.row for _, r in run.ledger.outstanding()] == [0, 1, 2]


@pytest.mark.parametrize("hold", [False, True])
def test_groups_without_a_gradient_are_replaced_in_their_places(pipeline, hold):
    run = pipeline(flat={0, 2, 3}, refill=5, hold_while_admitting=hold)
    run.admit_through(1)
    batch = run.collect(0)  # rows 0 and 2 are flat; 6 and 7 come for them
    assert rows(batch) == [6, 1, 7] and batch.replaced == 2 and batch.dropped == 0
    assert run.ledger.dropped == {"its scores are all equal (algorithm.refill)": 2}
    assert [r.row for b, r in run.ledger.outstanding() if b == 0] == [1, 6, 7]
    assert rows(run.collect(1)) == [8, 4, 5]


def test_replacements_are_bounded_and_then_flat_groups_stay(pipeline):
    run = pipeline(flat=set(range(10)), refill=4)
    run.admit_through(0)
    batch = run.collect(0)  # three replaced by 3, 4, 5, one of those by 6
    assert rows(batch) == [6, 4, 5] and batch.replaced == 4


def test_a_replacement_that_fails_is_given_up_with_its_reason(pipeline):
    run = pipeline({3: [{"reason": "too long"}]}, flat={0}, refill=3)
    run.admit_through(0)
    batch = run.collect(0)
    assert rows(batch) == [1, 2] and (batch.replaced, batch.dropped) == (1, 1)


def test_a_group_without_scores_is_replaced_under_that_name(pipeline):
    run = pipeline(flat={2}, slow={0}, refill=3)
    run.admit_through(0)
    assert rows(run.collect(0)) == [3, 1, 4]
    assert run.ledger.dropped == {
        "fewer than two scores: timeout: no score in 60 s": 1,
        "its scores are all equal (algorithm.refill)": 1,
    }


def test_rewards_that_fail_for_replacements_end_the_run_too(pipeline):
    run = pipeline(flat={0, 1}, slow={3, 4}, refill=9, max_failed_share=0.5)
    run.admit_through(0)
    with pytest.raises(RunError, match=r"failed for 4 of 6 completions(.|\n)*no score in 60 s"):
        run.collect(0)


def test_prompts_that_are_too_easy_or_too_hard_are_passed_over(pipeline):
    difficulty = Difficulty(0.2, 0.8)
    summary = GroupSummary(PromptRef("d:1"), (1.0, 1.0, 0.0), (True, True, False), {}, (1,) * 3, ("stop",) * 3, 2, 0)
    difficulty.observe(summary)  # 1 of what was scored: always right
    restored = Difficulty(0.2, 0.8)
    restored.load_state(json.loads(json.dumps(difficulty.state())))
    run = pipeline(difficulty=restored)
    run.admit_through(0)
    assert rows(run.collect(0)) == [0, 2, 3]
    assert restored.passed_over == 1
    assert restored.admits(PromptRef("d:0", epoch=1))  # rewards 0 and 1: half
    assert restored.admits(PromptRef("d:9"))


def test_when_no_prompt_is_worth_it_the_run_says_so(pipeline):
    class Never(Difficulty):
        def admits(self, ref: PromptRef) -> bool:
            return False

    run = pipeline(difficulty=Never(0.0, 0.5), prompts_per_step=1)
    with pytest.raises(RunError, match=r"1001 prompts in a row.*reward_range"):
        run.admit_through(0)


@pytest.mark.parametrize(("oldest", "version", "allowed"), [(3, 3, 0), (2, 3, 1), (3, 4, 1)])
def test_staleness_within_bounds_is_measured(oldest, version, allowed):
    assert check_staleness(sealed(oldest), version, allowed) == version - oldest


@pytest.mark.parametrize(("oldest", "version", "allowed"), [(2, 3, 0), (1, 3, 1), (4, 3, 1)])
def test_staleness_out_of_bounds_is_an_error(oldest, version, allowed):
    with pytest.raises(AssertionError, match=f"a lag of {version - oldest}"):
        check_staleness(sealed(oldest), version, allowed)


def sealed(oldest: int) -> SealedBatch:
    newest = GroupSummary(PromptRef("a"), (1.0,), (True,), {}, (1,), ("stop",), 2, oldest + 1)
    stale = GroupSummary(PromptRef("b"), (1.0,), (True,), {}, (1,), ("stop",), 2, oldest)
    return SealedBatch((), (newest, stale) if oldest < 3 else (stale,), 0)

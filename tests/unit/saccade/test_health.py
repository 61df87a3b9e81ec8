"""When a run goes on and when it ends: steps that were not taken, and engines that disagree with the learner."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from learner.engines.protocol import StepResult
from learner.refusal import joined, refused_step
from learner.types import NotFiniteError, RefusedStep, UpdateStats
from rollout.types import PromptRef
from saccade.errors import MismatchError
from saccade.pipeline.health import Health

NAN = math.nan


def refused(position: int = 0) -> RefusedStep:
    return RefusedStep(position, ("kl",), (PromptRef("d:7"),), NAN, math.inf, 0.5, (PromptRef("d:7"), PromptRef("d:8")))


def update(
    *steps: RefusedStep, attempted: tuple[int, ...] = (0,), mismatch: float = 1e-6, staleness: int = 0
) -> UpdateStats:
    return UpdateStats(
        loss=0.1,
        grad_norm=1.0,
        learning_rate=1e-6,
        groups_dropped=0,
        groups_flat=0,
        staleness_max=staleness,
        metrics={"mismatch_mean": mismatch},
        attempted=attempted,
        refused=steps,
    )


def health(dtype: str = "float32") -> Health:
    return Health(dtype, "some/model")  # type: ignore[arg-type]


def test_the_third_step_in_a_row_that_is_not_taken_ends_the_run():
    run = health()
    for _ in range(2):  # one that is taken between them begins the count anew
        assert all("not taken" in run.observe(update(refused()))[0] for _ in range(2))
        assert run.observe(update()) == [] and run.refused_in_row == 0
    for _ in range(2):
        run.observe(update(refused()))
    with pytest.raises(NotFiniteError, match=r"3 optimizer steps in a row.*Not finite: kl .*d:7 .*mismatch_mean, 0\.5"):
        run.observe(update(refused()))


def test_a_resumed_run_goes_on_counting():
    run = health()
    run.refused_in_row = 2
    with pytest.raises(NotFiniteError):
        run.observe(update(refused()))
    assert run.refused_in_row == 0 and run.observe(update(refused()))  # and one after this end counts anew


def test_steps_of_one_update_are_counted_one_by_one():
    run, all_four = health(), (0, 1, 2, 3)
    lines = run.observe(update(refused(0), refused(2), refused(3), attempted=all_four))
    assert len(lines) == 3 and run.refused_in_row == 2
    with pytest.raises(NotFiniteError):
        run.observe(update(refused(0), attempted=all_four))
    with pytest.raises(NotFiniteError):
        health().observe(update(refused(1), refused(2), refused(3), attempted=all_four))


def test_steps_with_nothing_to_train_do_not_break_the_row():
    """Of four steps two have groups with scores, in each update others."""
    run = health()
    run.observe(update(refused(0), refused(2), attempted=(0, 2)))
    assert run.refused_in_row == 2
    with pytest.raises(NotFiniteError, match="3 optimizer steps in a row"):
        run.observe(update(refused(1), attempted=(1, 3)))


@pytest.mark.parametrize(("dtype", "usual"), [("float32", 0.01), ("bfloat16", 0.1)])
def test_engines_that_disagree_are_said_and_beyond_ten_times_the_run_ends(dtype: str, usual: float):
    assert health(dtype).judge(update(mismatch=0.9 * usual)) == []
    (line,) = health(dtype).judge(update(mismatch=1.1 * usual))
    assert f"differ by {1.1 * usual:.3g}" in line and f"saccade parity some/model --dtype {dtype}" in line
    for gap in (10.1 * usual, math.inf):
        with pytest.raises(MismatchError, match=r"rollout\.engine_options"):
            health(dtype).judge(update(mismatch=gap))


def test_the_gap_is_judged_once_and_only_between_the_same_weights():
    run = health()
    assert run.judge(update(mismatch=1.0, staleness=1)) == []
    assert run.judge(update(refused(), mismatch=NAN)) == []
    assert len(run.judge(update(mismatch=0.05))) == 1
    assert run.judge(update(mismatch=0.05)) == []


def test_what_ranks_saw_of_a_step_is_put_together():
    refs = [PromptRef(f"d:{i}") for i in range(4)]
    result = StepResult(NAN, NAN, 1e-6, {"mismatch_mean": 5.0}, {}, False, {1: ["kl", "loss"]})
    first = refused_step(1, result, 10.0, [[refs[0]], [refs[1], refs[1]]])
    other = refused_step(1, replace(result, not_finite={}), 10.0, [[refs[2]], []])
    assert (first.terms, first.suspects, first.mismatch) == (("kl", "loss"), (refs[1],), 0.5)
    assert (other.terms, other.suspects) == ((), ())
    (whole,) = joined([(other,), (first,)], [[refs[3]], refs[:3]])
    assert (whole.terms, whole.suspects, whole.prompts) == (("kl", "loss"), (refs[1],), tuple(refs[:3]))
    assert whole.reason == "kl, loss not finite"
    assert "d:1" in str(whole) and "d:0" not in str(whole)
    assert "d:0" in str(replace(other, prompts=tuple(refs[:3])))  # where no term tells, all are named

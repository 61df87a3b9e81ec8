"""Group-relative advantages against numbers worked out by hand, and properties that hold for any rewards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from learner.advantages import ADVANTAGES, contributes, grpo, has_baseline, rloo

ALL = np.ones((1, 4), bool)


@st.composite
def groups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 8)))
    rewards = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.5, -2.0, 100.0])))
    return rewards, draw(hnp.arrays(bool, shape))


def test_grpo_by_hand():
    # rewards 0 1 1 2: mean 1, distances -1 0 0 1, variance 2 / 3
    std = np.sqrt(2 / 3) + 1e-4
    np.testing.assert_allclose(grpo(np.array([[0.0, 1, 1, 2]]), ALL), [[-1 / std, 0, 0, 1 / std]], rtol=1e-12)


def test_rloo_by_hand():
    # 0 against (1+1+2)/3, 1 against (0+1+2)/3, 2 against (0+1+1)/3
    np.testing.assert_allclose(rloo(np.array([[0.0, 1, 1, 2]]), ALL), [[-4 / 3, 0, 0, 4 / 3]], rtol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_invalid_sibling_takes_no_part(name: str):
    estimate = ADVANTAGES[name]
    with_hole = estimate(np.array([[3.0, -7e9, 1.0]]), np.array([[True, False, True]]))
    np.testing.assert_array_equal(with_hole[0, [0, 2]], estimate(np.array([[3.0, 1.0]]), np.ones((1, 2), bool))[0])
    assert with_hole[0, 1] == 0.0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_nan_behind_an_invalid_mark_is_never_read(name: str):
    result = ADVANTAGES[name](np.array([[1.0, np.nan, 0.0]]), np.array([[True, False, True]]))
    assert np.isfinite(result).all() and result[0, 1] == 0.0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_nothing_to_compare_gives_exactly_zero(name: str):
    rewards = np.array([[5.0, 9.0, 9.0], [0.7, 0.7, 0.7], [1.0, 2.0, 3.0]])
    valid = np.array([[True, False, False], [True, True, True], [False, False, False]])
    assert (ADVANTAGES[name](rewards, valid) == 0.0).all()
    assert has_baseline(valid).tolist() == [False, True, False]
    assert contributes(rewards, valid).tolist() == [False, False, False]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rounding_noise_is_no_preference(name: str):
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3]])  # differ in the last bit
    assert rewards[0, 0] != rewards[0, 1]
    assert (ADVANTAGES[name](rewards, np.ones((1, 3), bool)) == 0.0).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_reward_that_is_not_finite_is_refused(name: str):
    with pytest.raises(ValueError, match="finite"):
        ADVANTAGES[name](np.array([[1.0, np.inf]]), np.ones((1, 2), bool))


@pytest.mark.parametrize("name", ADVANTAGES)
@given(data=groups())
def test_sums_to_zero_and_keeps_the_order(name: str, data: tuple[np.ndarray, np.ndarray]):
    rewards, valid = data
    result = ADVANTAGES[name](rewards, valid)
    np.testing.assert_allclose(result.sum(axis=1), 0.0, atol=1e-9 * max(1.0, np.abs(result).max(initial=0.0)))
    assert (result[~valid] == 0.0).all()
    for g in np.flatnonzero(contributes(rewards, valid)):
        mine, values = rewards[g, valid[g]], result[g, valid[g]]
        assert (np.sign(values[:, None] - values) == np.sign(mine[:, None] - mine)).all()


@given(data=groups(), shift=st.sampled_from([-3.0, 0.25, 10.0]))
def test_a_constant_added_to_all_rewards_changes_nothing(data: tuple[np.ndarray, np.ndarray], shift: float):
    rewards, valid = data
    for estimate in ADVANTAGES.values():
        np.testing.assert_allclose(estimate(rewards + shift, valid), estimate(rewards, valid), rtol=1e-9, atol=1e-9)


@given(data=groups())
def test_rloo_is_the_mean_of_the_others_taken_away(data: tuple[np.ndarray, np.ndarray]):
    rewards, valid = data
    result = rloo(rewards, valid)
    for g in np.flatnonzero(contributes(rewards, valid)):
        for k in np.flatnonzero(valid[g]):
            others = [rewards[g, j] for j in np.flatnonzero(valid[g]) if j != k]
            assert result[g, k] == pytest.approx(rewards[g, k] - sum(others) / len(others), rel=1e-9, abs=1e-9)

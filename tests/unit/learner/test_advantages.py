"""Group-relative advantages against numbers worked out by hand, and properties that hold for any rewards."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from learner.algorithm.advantages import (
    ADVANTAGES,
    contributes,
    dr_grpo,
    gpg,
    grpo,
    has_baseline,
    maxrl,
    normalized_sum,
    overlong_penalty,
    reinforce_pp,
    rloo,
)

ALL = np.ones((1, 4), bool)


@st.composite
def groups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 8)))
    rewards = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 100.0])))
    return rewards, draw(hnp.arrays(bool, shape))


def test_grpo_by_hand():
    # rewards 0 1 1 2: mean 1, distances -1 0 0 1, variance 2 / 3
    std = np.sqrt(2 / 3) + 1e-4
    np.testing.assert_allclose(grpo(np.array([[0.0, 1, 1, 2]]), ALL), [[-1 / std, 0, 0, 1 / std]], rtol=1e-12)


def test_rloo_by_hand():
    # 0 against (1+1+2)/3, 1 against (0+1+2)/3, 2 against (0+1+1)/3
    np.testing.assert_allclose(rloo(np.array([[0.0, 1, 1, 2]]), ALL), [[-4 / 3, 0, 0, 4 / 3]], rtol=1e-12)


def test_dr_grpo_by_hand():
    np.testing.assert_allclose(dr_grpo(np.array([[0.0, 1, 1, 2]]), ALL), [[-1, 0, 0, 1]], rtol=1e-12)


def test_reinforce_pp_by_hand():
    # distances -1 0 0 1, of a flat group 0 0 0 0, and of 0 4 in a group of two: -2 2. Of these ten the squares sum to
    # 2 + 8, over nine: variance 10 / 9
    rewards = np.array([[0.0, 1, 1, 2], [3, 3, 3, 3], [0, 4, 9, 9], [7, 9, 9, 9]])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    std = np.sqrt(10 / 9) + 1e-4
    expected = np.array([[-1.0, 0, 0, 1], [0, 0, 0, 0], [-2, 2, 0, 0], [0, 0, 0, 0]]) / std
    np.testing.assert_allclose(reinforce_pp(rewards, valid), expected, rtol=1e-12)


def test_gpg_by_hand():
    # two groups of three with a baseline have a gradient: times 3 / 2
    rewards = np.array([[0.0, 2], [1, 1], [4, 2], [5, 9]])
    valid = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)
    np.testing.assert_allclose(gpg(rewards, valid), [[-1.5, 1.5], [0, 0], [1.5, -1.5], [0, 0]], rtol=1e-12)


def test_maxrl_by_hand():
    # one of four right: mean 1/4, distances -1/4 and 3/4, divided by 1/4 + 1e-4
    expected = np.array([[3 / 4, -1 / 4, -1 / 4, -1 / 4]]) / (1 / 4 + 1e-4)
    np.testing.assert_allclose(maxrl(np.array([[1.0, 0, 0, 0]]), ALL), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="negative"):
        maxrl(np.array([[1.0, -1.0]]), np.ones((1, 2), bool))


def test_rewards_normalised_before_they_are_summed_by_hand():
    # accuracy 0 1 with weight 1, a length reward 0 100 with weight 0.5: each is -+ 1/sqrt 2 after normalising
    parts = np.array([[[0.0, 0.0], [1.0, 100.0]]])
    result = normalized_sum(parts, np.array([1.0, 0.5]), np.ones((1, 2), bool))
    small, large = 0.5 / (np.sqrt(0.5) + 1e-4), 50 / (np.sqrt(5000) + 1e-4)
    np.testing.assert_allclose(result, [[-small - 0.5 * large, small + 0.5 * large]], rtol=1e-12)
    opposed = normalized_sum(np.array([[[0.0, 1.0], [100.0, 0.0]]]), np.ones(2), np.ones((1, 2), bool))
    np.testing.assert_allclose(opposed, [[0.0, 0.0]], atol=2e-4)  # summed raw, the second would hardly count
    with pytest.raises(ValueError, match=r"\[G, K, R\] for 3 weights"):
        normalized_sum(parts, np.ones(3), np.ones((1, 2), bool))


def test_the_overlong_penalty_by_hand():
    # limit 10, buffer 4: nothing up to 6, -1/4 a token from there, -1 at 10
    lengths = np.array([0.0, 6, 7, 9, 10, 12])
    assert overlong_penalty(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(lengths, 10, buffer)


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


@given(data=groups(), shift=st.sampled_from([3.0, 0.25, 10.0]))
def test_a_constant_added_to_all_rewards_changes_nothing(data: tuple[np.ndarray, np.ndarray], shift: float):
    rewards, valid = data
    for name in ADVANTAGES.keys() - {"maxrl"}:  # which weighs by the mean
        estimate = ADVANTAGES[name]
        np.testing.assert_allclose(estimate(rewards + shift, valid), estimate(rewards, valid), rtol=1e-9, atol=1e-9)


@given(data=groups())
def test_rloo_is_the_mean_of_the_others_taken_away(data: tuple[np.ndarray, np.ndarray]):
    rewards, valid = data
    result = rloo(rewards, valid)
    for g in np.flatnonzero(contributes(rewards, valid)):
        for k in np.flatnonzero(valid[g]):
            others = [rewards[g, j] for j in np.flatnonzero(valid[g]) if j != k]
            assert result[g, k] == pytest.approx(rewards[g, k] - sum(others) / len(others), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(data=groups(), shuffle=st.randoms())
def test_the_order_of_siblings_and_of_groups_does_not_matter(
    name: str, data: tuple[np.ndarray, np.ndarray], shuffle: random.Random
):
    rewards, valid = data
    rows, columns = list(range(rewards.shape[0])), list(range(rewards.shape[1]))
    shuffle.shuffle(rows)
    shuffle.shuffle(columns)
    where = np.ix_(rows, columns)
    estimate = ADVANTAGES[name]
    np.testing.assert_allclose(estimate(rewards[where], valid[where]), estimate(rewards, valid)[where], atol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(data=groups())
def test_against_a_reference_written_group_by_group(name: str, data: tuple[np.ndarray, np.ndarray]):
    """Exact fractions and plain sums in place of masked arrays."""
    rewards, valid = data
    chosen = [
        [Fraction(float(r)) for r, v in zip(own, ok, strict=True) if v] for own, ok in zip(rewards, valid, strict=True)
    ]
    compared = [own for own in chosen if len(own) >= 2]
    contributing = [own for own in compared if max(own) > min(own)]
    distances = [[r - sum(own) / len(own) for r in own] for own in compared]
    everything = [float(d) for own in distances for d in own]
    batch_std = math.sqrt(sum(d * d for d in everything) / max(len(everything) - 1, 1))
    result = ADVANTAGES[name](rewards, valid)
    for g, own in enumerate(chosen):
        expected = [0.0] * len(own)
        if own in contributing and len(own) >= 2:
            mean = sum(own) / len(own)
            scale = {
                "grpo": math.sqrt(sum(float(r - mean) ** 2 for r in own) / (len(own) - 1)) + 1e-4,
                "dr_grpo": 1.0,
                "rloo": (len(own) - 1) / len(own),
                "reinforce_pp": batch_std + 1e-4,
                "gdpo": batch_std + 1e-4,
                "gpg": len(contributing) / len(compared),
                "maxrl": float(mean) + 1e-4,
            }[name]
            expected = [float(r - mean) / scale for r in own]
        np.testing.assert_allclose(result[g, valid[g]], expected, rtol=1e-7, atol=1e-9)

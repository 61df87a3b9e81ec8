"""Presets of algorithms, and which of their knobs go together."""

from __future__ import annotations

import pytest
import yaml

from saccade.config.algorithm import PRESETS, AlgorithmConfig
from saccade.config.idle_knobs import idle
from saccade.config.options import learner_options
from saccade.config.run_config import ConfigError, dump_config, load_config, parse_config
from tests.unit.saccade.test_config import MINIMAL


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_knobs_and_is_printed_with_all_that_count(preset, tmp_path):
    config = parse_config({**MINIMAL, "algorithm": preset})
    for name, value in PRESETS[preset].items():
        assert getattr(config.algorithm, name) == value
    printed = yaml.safe_load(dump_config(config))["algorithm"]
    counting = {name for name in AlgorithmConfig.model_fields if f"algorithm.{name}" not in idle(config)}
    assert printed["name"] == preset and set(printed) == counting
    (tmp_path / "full.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "full.yaml") == config


def test_what_is_given_goes_before_the_preset(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**MINIMAL, "algorithm": "dapo"}))
    config = load_config(tmp_path / "run.yaml", ["algorithm.beta=0.5", "algorithm.clip_eps_high=0.4"])
    assert (config.algorithm.name, config.algorithm.beta, config.algorithm.clip_eps_high) == ("dapo", 0.5, 0.4)
    assert config.algorithm.refill == PRESETS["dapo"]["refill"]
    other = load_config(tmp_path / "run.yaml", ["algorithm=gspo"])
    assert other.algorithm.loss == "gspo" and other.algorithm.refill == 0.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"algorithm": {"correction": "tis", "old_policy": "behavior"}}, "already compares with the engine's policy"),
        ({"algorithm": {"beta": 0.1, "kl_estimator": "k1"}}, "gradient of k1 is zero in expectation"),
        ({"algorithm": {"reference_every": 5}}, "needs algorithm.beta > 0"),
        ({"algorithm": {"reference_every": 5, "beta": 0.1}, "model": {"path": "m", "lora_rank": 4}}, "never changes"),
        ({"algorithm": {"correction_range": [2.0, 0.5]}}, "0 <= low < high"),
        ({"algorithm": {"reward_range": [0.9, 0.1]}}, "the first must be less"),
        ({"algorithm": {"optimizer_steps": 3}, "learner": {"prompts_per_step": 64}}, "cannot be dealt out evenly"),
        ({"algorithm": "grpp"}, "algorithm.name"),
        ({"algorithm": {"correction_range": [0.5, float("inf")]}}, "algorithm.correction_range.*finite"),
        ({"algorithm": {"loss": "reinforce"}}, "no ratio.*older weights.*correction=tis.*max_staleness=0"),
        ({"algorithm": {"name": "rloo", "correction": "none"}}, "no ratio.*older weights"),
        ({"algorithm": {"name": "rloo", "optimizer_steps": 4}}, "no ratio.*before the first step.*optimizer_steps=1"),
        ({"algorithm": {"advantage": "maxrl", "overlong": 0.9}}, "maxrl takes.*overlong=0.9"),
        ({"algorithm": {"name": "dapo", "advantage": "maxrl"}}, "maxrl takes.*overlong=0.2"),
        ({"algorithm": {"advantage": "maxrl", "kl_in": "reward", "beta": 0.1}}, "maxrl takes.*kl_in=reward"),
        (
            {"algorithm": {"advantage": "maxrl"}, "reward": {"functions": [{"name": "length", "weight": -0.5}]}},
            "maxrl takes.*weight of reward length is -0.5",
        ),
        (
            {"algorithm": {"advantage": "maxrl"}, "reward": {"functions": [{"name": "reward_model"}]}},
            "maxrl takes.*either sign",
        ),
    ],
)
def test_parts_of_an_algorithm_that_do_not_go_together_are_named(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config({**MINIMAL, **changes})


def test_what_goes_together_is_taken():
    for algorithm in ("rloo", {"name": "rloo", "beta": 0.1}, {"advantage": "maxrl", "beta": 0.1}):
        parse_config({**MINIMAL, "algorithm": algorithm})
    alone = {**MINIMAL, "rollout": {"max_staleness": 0}, "algorithm": {"name": "rloo", "correction": "none"}}
    assert parse_config(alone).algorithm.loss == "reinforce"
    # A gate or a cap of a negative weight counts as one of any other.
    gate = {"functions": [{"name": "accuracy"}, {"name": "format", "weight": -1.0, "combine": "product"}]}
    parse_config({**MINIMAL, "algorithm": {"advantage": "maxrl"}, "reward": gate})


def test_a_correction_makes_the_ratio_that_of_the_learner():
    stale = {**MINIMAL, "rollout": {"max_staleness": 2}}
    assert parse_config(stale).old_policy == "behavior"
    assert parse_config({**stale, "algorithm": {"correction": "tis"}}).old_policy == "current"


def test_every_knob_of_the_algorithm_reaches_the_learner_or_the_driver():
    """A value unlike the default, for each."""
    given = {
        "advantage": "rloo",
        "loss": "gspo",
        "clip_eps_low": 0.1,
        "clip_eps_high": 0.3,
        "clip_dual": 3.0,
        "aggregation": "constant",
        "beta": 0.2,
        "kl_estimator": "k2",
        "kl_in": "reward",
        "reference_every": 4,
        "old_policy": "current",
        "correction": "icepop",
        "correction_range": (0.1, 3.0),
        "entropy_bonus": 0.01,
        "optimizer_steps": 2,
        "overlong": 0.5,
    }
    config = parse_config({**MINIMAL, "algorithm": given, "rollout": {"max_completion_length": 100}, "steps": 10})
    options = learner_options(config, "cpu", ["image"])
    named = {name: value for name, value in given.items() if hasattr(options, name)}
    assert {name: getattr(options, name) for name in named} == named
    assert options.total_steps == 20 and options.overlong_buffer == 50 and not options.mask_truncated
    elsewhere = {"name", "refill", "reward_range", "overlong"}
    assert set(AlgorithmConfig.model_fields) - elsewhere == set(named)
    masking = learner_options(parse_config({**MINIMAL, "algorithm": {"overlong": "mask"}}), "cpu", ["image"])
    assert masking.mask_truncated and not masking.overlong_buffer


def test_gdpo_normalises_each_reward_in_its_group_and_the_sum_over_the_batch() -> None:
    options = learner_options(parse_config({**MINIMAL, "algorithm": {"advantage": "gdpo"}}), "cpu", ["image"])
    assert (options.advantage, options.part_weights) == ("reinforce_pp", {"format": 0.5, "accuracy": 1.0})

"""Presets of algorithms, and which of their knobs go together."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
import yaml

from learner.algorithm.advantages import ADVANTAGES, reinforce_pp
from learner.config import AlgorithmConfig, Auto, Behavior, Cispo, Current, Gspo, Icepop, Kl, PpoClip, Reinforce, Tis
from saccade.config.load import dump_config, load_config, parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import learner_options
from saccade.config.presets import PRESETS
from tests.unit.saccade.test_config import MINIMAL


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_knobs_and_is_printed_with_all_that_count(preset, tmp_path):
    config = parse_config({**MINIMAL, "algorithm": preset})
    for name, value in PRESETS[preset].items():
        chosen = getattr(config.algorithm, name)
        if name == "kl":
            assert chosen is None  # it counts where a KL is asked for
        elif isinstance(value, dict):
            assert {each: getattr(chosen, each) for each in value} == value
        else:
            assert chosen == value
    printed = yaml.safe_load(dump_config(config))["algorithm"]
    assert printed["name"] == preset and set(printed) == {field.name for field in fields(AlgorithmConfig)}
    (tmp_path / "full.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "full.yaml") == config


def test_what_is_given_goes_before_the_preset(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**MINIMAL, "algorithm": "dapo"}))
    config = load_config(tmp_path / "run.yaml", ["algorithm.kl=0.5", "algorithm.loss.high=0.4"])
    assert (config.algorithm.name, config.algorithm.loss) == ("dapo", PpoClip(high=0.4))
    assert config.algorithm.kl == Kl(0.5) and config.algorithm.refill == PRESETS["dapo"]["refill"]
    low = load_config(tmp_path / "run.yaml", ["algorithm.loss.low=0.1"])
    assert low.algorithm.loss == PpoClip(low=0.1, high=0.28)
    other = load_config(tmp_path / "run.yaml", ["algorithm=gspo"])
    assert other.algorithm.loss == Gspo(low=3e-4, high=4e-4) and other.algorithm.refill == 0.0


def test_what_a_preset_says_of_the_kl_counts_where_there_is_one():
    def kl(preset: str, given: Any) -> Kl | None:
        return parse_config({**MINIMAL, "algorithm": {"name": preset, "kl": given}}).algorithm.kl

    assert kl("rloo", 0.1) == Kl(0.1, estimator="k1", where="reward")
    assert kl("rloo", {"weight": 0.1, "estimator": "k3"}) == Kl(0.1, estimator="k3", where="reward")
    assert kl("rloo", None) is None and kl("grpo", {"weight": 0.1}) == Kl(0.1)


def test_a_choice_is_written_in_short_and_has_no_knobs_of_others(tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**MINIMAL, "algorithm": {"loss": "cispo", "off_policy": "tis", "optimizer_steps": 2}})
    )
    config = load_config(tmp_path / "run.yaml", ["algorithm.off_policy.max=3", "algorithm.loss.high=4"])
    assert (config.algorithm.loss, config.algorithm.off_policy) == (Cispo(high=4.0), Tis(max=3.0))
    with pytest.raises(ConfigError, match=r"algorithm.loss.dual: algorithm.loss=cispo has no such knob; leave it out"):
        load_config(tmp_path / "run.yaml", ["algorithm.loss.dual=3"])
    with pytest.raises(ConfigError, match=r"algorithm.off_policy.min: algorithm.off_policy=tis has no such knob"):
        load_config(tmp_path / "run.yaml", ["algorithm.off_policy.min=0.5"])
    with pytest.raises(ConfigError, match=r"algorithm.kl.weight: required, but not given"):
        load_config(tmp_path / "run.yaml", ["algorithm.kl.estimator=k2"])
    with pytest.raises(ConfigError, match=r"algorithm.loss=3: should be a mapping"):
        load_config(tmp_path / "run.yaml", ["algorithm.loss=3"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"algorithm": {"loss": "reinforce", "off_policy": "behavior"}},
            "is about the ratio, but",
        ),
        ({"algorithm": {"kl": {"weight": 0.1, "estimator": "k1"}}}, "gradient of k1 is zero in expectation"),
        ({"algorithm": {"kl": {"weight": 1, "refresh": 5}}, "model": {"path": "m", "lora": 4}}, "never changes"),
        ({"algorithm": {"off_policy": {"name": "icepop", "min": 2.0, "max": 0.5}}}, "min=2 must be less than"),
        ({"algorithm": {"reward_range": [0.9, 0.1]}}, "the first must be less"),
        ({"algorithm": {"optimizer_steps": 3}, "learner": {"prompts_per_step": 64}}, "cannot be divided evenly"),
        ({"algorithm": "grpp"}, "algorithm.name"),
        ({"algorithm": {"off_policy": {"name": "tis", "max": float("inf")}}}, "algorithm.off_policy.max.*finite"),
        ({"algorithm": {"loss": "reinforce"}}, "no ratio.*older weights.*off_policy=tis.*max_staleness=0"),
        ({"algorithm": {"name": "rloo", "off_policy": "auto"}}, "no ratio.*older weights"),
        ({"algorithm": {"name": "rloo", "optimizer_steps": 4}}, "no ratio.*before the first step.*optimizer_steps=1"),
        ({"algorithm": {"advantage": "maxrl", "overlong": 0.9}}, "maxrl needs.*overlong=0.9"),
        ({"algorithm": {"name": "dapo", "advantage": "maxrl"}}, "maxrl needs.*overlong=0.2"),
        ({"algorithm": {"advantage": "maxrl", "kl": {"weight": 1, "where": "reward"}}}, "maxrl needs.*kl.where=reward"),
        (
            {"algorithm": {"advantage": "maxrl"}, "reward": {"functions": [{"name": "length", "weight": -0.5}]}},
            "maxrl needs.*weight of reward length is -0.5",
        ),
        (
            {"algorithm": {"advantage": "maxrl"}, "reward": {"functions": [{"name": "reward_model"}]}},
            "maxrl needs.*negative scores",
        ),
    ],
)
def test_parts_of_an_algorithm_that_do_not_go_together_are_named(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config({**MINIMAL, **changes})


def test_what_goes_together_is_taken():
    for algorithm in ("rloo", {"name": "rloo", "kl": 0.1}, {"advantage": "maxrl", "kl": 0.1}):
        parse_config({**MINIMAL, "algorithm": algorithm})
    alone = {**MINIMAL, "rollout": {"max_staleness": 0}, "algorithm": {"name": "rloo", "off_policy": "auto"}}
    assert parse_config(alone).algorithm.loss == Reinforce()
    # A gate or a cap of a negative weight counts as one of any other.
    gate = {"functions": [{"name": "accuracy"}, {"name": "format", "weight": -1.0, "combine": "product"}]}
    parse_config({**MINIMAL, "algorithm": {"advantage": "maxrl"}, "reward": gate})


def test_a_correction_makes_the_ratio_that_of_the_learner():
    stale = {**MINIMAL, "rollout": {"max_staleness": 2}}
    assert parse_config(stale).off_policy == Behavior()
    assert parse_config({**stale, "algorithm": {"off_policy": "tis"}}).off_policy == Tis()


def test_the_learner_reads_the_sections_themselves():
    """A value unlike the default, for each."""
    given = {
        "advantage": "rloo",
        "loss": {"name": "gspo", "low": 0.1, "high": 0.3, "dual": 3.0},
        "aggregation": "constant",
        "kl": {"weight": 0.2, "estimator": "k2", "where": "reward", "refresh": 4},
        "off_policy": {"name": "icepop", "min": 0.1, "max": 3.0},
        "entropy_bonus": 0.01,
        "optimizer_steps": 2,
        "overlong": 0.5,
    }
    by_the_driver = {"name", "refill", "reward_range"}
    assert {field.name for field in fields(AlgorithmConfig)} == {*given, *by_the_driver}
    config = parse_config({**MINIMAL, "algorithm": given, "rollout": {"max_completion_length": 100}, "steps": 10})
    options = learner_options(config, "cpu", ["image"])
    assert (options.model, options.learner, options.rollout) == (config.model, config.learner, config.rollout)
    assert options.total_steps == 20 and options.part_weights == {}
    algorithm = options.algorithm
    assert algorithm == config.algorithm
    assert (algorithm.advantage, algorithm.aggregation) == ("rloo", "constant")
    assert algorithm.loss == Gspo(low=0.1, high=0.3, dual=3.0)
    assert algorithm.kl == algorithm.kl_in("reward") == Kl(0.2, "k2", "reward", 4) and algorithm.kl_in("loss") is None
    assert algorithm.off_policy == Icepop(min=0.1, max=3.0) and algorithm.off_policy.bounds == (0.1, 3.0)
    assert (algorithm.reference_every, algorithm.needs_policy_before, algorithm.overlong_share) == (4, True, 0.5)
    assert (algorithm.entropy_bonus, algorithm.optimizer_steps) == (0.01, 2)


@pytest.mark.parametrize(("staleness", "resolved"), [(0, Current()), (1, Behavior())])
def test_the_learner_is_told_what_auto_means(staleness, resolved):
    config = parse_config({**MINIMAL, "rollout": {"max_staleness": staleness}})
    options = learner_options(config, "cpu", ["image"])
    assert (config.algorithm.off_policy, options.algorithm.off_policy) == (Auto(), resolved)
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(ValueError, match="off_policy must be resolved"):
        replace(options, algorithm=config.algorithm)


def test_gdpo_normalises_each_reward_in_its_group_and_the_sum_over_the_batch() -> None:
    options = learner_options(parse_config({**MINIMAL, "algorithm": {"advantage": "gdpo"}}), "cpu", ["image"])
    assert options.part_weights == {"format": 0.5, "accuracy": 1.0}
    assert ADVANTAGES[options.algorithm.advantage] is reinforce_pp

"""Knobs that would do nothing are errors where they are given, and only there. Each is in a rule or counts always."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from saccade.config.engine_fields import ALLOWED, INSTEAD, REFUSED
from saccade.config.idle_knobs import ALWAYS, IDLE, IDLE_FOR_DATA, Facts, data_idle_problems, override, value_of
from saccade.config.run_config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    dump_config,
    iter_knobs,
    load_config,
    parse_config,
)
from saccade.config.sections import LearnerConfig
from tests.unit.saccade.test_config import MINIMAL

BUSY: dict[str, dict[str, Any]] = {
    "model": {"path": "m", "lora_rank": 4, "lora_alpha": 8.0, "lora_targets": ["vision", "projector"]},
    "data": {"train": ["a.jsonl"], "eval": ["b.jsonl"]},
    "algorithm": {
        "name": "dr_grpo",
        "clip_eps_low": 0.1,
        "clip_eps_high": 0.28,
        "clip_dual": 3.0,
        "beta": 0.1,
        "kl_estimator": "k2",
        "kl_in": "reward",
        "old_policy": "behavior",
    },
    "learner": {"lr_schedule": "cosine", "min_lr_ratio": 0.1, "feature_cache_gib": 2.0, "offload": "optimizer"},
    "evaluation": {"every": 5, "temperature": 0.5, "max_prompts": 3},
}
"""Knobs at other values than their defaults, all of which do something."""
CHANGES = {
    "model.lora_rank=0": ["learner.feature_cache_gib", "model.lora_alpha", "model.lora_targets"],
    "cluster.device=cpu": ["learner.offload"],
    "algorithm.beta=0": ["algorithm.kl_estimator", "algorithm.kl_in"],
    "algorithm.loss=sapo": ["algorithm.clip_eps_low", "algorithm.clip_eps_high", "algorithm.clip_dual"],
    "learner.lr_schedule=constant": ["learner.min_lr_ratio"],
    "data.eval=[]": ["evaluation.every", "evaluation.max_prompts", "evaluation.temperature"],
}
SAPO, FROZEN = {"loss": "sapo"}, {"path": "m", "lora_rank": 4}
EVAL = {"evaluation": {"every": 5, "temperature": 0.5, "max_prompts": 3}}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": {"path": "m", "lora_alpha": 8.0}}, ["model.lora_alpha=8.0"]),
        ({"model": {"path": "m", "lora_targets": ["vision"]}}, ["model.lora_targets=['vision']"]),
        ({"model": {**FROZEN, "freeze": ["vision"]}}, ["model.freeze=['vision']"]),
        (
            {"algorithm": {"name": "dr_grpo", "advantage": "grpo", "loss": "gspo", "aggregation": "token"}},
            ["algorithm.name=dr_grpo"],
        ),
        (
            {"algorithm": {**SAPO, "clip_eps_low": 0.3, "clip_eps_high": 0.1}},
            ["algorithm.clip_eps_low=0.3 would do nothing: algorithm.loss=sapo clips nothing", "clip_eps_high=0.1"],
        ),
        (
            {"algorithm": {"clip_eps_high": 0.28, "clip_dual": 3.0}, "rollout": {"max_staleness": 0}},
            ["algorithm.clip_eps_high=0.28 would do nothing: every ratio is 1", "algorithm.clip_dual=3.0"],
        ),
        ({"algorithm": {"loss": "cispo", "clip_dual": 3.0}}, ["algorithm.clip_dual=3.0"]),
        (
            {"algorithm": {"kl_estimator": "k2", "kl_in": "reward", "reference_every": 5}},
            ["algorithm.kl_estimator=k2", "algorithm.kl_in=reward", "algorithm.reference_every=5"],
        ),
        ({"algorithm": {"correction_range": [0.1, 3.0]}}, ["algorithm.correction_range=[0.1, 3.0]"]),
        ({"learner": {"min_lr_ratio": 0.1}}, ["learner.min_lr_ratio=0.1"]),
        ({"learner": {"feature_cache_gib": 2.0}}, ["learner.feature_cache_gib=2.0"]),
        (
            {"learner": {"offload": "optimizer"}, "cluster": {"device": "cpu"}},
            ["learner.offload=optimizer"],
        ),
        (EVAL, ["evaluation.every=5", "evaluation.temperature=0.5", "evaluation.max_prompts=3"]),
    ],
)
def test_a_given_knob_that_does_nothing_is_named_with_what_it_depends_on(given: dict[str, Any], named: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **given})
    for text in named:
        assert text in str(caught.value)


def test_defaults_neutral_values_and_what_a_preset_sets_are_no_errors():
    parse_config({**MINIMAL, "algorithm": "rloo", "rollout": {"max_staleness": 0}})  # sets kl_in
    parse_config(
        {**MINIMAL, "algorithm": "reinforce_pp", "evaluation": {"every": 0}, "model": {"path": "m", "freeze": []}}
    )


def test_each_knob_is_in_a_rule_or_counts_always():
    ruled = {knob for rule in IDLE for knob in rule.knobs} | {rule.knob for rule in IDLE_FOR_DATA}
    names = {name for name, _ in iter_knobs()}
    assert names == ruled | ALWAYS and not ruled & ALWAYS


def test_what_is_saved_leaves_out_knobs_that_do_nothing_and_reads_back_equal(tmp_path):
    config = parse_config({**MINIMAL, "algorithm": SAPO})
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    saved = yaml.safe_load(dump_config(config))
    assert "clip_eps_low" not in saved["algorithm"] and saved["algorithm"]["loss"] == "sapo"
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_saved_configuration_asks_for_nothing_that_nobody_gave(tmp_path: Path) -> None:
    """It holds every default, and what a preset sets: of data without videos as well, and after a change to it."""
    (tmp_path / "saved.yaml").write_text(dump_config(parse_config({**MINIMAL, "algorithm": "dapo"})))
    nothing = Facts(rows=10**9, kinds=(), cached=False)
    assert data_idle_problems(load_config(tmp_path / "saved.yaml"), nothing) == []
    changed = load_config(tmp_path / "saved.yaml", ["algorithm.loss=sapo", "algorithm.overlong=keep"])
    assert changed.algorithm.loss == "sapo"


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_of_a_saved_configuration_makes_idle_can_be_set_back_as_is_said(
    change: str, tmp_path: Path
) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(parse_config({**MINIMAL, **BUSY})))
    with pytest.raises(ConfigError) as caught:
        load_config(saved, [change])
    back = [shlex.split(problem.partition("set it back: ")[2])[0] for problem in caught.value.problems]
    assert sorted(text.partition("=")[0] for text in back) == sorted(CHANGES[change])
    changed = load_config(saved, [change, *back])
    knobs = dict(iter_knobs())
    assert all(value_of(changed, knob) == knobs[knob].get_default() for knob in CHANGES[change])


@pytest.mark.parametrize("name", sorted({knob for rule in IDLE for knob in rule.knobs}))
def test_a_knob_at_its_default_is_never_idle(name: str) -> None:
    """Given in so many words, as `override` writes it, whatever it depends on."""
    default = dict(iter_knobs())[name].get_default(call_default_factory=True)
    for changes in ([], ["algorithm.loss=sapo"], ["cluster.device=cpu"], ["model.lora_rank=4"]):
        tree = copy.deepcopy(MINIMAL)
        assert apply_overrides(tree, [*changes, *shlex.split(override(name, default))]) == []
        assert value_of(parse_config(tree), name) == default


@pytest.mark.parametrize(
    ("knob", "value", "facts"),
    [
        ("data.max_video_frames", 4, {}),
        ("algorithm.reward_range", [0.1, 0.9], {"rows": 1000}),
    ],
)
def test_knobs_that_the_data_make_idle(knob: str, value: Any, facts: dict[str, Any]):
    section, name = knob.split(".")
    config = parse_config({**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}})
    busy = Facts(rows=10, kinds=("image", "video"), cached=True)
    assert data_idle_problems(config, busy) == []
    given = {"rows": 10, "kinds": ("image",), "cached": True, **facts}
    (problem,) = data_idle_problems(config, Facts(**given))
    assert problem.startswith(f"{knob}=")


def test_checks_across_sections_run_in_python_too():
    with pytest.raises(ValueError, match="num_generations=1: grpo compares"):
        RunConfig(**MINIMAL, rollout={"num_generations": 1})
    with pytest.raises(ValueError, match=r"learner.min_lr_ratio=0.1 would do nothing"):
        RunConfig(**MINIMAL, learner=LearnerConfig(min_lr_ratio=0.1))


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL) + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="the key 'seed' stands twice"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learner.batch_size", "learner.prompts_per_step"),
        ("kl_coef", "algorithm.beta"),
        ("num_epochs", "steps"),
        ("learner.offload_optimizer", "learner.offload "),
        ("rollout.threads", "cluster.resources.<role>.CPU"),
    ],
)
def test_other_programs_names_are_known(key: str, ours: str):
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError, match=f"here it is called {ours}"):
        parse_config({**MINIMAL, **({section: {name: 1}} if section else {name: 1})})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mm_processor_kwargs": {"do_normalize": False}}, "mm_processor_kwargs: it would reach the engine alone"),
        ({"override_generation_config": {"top_p": 0.5}}, "use rollout.temperature"),
        ({"chat_template": "x"}, "chat_template: the engine is given tokens and renders nothing"),
        ({"enable_lora": True}, "use model.lora_rank"),
        ({"kv_cache_memory_bytes": 1}, "use rollout.kv_cache_gib"),
        ({"speculative_config": {}}, "speculative_config: it changes what the engine computes"),
        ({"enforce_eagr": True}, "vLLM has no such option; did you mean enforce_eager?"),
    ],
)
def test_options_that_reach_the_engine_alone_are_refused_by_name(options: dict[str, Any], expected: str):
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "rollout": {"engine_options": options}})
    assert expected in str(caught.value)
    parse_config({**MINIMAL, "rollout": {"engine_options": {"enforce_eager": True}}})


def test_every_option_of_the_engine_is_judged():
    vllm = pytest.importorskip("vllm.engine.arg_utils")
    names = {*vllm.AsyncEngineArgs.__dataclass_fields__}
    assert names == ALLOWED | {*INSTEAD} | REFUSED
    assert not ALLOWED & {*INSTEAD} and not REFUSED & (ALLOWED | {*INSTEAD})

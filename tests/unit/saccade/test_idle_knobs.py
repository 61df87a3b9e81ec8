"""Knobs that would do nothing are errors where they are given, and only there. Each is in a rule or counts always."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.config import LearnerConfig, Sapo
from saccade.config.engine_fields import ALLOWED, INSTEAD, REFUSED
from saccade.config.idle_knobs import IDLE, IDLE_FOR_DATA, Facts, data_idle_problems, override
from saccade.config.knobs import knobs, value_of
from saccade.config.load import apply_overrides, dump_config, load_config, parse_config
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
from tests.unit.saccade.test_config import MINIMAL

BUSY: dict[str, dict[str, Any]] = {
    "model": {"path": "m", "lora": {"rank": 4, "alpha": 8.0, "targets": ["vision", "projector"]}},
    "data": {"train": ["a.jsonl"], "eval": ["b.jsonl"]},
    "algorithm": {
        "name": "dr_grpo",
        "loss": {"name": "ppo_clip", "low": 0.1, "high": 0.28, "dual": 3.0},
        "kl": {"weight": 0.1, "estimator": "k2", "where": "reward"},
        "off_policy": "behavior",
    },
    "learner": {"lr_schedule": {"name": "cosine", "min_ratio": 0.1}, "feature_cache_gib": 2.0, "offload": "optimizer"},
    "evaluation": {"every": 5, "temperature": 0.5, "max_prompts": 3},
}
"""Knobs at other values than their defaults, all of which do something."""
CHANGES = {
    "model.lora=null": ["learner.feature_cache_gib"],
    "cluster.device=cpu": ["learner.offload"],
    "algorithm.off_policy=tis": ["algorithm.loss.dual", "algorithm.loss.high", "algorithm.loss.low"],
    "data.eval=[]": ["evaluation.every", "evaluation.max_prompts", "evaluation.temperature"],
}
ALWAYS: frozenset[str] = frozenset(
    [
        "output_dir",
        "steps",
        "seed",
        "model.path",
        "model.dtype",
        "model.adapter",
        "model.trust_remote_code",
        "model.lora.rank",
        "model.lora.alpha",
        "model.lora.targets",
        "model.lora.quantize",
        "data.train",
        "data.eval",
        "data.columns",
        "data.system_prompt",
        "data.prompt_template",
        "data.shuffle",
        "data.max_prompt_length",
        "data.overlong_prompts",
        "data.max_media_bytes",
        "data.media_from",
        "data.max_refused_share",
        "rollout.engines",
        "rollout.num_generations",
        "rollout.max_completion_length",
        "rollout.temperature",
        "rollout.max_staleness",
        "rollout.kv_cache_gib",
        "rollout.engine_options",
        "reward.functions",
        "reward.check_golds",
        "reward.max_failed_share",
        "reward.actors",
        "reward.timeout",
        "algorithm.advantage",
        "algorithm.loss.name",
        "algorithm.aggregation",
        "algorithm.kl.weight",
        "algorithm.kl.estimator",
        "algorithm.kl.where",
        "algorithm.kl.refresh",
        "algorithm.off_policy.name",
        "algorithm.off_policy.max",
        "algorithm.off_policy.min",
        "algorithm.entropy_bonus",
        "algorithm.optimizer_steps",
        "algorithm.refill",
        "algorithm.overlong",
        "learner.ranks",
        "learner.prompts_per_step",
        "learner.learning_rate",
        "learner.lr_schedule.name",
        "learner.lr_schedule.min_ratio",
        "learner.warmup_steps",
        "learner.betas",
        "learner.weight_decay",
        "learner.max_grad_norm",
        "learner.micro_batch",
        "learner.zero_stage",
        "learner.gradient_checkpointing",
        "checkpoint.every",
        "checkpoint.keep",
        "cluster.device",
        "cluster.resources",
        "cluster.timeout",
        "cluster.metrics_port",
    ]
)
"""Knobs that count whatever the others say. Limits and policies for rows that may come are among them."""
SAPO, FROZEN = {"loss": "sapo"}, {"path": "m", "lora": 4}
EVAL = {"evaluation": {"every": 5, "temperature": 0.5, "max_prompts": 3}}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": {**FROZEN, "freeze": ["vision"]}}, ["model.freeze=['vision']"]),
        (
            {"algorithm": {"name": "dr_grpo", "advantage": "grpo", "loss": "gspo", "aggregation": "token"}},
            ["algorithm.name=dr_grpo"],
        ),
        (
            {"algorithm": {"loss": {"high": 0.28, "dual": 3.0}}, "rollout": {"max_staleness": 0}},
            ["algorithm.loss.high=0.28 would do nothing: every ratio is 1", "algorithm.loss.dual=3.0"],
        ),
        ({"learner": {"feature_cache_gib": 2.0}}, ["learner.feature_cache_gib=2.0"]),
        ({"rollout": {"max_staleness": 0, "admission": "windowed"}}, ["rollout.admission=windowed would do nothing"]),
        (
            {"learner": {"offload": "optimizer"}, "cluster": {"device": "cpu"}},
            ["learner.offload=optimizer"],
        ),
        (EVAL, ["evaluation.every=5", "evaluation.temperature=0.5", "evaluation.max_prompts=3"]),
        ({"data": {"train": "x.parquet", "columns": {"group": "kind"}}}, ["data.columns.group=kind"]),
        (
            {"model": {"path": "m", "freeze": "vision"}, "learner": {"gradient_checkpointing": ["language", "vision"]}},
            ["gradient_checkpointing names vision, which would do nothing", "leave vision out"],
        ),
        (
            {"model": {"path": "m", "lora": {"rank": 4}}, "learner": {"gradient_checkpointing": "audio"}},
            ["gradient_checkpointing names audio"],
        ),
        (
            {"cluster": {"device": "cpu"}, "rollout": {"engine_options": {"gpu_memory_utilization": 0.5}}},
            ["engine_options.gpu_memory_utilization=0.5 would do nothing", "rollout.kv_cache_gib"],
        ),
    ],
)
def test_a_given_knob_that_does_nothing_is_named_with_what_it_depends_on(given: dict[str, Any], named: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **given})
    for text in named:
        assert text in str(caught.value)


def test_defaults_neutral_values_and_what_a_preset_sets_are_no_errors():
    frozen = {"model": {"path": "m", "freeze": "vision"}}
    parse_config({**MINIMAL, **frozen})  # by default all parts are recomputed
    parse_config({**MINIMAL, **frozen, "learner": {"gradient_checkpointing": "language"}})
    parse_config({**MINIMAL, "learner": {"gradient_checkpointing": ["vision"]}})
    parse_config({**MINIMAL, "algorithm": "rloo", "rollout": {"max_staleness": 0}})  # a KL would be in the reward
    parse_config(
        {**MINIMAL, "algorithm": "reinforce_pp", "evaluation": {"every": 0}, "model": {"path": "m", "freeze": []}}
    )


def test_each_knob_is_in_a_rule_or_counts_always():
    ruled = {knob for rule in IDLE for knob in rule.knobs} | {rule.knob for rule in IDLE_FOR_DATA}
    assert set(knobs()) == ruled | ALWAYS and not ruled & ALWAYS


def test_what_is_saved_leaves_out_knobs_that_do_nothing_and_reads_back_equal(tmp_path):
    config = parse_config({**MINIMAL, "algorithm": SAPO})
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    saved = yaml.safe_load(dump_config(config))
    assert "evaluation" in saved and not saved["evaluation"] and saved["algorithm"]["loss"] == {"name": "sapo"}
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_saved_configuration_asks_for_nothing_that_nobody_gave(tmp_path: Path) -> None:
    """It holds every default, and what a preset sets: of data without videos as well, and after a change to it."""
    (tmp_path / "saved.yaml").write_text(dump_config(parse_config({**MINIMAL, "algorithm": "dapo"})))
    nothing = Facts(rows=10**9, kinds=(), cached=False)
    assert data_idle_problems(load_config(tmp_path / "saved.yaml"), nothing) == []
    changed = load_config(tmp_path / "saved.yaml", ["algorithm.loss=sapo", "algorithm.overlong=keep"])
    assert changed.algorithm.loss == Sapo()


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
    assert all(value_of(changed, knob) == knobs()[knob].default for knob in CHANGES[change])


@pytest.mark.parametrize("name", sorted({knob for rule in IDLE for knob in rule.knobs}))
def test_a_knob_at_its_default_is_never_idle(name: str) -> None:
    """Given in so many words, as `override` writes it, whatever it depends on."""
    default = knobs()[name].default
    for changes in ([], ["learner.zero_stage=1"], ["cluster.device=cpu"], ["model.lora=4"]):
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
    with pytest.raises(ValueError, match=r"learner.feature_cache_gib=2.0 would do nothing"):
        RunConfig(**MINIMAL, learner=LearnerConfig(feature_cache_gib=2.0))


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL) + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="the key 'seed' appears twice"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learner.batch_size", "learner.prompts_per_step"),
        ("kl_coef", "algorithm.kl.weight"),
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
        (
            {"mm_processor_kwargs": {"do_normalize": False}},
            "processor_kwargs: only the engine would see this option",
        ),
        ({"override_generation_config": {"top_p": 0.5}}, "use rollout.temperature"),
        ({"chat_template": "x"}, "chat_template: the engine receives tokens, so it renders no template"),
        ({"enable_lora": True}, "use model.lora"),
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

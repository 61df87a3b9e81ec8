"""Configuration: unknown keys, all problems at once, overrides, round trip."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from learner.config import Behavior, Current
from saccade.commands.help import knob_text
from saccade.config.knobs import knobs
from saccade.config.load import dump_config, load_config, parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import data_options

MINIMAL = {"output_dir": "runs/x", "steps": 10, "model": {"path": "m"}, "data": {"train": ["a.parquet"]}}


def problems_of(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


def test_all_problems_are_reported_at_once_and_name_the_nearest_key():
    text = problems_of(
        {
            "steps": 0,
            "outputdir": "x",
            "model": {"path": "m", "dtyp": "float32"},
            "data": {"train": ["a"]},
            "rollout": {"top_p": 0.9, "num_generations": 1, "max_staleness": 1},
            "algorithm": {"off_policy": "current"},
            "learner": {"learing_rate": 1e-5},
        }
    )
    for expected in (
        "output_dir: required",
        "steps=0",
        "model.dtyp: unknown key; did you mean model.dtype?",
        "outputdir: unknown key; did you mean output_dir?",
        "learner.learing_rate: unknown key; did you mean learner.learning_rate?",
        "rollout.top_p: the learner cannot reproduce",
        "rollout.num_generations=1",
        "algorithm.off_policy=current with rollout.max_staleness=1",
    ):
        assert expected in text
    assert text.startswith("8 problems")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learner": {"offload": "parameters"}}, "needs learner.zero_stage=3"),
        ({"learner": {"offload": "optimizer", "zero_stage": 0}}, "of at least 1"),
        ({"learner": {"lr_schedule": "linear", "warmup_steps": 10}}, "must be less than steps=10"),
        ({"learner": {"zero_stage": 0}}, "keeps no float32 master weights"),
        ({"learner": {"micro_batch": 4096}}, "learner.micro_batch=4096 cannot hold one sample of up to"),
        ({"learner": {"micro_batch": "12 MB"}}, "such as 8192, or memory, such as 12 GiB"),
        ({"algorithm": {"overlong": 1.5}}, "algorithm.overlong=1.5: should be keep, mask, or a share"),
        ({"data": {"train": ["a"], "media_from": ["/a", "urls", "/b"]}}, "name a single folder"),
        ({"reward": {"functions": []}}, "nothing would be learned"),
        ({"num_generations": 4}, "did you mean rollout.num_generations?"),
        ({"learner": {"rankz": 1}}, "did you mean learner.ranks?"),
        (
            {"data": {"train": ["a"], "prompt_template": "Q:"}},
            "data.prompt_template='Q:': {prompt} must appear in it once",
        ),
        ({"data": {"train": ["a"], "prompt_template": "{prompt}{prompt}"}}, "must appear in it once"),
        ({"data": {"train": ["a"], "columns": {"prompt": None}}}, "data.columns.prompt=null: without prompts"),
        (
            {"data": {"train": ["a"], "columns": {"picture": "x"}}},
            "data.columns.picture: unknown role; choose one of 'prompt'",
        ),
        ({"data": {"train": ["a"], "overlong_prompts": "cut"}}, "should be 'refuse' or 'truncate'"),
        ({"learnr": {"ranks": 1}}, "did you mean learner?"),
        (
            {"model": {"path": "m", "freeze": ["visoin"]}},
            "model.freeze.0='visoin': did you mean vision? should be",
        ),
        (
            {"model": {"path": "m", "lora": {"targets": ["language.mpl"]}}},
            "model.lora.targets.0='language.mpl': did you mean language.mlp? should be 'language.attention', ",
        ),
        (
            {"model": {"path": "m", "freeze": ["vision", "projector", "audio", "language"]}},
            "model.freeze names every part of a model",
        ),
        (
            {"model": {"path": "m", "lora": 4, "freeze": ["language"]}},
            "model.lora.targets names language.attention, language.mlp, which freeze=language rules out",
        ),
        ({"model": {"path": "m", "lora": {"targets": []}}}, "model.lora.targets is empty"),
        (
            {"model": {"path": "m", "lora": {"quantize": "nf4"}}, "learner": {"zero_stage": 3}},
            "model.lora.quantize=nf4 with zero_stage=3 has not been tested",
        ),
        (
            {"model": {"path": "m", "lora": {"quantize": "nf4"}}, "learner": {"offload": "parameters"}},
            "model.lora.quantize=nf4 with offload=parameters has not been tested",
        ),
        (
            {"model": {"path": "m", "lora": {"quantize": "int3"}}},
            "model.lora.quantize='int3': should be 'none' or 'nf4'",
        ),
        (
            {"cluster": {"resources": {"rolout": {}}}},
            "resources.rolout: unknown role; choose one of 'rollout', ",
        ),
        ({"cluster": {"resources": {"reward": {"CPU": -1}}}}, "cluster.resources.reward.CPU=-1: should be"),
    ],
)
def test_each_cross_field_rule(change: dict, expected: str):
    assert expected in problems_of({**MINIMAL, **change})


def test_overrides_replace_the_file_and_read_scientific_notation(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "learner": {"learning_rate": 1.0}}))
    config = load_config(path, ["learner.learning_rate=1e-6", "rollout.engines=4", "data.train=[b.parquet]"])
    assert config.learner.learning_rate == 1e-6
    assert config.rollout.engines == 4
    assert config.data.train == ("b.parquet",)


def test_bad_overrides_are_listed_with_the_rest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["steps", "steps.x=1", "rollout.enginez=2"])
    assert "'steps' is not of the form" in str(caught.value)
    assert "steps is a value, not a section" in str(caught.value)
    assert "did you mean rollout.engines?" in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "a: [unclosed", None])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError):
        load_config(path)


def test_resolved_configuration_reads_back_equal():
    config = parse_config({**MINIMAL, "learner": {"learning_rate": 3e-6}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_a_wrong_role_does_not_hide_the_other_problems():
    text = problems_of({**MINIMAL, "cluster": {"resources": {"rolout": {}}}, "reward": {"functions": []}})
    assert "unknown role" in text
    assert "nothing would be learned" in text


def test_columns_can_be_named_one_by_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "data": {"train": ["a"], "columns": {"prompt": "caption"}}}))
    config = load_config(path, ["data.columns.answer=box", "data.columns.image=null"])
    assert config.data.columns == {"prompt": "caption", "answer": "box", "image": None}


def test_every_knob_of_the_data_reaches_those_who_read_them():
    changed = {
        "columns": {"prompt": "q", "group": "kind"},
        "system_prompt": "s",
        "prompt_template": "{prompt}?",
        "shuffle": False,
        "max_prompt_length": 77,
        "overlong_prompts": "truncate",
        "max_media_bytes": 2**20,
        "max_video_frames": 3,
        "media_from": ["/data", "urls"],
        "max_refused_share": 0.5,
    }
    config = parse_config({**MINIMAL, "seed": 5, "data": {"train": ["a"], "eval": ["c"], **changed}})
    assert {"train", "eval", *changed} == {field.name for field in fields(config.data)}
    options = data_options(config, ["b"])
    assert options.data == config.data
    assert (options.files, options.shuffle, options.seed) == (("b",), False, 5)
    assert (options.data.prompt_columns, options.extra_columns) == ({"prompt": "q"}, ("kind",))
    assert options.data.max_image_pixels == 2_500_000
    assert (options.data.root, options.data.allow_urls) == (Path("/data"), True)
    assert data_options(config, ["b"], train=False).shuffle


def test_resources_that_are_not_named_keep_their_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "cluster": {"resources": {"learner": {"node": 1}}}}))
    resources = load_config(path, ["cluster.resources.reward.CPU=2"]).cluster.resources
    assert resources == {"rollout": {"CPU": 1.0}, "learner": {"CPU": 1.0, "node": 1.0}, "reward": {"CPU": 2.0}}


def test_old_policy_follows_staleness():
    assert parse_config({**MINIMAL, "rollout": {"max_staleness": 0}}).off_policy == Current()
    assert parse_config({**MINIMAL, "rollout": {"max_staleness": 1}}).off_policy == Behavior()


def test_momenta_of_one_and_more_are_refused():
    assert "learner.betas" in problems_of({**MINIMAL, "learner": {"betas": [1.5, -2]}})


def test_knobs_are_listed_as_yaml_with_what_they_may_be() -> None:
    """The algorithm's are those of its default preset."""
    texts = [knob_text(knob) for knob in knobs().values()]
    listed = yaml.safe_load("\n".join(text.split("\n")[0] for text in texts))
    assert listed["algorithm.aggregation"] == parse_config(MINIMAL).algorithm.aggregation == "sequence"
    assert listed["model.lora.targets"] == ["language.attention", "language.mlp"]
    assert listed["reward.functions"] == [{"name": "format", "weight": 0.5}, {"name": "accuracy"}]
    assert any("ppo_clip  # ppo_clip, gspo, cispo, sapo, reinforce" in text for text in texts)

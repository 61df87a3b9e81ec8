"""Placement: every role in its own place, and what cannot be placed is said with numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from saccade.config.demands import asked_for, demands, local_resources
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
from saccade.fleet.placement import remedies, shortages

ROOT = Path(__file__).resolve().parents[3]


def config(**sections) -> RunConfig:
    return parse_config({"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a"]}, **sections})


def test_demands_scale_independently_and_custom_resources_pass():
    c = config(
        rollout={"engines": 3, "engine_options": {"tensor_parallel_size": 2}},
        learner={"ranks": 8},
        reward={"actors": 2},
        cluster={"resources": {"rollout": {"CPU": 4}, "reward": {"reward_node": 1}}},
    )
    by_role = {d.role: d for d in demands(c, "cuda")}
    assert [r for r in by_role if r.startswith("rollout")] == ["rollout-0", "rollout-1", "rollout-2"]
    assert by_role["rollout-0"].resources == {"CPU": 4.0, "GPU": 2.0}
    assert (by_role["learner"].count, by_role["learner"].resources["GPU"]) == (8, 1.0)
    assert by_role["reward"].resources == {"CPU": 0.5, "reward_node": 1.0}
    assert "learner" not in {d.role for d in demands(c, "cuda", training=False)}
    assert "GPU" not in {k for d in demands(c, "cpu") for k in d.resources}
    assert local_resources(c) == {"CPU": 3 * 4 + 8 + 1 + 1, "reward_node": 2.0}


def test_gpus_of_reward_models_are_placed_with_the_rest():
    functions = [
        {"name": "reward_model", "options": {"model": "m", "device": "cuda", "gpus": 0.5}},
        {"name": "accuracy"},
    ]
    on_gpu = {d.role: d.resources for d in demands(config(reward={"functions": functions}), "cuda")}
    assert on_gpu["reward_model-0"] == {"GPU": 0.5}
    functions[0]["options"] = {"model": "m"}
    assert {d.role: d.resources for d in demands(config(reward={"functions": functions}), "cuda")}[
        "reward_model-0"
    ] == {}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({}, "gpu_memory_utilization=0.85 is more than the engine's share"),
        ({"learner": {"ranks": 2}}, "use learner.ranks=1"),
        ({"rollout": {"engine_options": {"tensor_parallel_size": 2}}}, "engine_options.tensor_parallel_size=1"),
    ],
)
def test_what_cannot_work_on_a_share_of_a_gpu_is_refused(sections, problem):
    half = {"cluster": {"resources": {"rollout": {"GPU": 0.5}, "learner": {"GPU": 0.5}}}}
    with pytest.raises(ConfigError, match=problem):
        config(**half, **sections)


def test_the_recipe_for_one_gpu_is_a_configuration_that_one_gpu_holds():
    text = (ROOT / "docs/gpu.md").read_text()
    (recipe,) = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert sum(d.resources.get("GPU", 0) * d.count for d in demands(config(**recipe), "cuda")) == 1.0


def test_a_shortage_is_told_by_who_holds_what_is_lacking():
    wanted = demands(config(rollout={"engines": 2}), "cpu")
    total = {"CPU": 3.5}
    taken_by_others = remedies(wanted, wanted, total, {"CPU": 0.0}, "cpu")
    assert shortages(wanted, wanted, total, {"CPU": 0.0}) == [
        "CPU: the run needs 3.5, the cluster has 3.5 (0 free); other jobs hold 3.5"
    ]
    assert "other jobs are using the missing CPU" in taken_by_others[0] and "lower" not in taken_by_others[0]
    assert remedies(wanted, wanted, {"CPU": 1.0}, {"CPU": 1.0}, "cpu") == [
        "lower the CPUs in cluster.resources, or add nodes"
    ]
    assert "no single node" in remedies(wanted, wanted, {"CPU": 9.0}, {"CPU": 9.0}, "cpu")[0]


def test_config_sums_up_what_is_asked_of_ray():
    c = config(
        rollout={"engines": 8, "engine_options": {"tensor_parallel_size": 2}},
        learner={"ranks": 4},
        cluster={"device": "cuda"},
    )
    assert asked_for(c) == [
        "asks Ray for 20 GPU, 12.5 CPU: rollout 8 x (2 GPU + 1 CPU), learner 4 x (1 GPU + 1 CPU), reward 1 x (0.5 CPU)"
    ]

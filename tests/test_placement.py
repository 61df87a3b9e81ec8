"""Placement: every role in its own place, and what cannot be placed is said with numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.util import placement_group_table

from saccade.config.demands import asked_for, demands, local_resources
from saccade.config.run_config import ConfigError, RunConfig, parse_config
from saccade.fleet.placement import PlacementError, place, remedies, shortages

ROOT = Path(__file__).resolve().parents[1]


def config(**sections) -> RunConfig:
    return parse_config({"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a"]}, **sections})


def test_demands_scale_independently_and_custom_resources_pass():
    c = config(
        rollout={"engines": 3, "tensor_parallel_size": 2},
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
        ({"rollout": {"gpu_memory_utilization": 0.4}}, "NCCL refuses two ranks on one device"),
        ({"weight_sync": {"backend": "gloo"}}, "gpu_memory_utilization=0.85 is more than the engine's share"),
        ({"learner": {"ranks": 2}}, "use learner.ranks=1"),
        ({"rollout": {"tensor_parallel_size": 2}}, "needs rollout.tensor_parallel_size=1"),
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


SEEN = """
import os, sys, yaml, ray
from saccade.config.run_config import load_config
from saccade.config.demands import local_resources
from saccade.fleet.placement import place
config = load_config(sys.argv[1], ["cluster.placement_timeout=30"])
offered = local_resources(config)
ray.init(address="local", num_cpus=int(offered.pop("CPU")), num_gpus=8, resources=offered, include_dashboard=False)
placement = place(config)

@ray.remote
class Look:
    def gpus(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

counts = {"rollout": config.rollout.engines, "learner": config.learner.ranks, "reward": config.reward.actors}
actors = {r: [Look.options(**placement.options(r, i)).remote() for i in range(n)] for r, n in counts.items()}
seen = {r: ray.get([a.gpus.remote() for a in those], timeout=120) for r, those in actors.items()}
print("SEEN", yaml.safe_dump(seen, default_flow_style=True, width=10000))
ray.shutdown()
"""


@pytest.mark.e2e
@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.yaml")))
def test_every_example_is_placed_on_one_machine_with_eight_gpus(example: str) -> None:
    """The local Ray offers the resources that the file names; on GPUs each actor sees its own, and no other."""
    command = [sys.executable, "-c", SEEN, str(ROOT / "examples" / example)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = yaml.safe_load(next(line for line in done.stdout.splitlines() if "SEEN" in line).split("SEEN", 1)[1])
    device = parse_config(yaml.safe_load((ROOT / "examples" / example).read_text())).cluster.device
    own = [gpu for role in ("rollout", "learner") for gpu in seen[role]]
    if device == "cpu":
        assert set(own) == {""}
    else:
        assert len(set(own)) == len(own) and all(gpu.isdigit() for gpu in own)


@pytest.mark.e2e
def test_a_placement_that_fits_gives_every_actor_its_bundle(local_ray):
    placement = place(config(cluster={"device": "cpu"}, rollout={"engines": 2}, learner={"ranks": 2}))
    try:
        options = placement.options("rollout", 1)
        assert options["num_cpus"] == 1
        groups = {id(placement.options("rollout", i)["scheduling_strategy"].placement_group) for i in range(2)}
        assert len(groups) == 2
        assert placement.options("learner", 1)["scheduling_strategy"].placement_group_bundle_index == 1
    finally:
        placement.release()


@pytest.mark.e2e
def test_what_is_missing_is_said_with_numbers_and_nothing_stays_reserved(local_ray):
    impossible = config(
        rollout={"engines": 2},
        cluster={
            "device": "cpu",
            "placement_timeout": 1.0,
            "resources": {"rollout": {"CPU": 100}, "learner": {"learner_node": 1}},
        },
    )
    with pytest.raises(PlacementError) as caught:
        place(impossible)
    text = str(caught.value)
    assert "rollout-0: 1 x (100 CPU) not placed" in text
    assert "learner_node: the run needs 1, the cluster has 0 (0 free); 1 missing" in text
    assert "lower the CPUs in cluster.resources" in text
    held = [p for p in placement_group_table().values() if p["state"] not in ("REMOVED", "CREATED")]
    assert held == []


@pytest.mark.e2e
def test_a_ray_that_does_not_grow_is_not_waited_for(local_ray):
    with pytest.raises(PlacementError, match=r"this machine does not have what .*\n(.*\n)*.*GPU: the run needs 2"):
        place(config(cluster={"device": "cuda", "placement_timeout": 1e6}), grows=False)


def test_a_shortage_is_told_by_who_holds_what_is_lacking():
    wanted = demands(config(rollout={"engines": 2}), "cpu")
    total = {"CPU": 3.5}
    taken_by_others = remedies(wanted, wanted, total, {"CPU": 0.0}, "cpu")
    assert shortages(wanted, wanted, total, {"CPU": 0.0}) == [
        "CPU: the run needs 3.5, the cluster has 3.5 (0 free); other jobs hold 3.5"
    ]
    assert "other jobs hold the CPU that is lacking" in taken_by_others[0] and "lower" not in taken_by_others[0]
    assert remedies(wanted, wanted, {"CPU": 1.0}, {"CPU": 1.0}, "cpu") == [
        "lower the CPUs in cluster.resources, or add nodes"
    ]
    assert "not in one node" in remedies(wanted, wanted, {"CPU": 9.0}, {"CPU": 9.0}, "cpu")[0]


def test_config_sums_up_what_is_asked_of_ray():
    c = config(rollout={"engines": 8, "tensor_parallel_size": 2}, learner={"ranks": 4}, cluster={"device": "cuda"})
    assert asked_for(c) == [
        "asks Ray for 20 GPU, 12.5 CPU: rollout 8 x (2 GPU + 1 CPU), learner 4 x (1 GPU + 1 CPU), reward 1 x (0.5 CPU)"
    ]

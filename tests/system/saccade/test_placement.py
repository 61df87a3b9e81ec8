"""Placement: every role in its own place, and what cannot be placed is said with numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from ray.util import placement_group_table

from saccade.config.load import parse_config
from saccade.fleet.placement import PlacementError, place
from tests.unit.saccade.test_placement import ROOT, config

SEEN = """
import os, sys, yaml, ray
from saccade.config.load import load_config
from saccade.config.demands import local_resources
from saccade.fleet.placement import place
config = load_config(sys.argv[1], ["cluster.timeout=90"])
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


QUICK = "shapes.yaml"


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(p.name, marks=[] if p.name == QUICK else pytest.mark.slow)
        for p in sorted((ROOT / "examples").glob("*.yaml"))
    ],
)
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


def test_what_is_missing_is_said_with_numbers_and_nothing_stays_reserved(local_ray):
    impossible = config(
        rollout={"engines": 2},
        cluster={
            "device": "cpu",
            "timeout": 3.0,
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


def test_a_ray_that_does_not_grow_is_not_waited_for(local_ray):
    with pytest.raises(PlacementError, match=r"this machine does not have what .*\n(.*\n)*.*GPU: the run needs 2"):
        place(config(cluster={"device": "cuda", "timeout": 1e6}), grows=False)

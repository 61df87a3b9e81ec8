"""Placement: every role in its own place, and what cannot be placed is said with numbers."""

from __future__ import annotations

import pytest
from ray.util import placement_group_table

from driver.config import RunConfig, parse_config
from driver.placement import PlacementError, demands, logical_cpus, place


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
    assert logical_cpus(c) == 3 * 4 + 8 + 1 + 1


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

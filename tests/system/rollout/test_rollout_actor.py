"""RolloutActor in Ray, over simulated engines with every fault: what reaches the driver is always plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from rollout.actor import RolloutActor
from rollout.engines.simulated_engine import Simulation
from rollout.handle import RayEngineHandle
from rollout.types import RolloutFailure, RolloutGroup
from tests.contracts.engine_contract import LocalLearner, image_media, make_prompt
from tests.unit.rollout.test_rollout_actor import OPTIONS, SAMPLING, simulated
from tests.unit.rollout.test_rollout_actor import adapter as adapter
from vlm.adapter import MultimodalAdapter
from vlm.families.registry import load_adapter
from vlm.media.types import Media
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightSyncError


@pytest.fixture(scope="module")
def handles(local_ray: ModuleType, tiny_model: Path) -> Iterator[tuple[RayEngineHandle, RayEngineHandle]]:
    """A reliable engine, and one that dies after its first group."""
    simulations = {
        "a": Simulation(decode_seconds=1e-4),
        "b": Simulation(decode_seconds=1e-4, fault="die", fault_after_groups=1),
    }
    load = partial(load_adapter, str(tiny_model))
    actors = {
        name: local_ray.remote(RolloutActor)
        .options(num_cpus=0, max_concurrency=100)
        .remote(name, OPTIONS, load, group_timeout=20.0, engine=partial(simulated, simulation))
        for name, simulation in simulations.items()
    }
    local_ray.get([actor.start.remote() for actor in actors.values()], timeout=120)
    a, b = (RayEngineHandle(name, actor) for name, actor in actors.items())
    yield a, b
    for actor in actors.values():
        local_ray.kill(actor)


def test_a_group_with_media_by_reference(
    local_ray: ModuleType, adapter: MultimodalAdapter, handles: tuple[RayEngineHandle, RayEngineHandle]
) -> None:
    media: list[Media] = [replace(m, data=local_ray.put(m.data)) for m in (image_media(1), image_media(2))]
    prompt = make_prompt(adapter, "two images", media)
    group = local_ray.get(handles[0].actor.sample.remote(prompt, SAMPLING), timeout=30)
    assert isinstance(group, RolloutGroup) and group.engine == "a" and group.generate_seconds > 0
    assert len(group.prompt_token_ids) == prompt.expanded_length and len(group.completions) == 3
    assert isinstance(group.prompt.media[0].data, local_ray.ObjectRef), "pixels do not travel with the group"


def test_synchronisation_death_and_restart(
    local_ray: ModuleType, adapter: MultimodalAdapter, handles: tuple[RayEngineHandle, RayEngineHandle]
) -> None:
    """One story: synchronised; an engine dies and is restarted in place; its process dies and the other goes on."""
    alive, mortal = handles
    prompt = make_prompt(adapter, "?")
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))
    learner = LocalLearner(model, timeout=10.0)

    learner.form_weight_group(handles)
    sync_weights(learner, handles, 3, timeout=20.0)
    first, second = (local_ray.get(mortal.actor.sample.remote(prompt, SAMPLING), timeout=30) for _ in range(2))
    assert isinstance(first, RolloutGroup) and {c.oldest_version for c in first.completions} == {3}
    assert isinstance(second, RolloutFailure) and second.engine_dead
    with pytest.raises(WeightSyncError, match="at b while pausing: b: EngineDeadError"):
        sync_weights(learner, handles, 4, timeout=20.0)

    local_ray.get(mortal.actor.shutdown.remote(), timeout=30)
    local_ray.get(mortal.actor.start.remote(), timeout=30)
    learner.form_weight_group(handles)
    sync_weights(learner, handles, 4, timeout=20.0)
    third = local_ray.get(mortal.actor.sample.remote(prompt, SAMPLING), timeout=30)
    assert isinstance(third, RolloutGroup) and {c.oldest_version for c in third.completions} == {4}

    local_ray.kill(mortal.actor)
    with pytest.raises(WeightSyncError, match=r"at b while pausing.*(died|dead)"):
        sync_weights(learner, handles, 5, timeout=20.0)
    learner.form_weight_group([alive])
    sync_weights(learner, [alive], 5, timeout=20.0)
    last = local_ray.get(alive.actor.sample.remote(prompt, SAMPLING), timeout=30)
    assert isinstance(last, RolloutGroup) and {c.oldest_version for c in last.completions} == {5}

"""Two learner ranks under ZeRO-3 and two vLLM engines, one of them on two workers: real updates, real transfers.

After each update every token of both engines must have the log-probability that the learner's model gives it, for the
same prompts and images before and after, so that anything stale shows. With backend nccl all runs as on GPUs but the
communicator and its streams (tests/helpers/nccl_over_gloo).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from learner.config import LearnerConfig
from learner.group import LearnerGroup
from learner.types import LearnerOptions, WeightTransferOptions
from rollout.actor import RolloutActor
from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.handle import RayEngineHandle
from rollout.types import GroupSummary, Prompt, RolloutFailure, RolloutGroup, StoredGroup, Verdict
from saccade.commands.parity import TOLERANCES
from tests.conftest import REPOSITORY
from tests.contracts.engine_contract import image_media, make_prompt, reference_logprobs, segment
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.media.types import Media
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightSyncError

TOLERANCE = TOLERANCES["float32"]
START_TIMEOUT = 400.0
CALL_TIMEOUT = 60.0
BUCKET_BYTES = 2**18
"""Several buckets even for the tiny model."""


@dataclass
class Cluster:
    ray: ModuleType
    adapter: MultimodalAdapter
    learner: LearnerGroup
    handles: list[RayEngineHandle]
    prompts: list[Prompt]
    sampling: SamplingParams

    def sample(self, handle: RayEngineHandle) -> list[RolloutGroup]:
        calls = [handle.actor.sample.remote(prompt, self.sampling) for prompt in self.prompts]
        groups = self.ray.get(calls, timeout=CALL_TIMEOUT)
        assert all(isinstance(g, RolloutGroup) for g in groups), groups
        return groups

    def model(self, directory: Path) -> nn.Module:
        """The learner's model, as the Hugging Face class loads it from what the ranks gathered."""
        from transformers import AutoModelForImageTextToText

        self.learner.save_pretrained(directory)
        return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()

    def difference(self, groups: Sequence[RolloutGroup], model: nn.Module) -> float:
        worst = 0.0
        for group in groups:
            media = tuple(replace(m, data=self.ray.get(m.data)) for m in group.prompt.media)
            prompt = replace(group.prompt, media=media)
            for completion in group.completions:
                part = segment(completion)
                assert part.logprobs is not None
                expected = reference_logprobs(
                    model, self.adapter, prompt, part.token_ids.tolist(), banned=self.sampling.banned_token_ids
                )
                worst = max(worst, float(np.abs(part.logprobs - expected).max()))
        return worst


def make_prompts(ray: ModuleType, adapter: MultimodalAdapter) -> list[Prompt]:
    """One with an image and a long text (over a block of the prefix cache), one with two images, one without any."""
    stored: list[Media] = [replace(m, data=ray.put(m.data)) for m in (image_media(1), image_media(2, 56, 56))]
    return [
        make_prompt(adapter, "a text over several blocks of the cache " * 5, stored[:1], "test:0"),
        make_prompt(adapter, "compare", stored, "test:1"),
        make_prompt(adapter, "no image here", (), "test:2"),
    ]


@pytest.fixture(scope="module")
def cluster(local_ray: ModuleType, tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    backend = request.param
    resources: dict[str, Any] = {"num_cpus": 1}
    if backend == "nccl":
        resources["runtime_env"] = {
            "env_vars": {"PYTHONPATH": f"{REPOSITORY}/tests/helpers/nccl_over_gloo:{REPOSITORY}"}
        }
    adapter = load_adapter(str(tiny_model))
    handles = []
    for name, workers in (("single", 1), ("pair", 2)):
        options = EngineOptions(
            ModelConfig(str(tiny_model), dtype="float32"),
            RolloutConfig(kv_cache_gib=0.125, engine_options={"max_num_seqs": 32, "tensor_parallel_size": workers}),
            device="cpu",
            max_model_len=512,
            weight_transfer_backend=backend,
            control_timeout=CALL_TIMEOUT,
        )
        actor = local_ray.remote(RolloutActor).options(max_concurrency=100, **resources)
        load = partial(load_adapter, str(tiny_model))
        handles.append(RayEngineHandle(name, actor.remote(name, options, load, group_timeout=CALL_TIMEOUT), workers))
    learner = LearnerGroup(
        LearnerOptions(
            ModelConfig(str(tiny_model), dtype="float32"),
            total_steps=3,
            device="cpu",
            learner=LearnerConfig(learning_rate=3e-3, zero_stage=3, ranks=2),
            rollout=RolloutConfig(max_staleness=0),
            timeout=CALL_TIMEOUT,
        ),
        [resources] * 2,
        WeightTransferOptions(backend, BUCKET_BYTES, CALL_TIMEOUT),
    )
    sampling = SamplingParams(n=4, max_tokens=8, ignore_eos=True, banned_token_ids=adapter.banned_token_ids)
    try:
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(learner.start, START_TIMEOUT)
            local_ray.get([h.actor.start.remote() for h in handles], timeout=START_TIMEOUT)
            starting.result()
        yield Cluster(local_ray, adapter, learner, handles, make_prompts(local_ray, adapter), sampling)
    finally:
        local_ray.wait([h.actor.shutdown.remote() for h in handles], num_returns=len(handles), timeout=20.0)
        for handle in handles:
            local_ray.kill(handle.actor)
        learner.shutdown()


def scored(group: RolloutGroup, rng: np.random.Generator) -> RolloutGroup:
    """With rewards of which no two are equal, so that every completion moves the weights."""
    rewards = rng.permutation(len(group.completions))
    return replace(group, verdicts=tuple(Verdict.scored(float(r)) for r in rewards))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [pytest.param("nccl", marks=pytest.mark.slow), "gloo"], indirect=True)
def test_three_updates_reach_both_engines_exactly(cluster: Cluster, tmp_path: Path) -> None:
    ray, learner, handles = cluster.ray, cluster.learner, cluster.handles
    rng = np.random.default_rng(0)
    learner.form_weight_group(handles)
    sync_weights(learner, handles, 0, timeout=CALL_TIMEOUT)
    groups = [g for handle in handles for g in cluster.sample(handle)]
    for version in range(3):
        batch = [scored(group, rng) for group in groups]
        stored = [StoredGroup(ray.put(g), ray.put(g.verdicts)) for g in batch]
        learner.update(stored, [GroupSummary.of(g) for g in batch], version)
        sync_weights(learner, handles, version + 1, timeout=CALL_TIMEOUT)
        model = cluster.model(tmp_path / str(version + 1))
        assert cluster.difference(groups, model) > 1e-3, "the update changed nothing: the next check would be empty"
        groups = []
        for handle in handles:
            new = cluster.sample(handle)
            assert cluster.difference(new, model) < TOLERANCE, handle.name
            assert {v for g in new for c in g.completions for v in segment(c).policy_versions} == {version + 1}
            groups += new


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["gloo"], indirect=True)
def test_a_killed_engine_is_an_answer_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    """Death while generating is plain data, at once; the sync names the engine; the other one goes on without it; the
    dead one is started again in its place and synchronised."""
    ray, learner = cluster.ray, cluster.learner
    single, pair = cluster.handles
    learner.form_weight_group([single, pair])
    long = replace(cluster.sampling, max_tokens=200)
    running = single.actor.sample.remote(cluster.prompts[1], long)
    ray.get(single.actor.sample.remote(cluster.prompts[1], replace(long, max_tokens=1)), timeout=CALL_TIMEOUT)
    _engine_core(ray, single).kill()
    failure = ray.get(running, timeout=CALL_TIMEOUT)
    assert isinstance(failure, RolloutFailure) and failure.engine_dead and failure.engine == "single", failure
    with pytest.raises(WeightSyncError, match=r"at single while pausing.*EngineDeadError"):
        sync_weights(learner, [single, pair], 10, timeout=CALL_TIMEOUT)

    learner.form_weight_group([pair])
    sync_weights(learner, [pair], 10, timeout=CALL_TIMEOUT)
    model = cluster.model(tmp_path / "model")
    assert cluster.difference(cluster.sample(pair), model) < TOLERANCE

    ray.get(single.actor.shutdown.remote(), timeout=CALL_TIMEOUT)
    ray.get(single.actor.start.remote(), timeout=START_TIMEOUT)
    learner.form_weight_group([single, pair])
    sync_weights(learner, [single, pair], 11, timeout=CALL_TIMEOUT)
    for handle in (single, pair):
        groups = cluster.sample(handle)
        assert cluster.difference(groups, model) < TOLERANCE
        assert {c.oldest_version for g in groups for c in g.completions} == {11}


def _engine_core(ray: ModuleType, handle: RayEngineHandle) -> psutil.Process:
    pid: int = ray.get(handle.actor.__ray_call__.remote(lambda actor: os.getpid()), timeout=CALL_TIMEOUT)
    (core,) = [c for c in psutil.Process(pid).children(recursive=True) if "EngineCore" in c.name()]
    return core

"""VLLMEngine on CPU, for real: the contract, and agreement of its log-probabilities with the Hugging Face model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from rollout.engine import EngineDeadError, EngineOptions, RolloutEngine, SamplingParams
from rollout.types import Prompt
from rollout.vllm_engine import VLLMEngine
from tests.engine_contract import (
    MAX_MODEL_LEN,
    EngineContract,
    Harness,
    LocalLearner,
    assert_dead,
    image_media,
    make_prompt,
    move,
    reference_logprobs,
    segment,
    small_policy,
)
from vlm.adapter import MultimodalAdapter
from vlm.registry import load_adapter

TOLERANCE = 1e-5
LONG = "a question that fills several blocks of the prefix cache, " * 4
"""Over 128 tokens, one block of the CPU's prefix cache, so that a stale cache would be used."""


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return load_adapter(str(tiny_model))


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> nn.Module:
    """The learner's model; starts as the engine's, and is moved by tests."""
    return small_policy(str(tiny_model))


def options(model: Path | str, **changes: object) -> EngineOptions:
    fixed = EngineOptions(
        str(model),
        dtype="float32",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=64,
        kv_cache_gib=0.125,
        weight_transfer_backend="gloo",
        control_timeout=60.0,
    )
    return replace(fixed, **changes)  # type: ignore[arg-type]


def difference(harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams) -> float:
    """Largest difference between the engine's log-probabilities and the model's, over all sampled tokens."""
    output = harness.run(harness.engine.generate(prompt, prompt.media, sampling))
    worst = 0.0
    for completion in output.completions:
        part = segment(completion)
        assert part.logprobs is not None
        expected = reference_logprobs(
            policy,
            harness.adapter,
            prompt,
            part.token_ids.tolist(),
            banned=sampling.banned_token_ids,
            temperature=sampling.temperature,
        )
        worst = max(worst, float(np.abs(part.logprobs - expected).max()))
    return worst


@pytest.mark.e2e
class TestVLLMEngine(EngineContract):
    @pytest.fixture(scope="class")
    def harness(self, tiny_model: Path, adapter: MultimodalAdapter) -> Iterator[Harness]:
        harness = Harness(VLLMEngine(options(tiny_model), adapter), adapter)
        harness.run(harness.engine.start())
        yield harness
        harness.run(harness.engine.shutdown())
        harness.runner.close()

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("images", [0, 1, 2])
    def test_logprobs_are_the_models(
        self, harness: Harness, policy: nn.Module, sampling: SamplingParams, images: int, temperature: float
    ) -> None:
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        harness.synchronize(learner, 100)
        media = [image_media(seed, width=56 + 28 * seed) for seed in range(images)]
        prompt = make_prompt(harness.adapter, "what is it?", media)
        assert difference(harness, policy, prompt, replace(sampling, temperature=temperature)) < TOLERANCE

    def test_nothing_stale_survives_an_update(
        self, harness: Harness, policy: nn.Module, sampling: SamplingParams
    ) -> None:
        """The same prompt and image before and after each update: prefix cache, vision cache, and the tied head."""
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        prompt = make_prompt(harness.adapter, LONG, [image_media(5)])
        for version in (201, 202):
            harness.synchronize(learner, version)
            assert difference(harness, policy, prompt, sampling) < TOLERANCE
            move(policy, seed=version)
            assert difference(harness, policy, prompt, sampling) > 0.1  # the check can fail

    def test_tokens_on_both_sides_of_an_update_match_their_own_weights(
        self, harness: Harness, policy: nn.Module, sampling: SamplingParams
    ) -> None:
        adapter, engine = harness.adapter, harness.engine
        learner = LocalLearner(policy, rename=adapter.engine_weight_name)
        harness.synchronize(learner, 300)
        prompt = make_prompt(adapter, "tell me", [image_media(6)])
        long = replace(sampling, n=1, max_tokens=200)

        async def begin() -> asyncio.Task:
            running = asyncio.create_task(engine.generate(prompt, prompt.media, long))
            await engine.generate(prompt, prompt.media, replace(long, max_tokens=3))
            await engine.pause()  # freezes it here: it must not finish while the learner gets ready
            return running

        running = harness.run(begin())
        old = {name: value.clone() for name, value in policy.state_dict().items()}
        move(policy, seed=300)
        harness.synchronize(learner, 301)

        async def finish() -> object:
            return await running

        part = segment(harness.run(finish()).completions[0])  # type: ignore[attr-defined]
        switch = int((part.policy_versions == 300).sum())
        assert 0 < switch < 200 and set(part.policy_versions.tolist()) == {300, 301}
        tokens = part.token_ids.tolist()
        new = reference_logprobs(policy, adapter, prompt, tokens, banned=sampling.banned_token_ids)
        policy.load_state_dict(old)
        before = reference_logprobs(policy, adapter, prompt, tokens, banned=sampling.banned_token_ids)
        assert part.logprobs is not None
        assert np.abs(part.logprobs[:switch] - before[:switch]).max() < TOLERANCE
        assert np.abs(part.logprobs[switch:] - new[switch:]).max() < TOLERANCE

    def test_a_weight_that_was_not_sent_is_missed(self, harness: Harness, policy: nn.Module) -> None:
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        entries = learner.sender.source._inner._entries
        (left_out,) = [e for e in entries if e.name.endswith("layers.1.self_attn.k_proj.weight")]
        entries.remove(left_out)
        with pytest.raises(RuntimeError, match=r"kept old weight elements.*layers\.1\.self_attn\.qkv_proj"):
            harness.synchronize(learner, 400)
        assert harness.run(harness.engine.version()) != 400
        harness.synchronize(LocalLearner(policy, rename=harness.adapter.engine_weight_name), 401)

    def test_a_name_the_engine_does_not_know_is_reported(
        self, harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        extra = nn.ModuleDict({"model": policy, "unknown": nn.Linear(2, 2)})

        def rename(name: str) -> str:
            return harness.adapter.engine_weight_name(name.removeprefix("model.")) if "unknown" not in name else name

        learner = LocalLearner(extra, timeout=3.0, rename=rename)
        with pytest.raises(RuntimeError, match="unknown"):
            harness.synchronize(learner, 500)
        harness.synchronize(LocalLearner(policy, rename=harness.adapter.engine_weight_name), 501)
        assert difference(harness, policy, prompt, sampling) < TOLERANCE

    def test_killed_engine(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        """Last: its engine does not come back."""
        (core,) = [c for c in psutil.Process().children(recursive=True) if "EngineCore" in c.name()]

        async def play() -> None:
            long = replace(sampling, max_tokens=400)
            running = asyncio.create_task(harness.engine.generate(prompt, prompt.media, long))
            await harness.engine.generate(prompt, prompt.media, replace(sampling, max_tokens=1))
            core.kill()
            await running

        with pytest.raises(EngineDeadError, match="died"):
            harness.run(asyncio.wait_for(play(), 10.0))
        assert_dead(harness, prompt, sampling)


def test_it_is_a_rollout_engine(adapter: MultimodalAdapter) -> None:
    assert isinstance(VLLMEngine(EngineOptions("x"), adapter), RolloutEngine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_one_is_refused(adapter: MultimodalAdapter) -> None:
    engine = VLLMEngine(EngineOptions("x", device="cuda"), adapter)
    with pytest.raises(RuntimeError, match=r"no CUDA GPU here.*cluster\.device=cpu"):
        asyncio.run(engine.start())


@pytest.mark.e2e
def test_a_failed_start_shows_the_engines_own_log(tiny_model: Path, adapter: MultimodalAdapter) -> None:
    engine = VLLMEngine(options(tiny_model, extra={"kv_cache_memory_bytes": 1}), adapter)
    with pytest.raises(
        RuntimeError, match=r"(?s)did not start: ValueError: No available memory.*rollout\.kv_cache_gib"
    ) as caught:
        asyncio.run(engine.start())
    assert "KV cache" in str(caught.value).split("The end of its own log:")[1]

"""VLLMEngine on CPU, for real: the contract, and agreement of its log-probabilities with the Hugging Face model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
from torch import nn

from rollout.config import RolloutConfig
from rollout.engines import vllm_config
from rollout.engines.protocol import EngineDeadError, EngineOptions, EngineOutput, SamplingParams
from rollout.engines.vllm_engine import VLLMEngine
from rollout.types import Prompt
from saccade.commands.parity import TOLERANCES
from tests.contracts.engine_contract import (
    MAX_MODEL_LEN,
    BreaksOff,
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
from tests.helpers.faulty_worker import CORRUPTED, EXTENSION
from tests.unit.rollout.test_vllm_engine import adapter as adapter
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from weight_sync.verify import WeightMismatchError

TOLERANCE = TOLERANCES["float32"]


LONG = "a question that fills a block of 128 tokens of the prefix cache, " * 3
"""So that a stale block, where there is a prefix cache, would be used."""


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> nn.Module:
    """The learner's model; starts as the engine's, and is moved by tests."""
    return small_policy(str(tiny_model))


def options(model: Path, **engine_options: object) -> EngineOptions:
    return EngineOptions(
        ModelConfig(str(model), dtype="float32"),
        RolloutConfig(kv_cache_gib=0.125, engine_options=engine_options),
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        weight_transfer_backend="gloo",
        control_timeout=60.0,
    )


def difference(harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams) -> float:
    """Largest difference between the engine's log-probabilities and the model's, over all sampled tokens."""
    output = harness.run(harness.engine.sample(prompt, prompt.media, sampling))
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


class TestVLLMEngine(EngineContract):
    @pytest.fixture(scope="class")
    def harness(self, tiny_model: Path, adapter: MultimodalAdapter) -> Iterator[Harness]:
        harness = Harness(VLLMEngine(options(tiny_model), adapter), adapter)
        with mock.patch.object(vllm_config, "WORKER_EXTENSION", EXTENSION):
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
        prompt = make_prompt(adapter, LONG, [image_media(6)])
        long = replace(sampling, n=4, max_tokens=200)  # siblings, which share whatever can be shared of the prompt

        async def begin() -> asyncio.Task:
            running = asyncio.create_task(engine.sample(prompt, prompt.media, long))
            await engine.sample(prompt, prompt.media, replace(long, max_tokens=3, seed=99))
            await engine.pause()  # freezes it here: it must not finish while the learner gets ready
            return running

        running = harness.run(begin())
        old = {name: value.clone() for name, value in policy.state_dict().items()}
        move(policy, seed=300)
        harness.synchronize(learner, 301)

        async def finish() -> EngineOutput:
            return await running

        parts = [segment(c) for c in harness.run(finish()).completions]

        def references() -> list[np.ndarray]:
            banned = sampling.banned_token_ids
            return [reference_logprobs(policy, adapter, prompt, p.token_ids.tolist(), banned=banned) for p in parts]

        new = references()
        policy.load_state_dict(old)
        for part, before, after in zip(parts, references(), new, strict=True):
            assert part.logprobs is not None
            switch = int((part.policy_versions == 300).sum())
            assert 0 < switch < 200 and set(part.policy_versions.tolist()) == {300, 301}
            assert np.abs(part.logprobs[:switch] - before[:switch]).max() < TOLERANCE
            assert np.abs(part.logprobs[switch:] - after[switch:]).max() < TOLERANCE

    def test_a_layer_left_half_loaded_does_not_mix_with_the_next_attempt(
        self, harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        learner = LocalLearner(policy, timeout=20.0, rename=harness.adapter.engine_weight_name, bucket_bytes=1)
        whole = learner.sender.source._inner
        names = [m.name for m in whole.metadata()]
        middle = next(i for i, n in enumerate(names) if n.endswith("layers.1.self_attn.k_proj.weight"))
        assert names[middle - 2].endswith("q_proj.weight"), "of the fused projection only the first part arrived"
        learner.sender.source._inner = BreaksOff(whole, after=middle)
        with pytest.raises(RuntimeError, match="the learner stumbles"):
            harness.synchronize(learner, 350)
        learner.sender.source._inner = whole
        move(policy, seed=350)
        harness.synchronize(learner, 351)
        assert difference(harness, policy, prompt, sampling) < TOLERANCE

    def refused(self, harness: Harness, learner: LocalLearner, version: int, message: str) -> None:
        """The transfer is a mismatch that says `message`, and nothing can be sampled until one succeeds."""
        before = harness.run(harness.engine.version())
        with pytest.raises(WeightMismatchError, match=message) as caught:
            harness.synchronize(learner, version)
        assert caught.value.engines == ("engine",)
        assert harness.run(harness.engine.version()) == before
        assert harness.run(harness.engine._engine.is_paused())

    def test_a_weight_that_was_not_sent_is_missed(self, harness: Harness, policy: nn.Module) -> None:
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        entries = learner.sender.source._inner._entries
        (left_out,) = [e for e in entries if e.name.endswith("layers.1.self_attn.k_proj.weight")]
        entries.remove(left_out)
        self.refused(harness, learner, 400, r"kept old weight elements.*layers\.1\.self_attn\.qkv_proj")
        harness.synchronize(LocalLearner(policy, rename=harness.adapter.engine_weight_name), 401)

    @pytest.mark.parametrize(
        ("old", "new"), [("layers.1.mlp.down_proj", "layers.1.mlp.sideways"), ("visual.", "elsewhere.")]
    )
    def test_a_name_the_engine_does_not_know_is_reported(
        self, harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams, old: str, new: str
    ) -> None:
        """Twice: the engine does not take the list of names for a checked one."""
        learner = LocalLearner(policy, rename=lambda n: harness.adapter.engine_weight_name(n).replace(old, new))
        for version in (500, 501):
            self.refused(harness, learner, version, f"no parameter of the engine took.*{new}.*kept old weight elements")
        harness.synchronize(LocalLearner(policy, rename=harness.adapter.engine_weight_name), 502)
        assert difference(harness, policy, prompt, sampling) < TOLERANCE

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("corrupted", rf"1 differ: [\w.]*{CORRUPTED} \(sent .*, received "),
            ("stale head", r"kept old weight elements.*lm_head \(it computes with a former copy of its weight\)"),
        ],
    )
    def test_a_fault_within_the_engine(
        self,
        harness: Harness,
        policy: nn.Module,
        prompt: Prompt,
        sampling: SamplingParams,
        fault: str,
        message: str,
    ) -> None:
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        harness.synchronize(learner, 600)
        move(policy, seed=600)

        def inject(what: str | None) -> None:
            harness.run(harness.engine._engine.collective_rpc("inject", args=(what,)))

        inject(fault)
        try:
            self.refused(harness, learner, 601, message)
        finally:
            inject(None)
        harness.synchronize(learner, 602)
        assert difference(harness, policy, prompt, sampling) < TOLERANCE

    def test_killed_engine(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        """Last: its engine does not come back."""
        (core,) = [c for c in psutil.Process().children(recursive=True) if "EngineCore" in c.name()]

        async def play() -> None:
            long = replace(sampling, max_tokens=400)
            running = asyncio.create_task(harness.engine.sample(prompt, prompt.media, long))
            await harness.engine.sample(prompt, prompt.media, replace(sampling, max_tokens=1))
            core.kill()
            await running

        with pytest.raises(EngineDeadError, match="the vLLM engine died; the end of its log"):
            harness.run(asyncio.wait_for(play(), 10.0))
        assert_dead(harness, prompt, sampling)


@pytest.mark.slow
def test_a_failed_start_shows_the_engines_own_log(tiny_model: Path, adapter: MultimodalAdapter) -> None:
    engine = VLLMEngine(options(tiny_model, kv_cache_memory_bytes=1), adapter)
    with pytest.raises(
        RuntimeError, match=r"(?s)did not start: ValueError: No available memory.*rollout\.kv_cache_gib"
    ) as caught:
        asyncio.run(engine.start())
    assert "for the cache blocks" in str(caught.value).split("The end of its own log:")[1]

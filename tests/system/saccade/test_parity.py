"""vLLM and the learner agree on every family, on tiny models; and the comparison notices when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from learner.config import LearnerConfig
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.engines.vllm_engine import VLLMEngine
from rollout.types import RolloutGroup
from saccade.commands.parity import TOLERANCES, CaseResult, Sampled, compare, parity, run_parity
from saccade.commands.parity_cases import case_prompt, cases
from tests.contracts.engine_contract import Harness, LocalLearner, move
from tests.model.saccade.test_parity import TOLERANCE
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import TINY, build_tiny

QUICK = "qwen2_5_omni"


UNTRAINABLE = ("aria",)
"""vLLM's CPU build keeps its old experts after an update; tests/unit/saccade/test_preflight.py has the refusal."""


OTHERS = sorted(set(TINY) - {QUICK} - set(UNTRAINABLE))


@pytest.mark.parametrize("family", ["qwen3_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in UNTRAINABLE)])
def test_the_command_prints_and_writes_what_it_found(family: str, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    path = tmp_path / "parity.json"
    limit = 6 if family == "qwen3_vl" else None  # of the tokens of an image, which both sides keep
    assert run_parity(
        None,
        tiny=family,
        images=3,
        video=True,
        tolerance=TOLERANCE,
        path=path,
        console=console,
        max_image_tokens=limit,
    )
    results = [CaseResult(**found) for found in json.loads(path.read_text())[family]]
    assert [r.case for r in results][:4] == ["text", "1 image", "3 images", "interleaved"]
    assert all(r.tokens == 32 and r.pixels in (None, 0.0) for r in results)
    assert "equal" in console.export_text()


@pytest.mark.parametrize("family", [QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_engine_and_learner_agree_before_and_after_updates(family: str, tmp_path: Path) -> None:
    """Every weight has a name that the engine knows, and nothing computed from the old ones is left in its caches."""
    model = str(build_tiny(family, tmp_path))
    adapter = load_adapter(model)
    options = EngineOptions(
        ModelConfig(model, dtype="float32"),
        RolloutConfig(kv_cache_gib=0.25, engine_options={"mm_processor_cache_gb": 0}),
        device="cpu",
        max_model_len=512,
        weight_transfer_backend="gloo",
        max_media_per_prompt=dict.fromkeys(adapter.modalities, 3),
    )
    chosen = LearnerOptions(
        ModelConfig(model, dtype="float32"), 1, "cpu", learner=LearnerConfig(gradient_checkpointing=())
    )
    learner = TorchEngine(chosen, adapter)
    sampling = SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True, banned_token_ids=adapter.banned_token_ids)
    prompts = [case_prompt(adapter, name, parts, 0) for name, parts in cases(adapter, 3).items()]
    assert {p.ref.uid for p in prompts} >= {"text", *({"video", "audio"} & adapter.modalities.keys())}
    harness = Harness(VLLMEngine(options, adapter), adapter)
    harness.run(harness.engine.start())
    try:
        former: dict[str, Sampled] = {}
        for version in (0, 1, 2):
            if version:
                with torch.no_grad():
                    move(learner.policy.model, seed=version)
                sender = LocalLearner(learner.policy.model, rename=adapter.engine_weight_name)
                harness.synchronize(sender, version)
            for prompt in prompts:
                output = harness.run(harness.engine.sample(prompt, prompt.media, sampling))
                inputs = harness.run(harness.engine.processed_media(prompt, prompt.media))
                sampled = Sampled(RolloutGroup(prompt, output.prompt_token_ids, output.completions), inputs)
                result = compare(learner, adapter, chosen, prompt, sampled)
                assert result.agrees(TOLERANCE) and result.pixels in (None, 0.0), result
                if version:
                    stale = compare(learner, adapter, chosen, prompt, former[prompt.ref.uid])
                    assert stale.largest > 0.01  # the update was large enough to be seen
                former[prompt.ref.uid] = sampled
    finally:
        harness.run(harness.engine.shutdown())
        harness.runner.close()


@pytest.mark.slow
def test_in_bfloat16_the_mean_agrees_and_pixels_are_equal(tmp_path: Path) -> None:
    results = parity(str(build_tiny("qwen2_5_vl", tmp_path)), video=False, dtype="bfloat16")
    assert all(r.agrees(TOLERANCES["bfloat16"], "bfloat16") and r.pixels in (None, 0.0) for r in results), results
    assert max(r.largest for r in results) > TOLERANCES["float32"]  # it was no float32 that was compared


@pytest.mark.slow
def test_a_learner_with_other_pixels_is_found_out(tmp_path: Path) -> None:
    results = parity(str(build_tiny("qwen2_5_vl", tmp_path)), adapter="tests.model.saccade.test_parity:OtherPixels")
    verdicts = {r.case: r.agrees(TOLERANCE) for r in results}
    with_images = {"1 image", "3 images", "interleaved", "video, image"}
    assert verdicts == {r.case: r.case not in with_images for r in results}
    assert {r.case for r in results if (r.pixels or 0.0) > 0.1} == with_images

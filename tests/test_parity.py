"""vLLM and the learner agree on every family, on tiny models; and the comparison notices when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from driver.parity import CaseResult, Sampled, case_prompt, cases, compare, parity, run_parity
from learner.torch_engine import TorchEngine
from learner.types import LearnerOptions
from rollout.engine import EngineOptions, SamplingParams
from rollout.types import RolloutGroup
from rollout.vllm_engine import VLLMEngine
from tests.engine_contract import Harness, LocalLearner, move
from vlm.adapter import EncodedPrompt
from vlm.qwen_vl import QwenVLAdapter
from vlm.registry import load_adapter
from vlm.tiny import TINY, build_tiny

REPRESENTATIVE = ("internvl", "llava_next", "qwen2_5_vl", "smolvlm")
"""One of each way to lay out pixels: tiles by count, padded tiles, patch rows, tiles by prompt. The others are slow."""
TRAINABLE = set(TINY) - {"aria"}
"""vLLM's CPU build goes on with Aria's former experts after an update; tests/test_preflight.py has the refusal."""
TOLERANCE = 1e-5


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", [f if f in REPRESENTATIVE else pytest.param(f, marks=pytest.mark.slow) for f in sorted(TINY)]
)
def test_engine_and_learner_agree(family: str, tmp_path: Path) -> None:
    results = parity(str(build_tiny(family, tmp_path / family)))
    assert [r for r in results if not r.agrees(TOLERANCE)] == []
    assert len(results) == 1 or [r.case for r in results][:4] == ["text", "1 image", "3 images", "interleaved"]
    assert {"video", "audio"} & load_adapter(str(tmp_path / family)).modalities.keys() <= {r.case for r in results}
    assert all(r.tokens == 32 for r in results)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", [f if f in REPRESENTATIVE else pytest.param(f, marks=pytest.mark.slow) for f in sorted(TRAINABLE)]
)
def test_they_agree_after_an_update_too(family: str, tmp_path: Path) -> None:
    """Every weight has a name that the engine knows, and nothing computed from the old ones is left in its caches."""
    model = str(build_tiny(family, tmp_path))
    adapter = load_adapter(model)
    options = EngineOptions(
        model,
        dtype="float32",
        device="cpu",
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_gib=0.25,
        weight_transfer_backend="gloo",
        max_media_per_prompt=dict.fromkeys(adapter.modalities, 2),
        extra={"mm_processor_cache_gb": 0},
    )
    chosen = LearnerOptions(model, total_steps=1, device="cpu", dtype="float32", gradient_checkpointing=False)
    learner = TorchEngine(chosen, adapter)
    sampling = SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True, banned_token_ids=adapter.banned_token_ids)
    prompts = [case_prompt(adapter, name, parts, 0) for name, parts in cases(adapter, 2).items()]
    harness = Harness(VLLMEngine(options, adapter), adapter)
    harness.run(harness.engine.start())
    try:
        for version in (1, 2):
            before = [harness.generate(prompt, sampling) for prompt in prompts]
            with torch.no_grad():
                move(learner.policy.model, seed=version)
            sender = LocalLearner(learner.policy.model, rename=adapter.engine_weight_name)
            harness.synchronize(sender, version)
            for prompt, old in zip(prompts, before, strict=True):
                output = harness.run(harness.engine.generate(prompt, prompt.media, sampling))
                inputs = harness.run(harness.engine.processed_media(prompt, prompt.media))
                group = RolloutGroup(prompt, output.prompt_token_ids, output.completions)
                result = compare(learner, adapter, chosen, prompt, Sampled(group, inputs))
                assert result.agrees(TOLERANCE), result
                before_update = Sampled(replace(group, completions=old), inputs)
                stale = compare(learner, adapter, chosen, prompt, before_update)
                assert stale.largest > 0.01  # the update was large enough to be seen
    finally:
        harness.run(harness.engine.shutdown())
        harness.runner.close()


class OtherPixels(QwenVLAdapter):
    """A learner that normalises images in another way than the engine."""

    def encode_batch(self, texts: Sequence[str], media: Sequence[Sequence[Any]]) -> list[EncodedPrompt]:
        darker = [[Image.fromarray((np.asarray(image) * 0.5).astype(np.uint8)) for image in own] for own in media]
        return super().encode_batch(texts, darker)


@pytest.mark.e2e
def test_a_learner_with_other_pixels_is_found_out(tmp_path: Path) -> None:
    results = parity(str(build_tiny("qwen2_5_vl", tmp_path)), adapter="tests.test_parity:OtherPixels")
    verdicts = {r.case: r.agrees(TOLERANCE) for r in results}
    assert verdicts == {"text": True, "1 image": False, "3 images": False, "interleaved": False}


def test_an_agreement_that_does_not_depend_on_the_pixels_is_none() -> None:
    same = CaseResult("1 image", 40, 32, largest=1e-7, mean=1e-8, moved=2.0)
    assert same.agrees(TOLERANCE)
    assert not CaseResult("1 image", 40, 32, largest=1e-7, mean=1e-8, moved=0.0).agrees(TOLERANCE)
    assert not CaseResult("1 image", 40, 32, largest=2e-5, mean=1e-8, moved=2.0).agrees(TOLERANCE)
    assert not CaseResult("1 image", problem="first at position 3").agrees(TOLERANCE)
    assert not CaseResult("1 image").agrees(TOLERANCE)


@pytest.mark.parametrize(("model", "tiny"), [(None, None), ("m", "all"), (None, "qwen9")])
def test_what_to_compare_must_be_one_thing_that_exists(model: str | None, tiny: str | None) -> None:
    with pytest.raises(ValueError, match=r"--tiny|no tiny model"):
        run_parity(model, tiny=tiny, images=3, video=True, tolerance=TOLERANCE, path=None, console=Console())

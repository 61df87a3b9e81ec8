"""`model.max_image_tokens` reaches vLLM and the learner's processor alike, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rollout.engines.protocol import EngineOptions
from rollout.engines.vllm_config import engine_arguments
from tests.unit.vlm.test_image_tokens import SHAPES, Limited, prompt_of
from tests.unit.vlm.test_image_tokens import limited as limited
from vlm.config import ModelConfig
from vlm.encoding import concatenate_padded
from vlm.families.registry import load_adapter
from vlm.media.video_audio import decode
from vlm.tiny import build_tiny


def test_vllms_processor_makes_the_same_of_every_image(limited: Limited) -> None:
    """Its own, as the engine is told to make it, without an engine behind it."""
    from vllm.config import ModelConfig as VLLMModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    _, path, adapter = limited
    told = engine_arguments(EngineOptions(ModelConfig(str(path), dtype="float32"), device="cpu"), adapter)
    names = ("model", "dtype", "mm_processor_kwargs", "mm_device_do_normalize", "generation_config")
    processor = MULTIMODAL_REGISTRY.create_processor(VLLMModelConfig(**{name: told[name] for name in names}))
    for shape in SHAPES:
        text, ids, media = prompt_of(adapter, shape)
        encoded = adapter.encode(text, [decode(m, m.data) for m in media])
        given = adapter.engine_prompt(ids, media)
        items = processor.info.parse_mm_data(given["multi_modal_data"])
        out = processor.apply(ProcessorInputs(given["prompt_token_ids"], items), TimingContext(enabled=False))
        assert adapter.ids_from_engine(np.array(out["prompt_token_ids"])).tolist() == encoded.input_ids.tolist()
        inputs: dict[str, list[torch.Tensor]] = {}
        for item in (item for items in out["mm_kwargs"].values() for item in items):
            for name, field in item.items():
                value = torch.as_tensor(field.data)
                inputs.setdefault(name, []).append(value if value.ndim else value[None])
        ours, theirs = adapter.comparable(encoded.inputs, {n: concatenate_padded(v) for n, v in inputs.items()})
        pixels = [name for name in ours if name.startswith("pixel_values")]
        assert pixels
        for name in pixels:
            torch.testing.assert_close(ours[name].flatten(), theirs[name].flatten(), rtol=0, atol=1e-5, msg=name)


def test_generation_config_gives_ends_to_both_sides_and_nothing_else_to_either(tmp_path: Path) -> None:
    from vllm.config import ModelConfig as VLLMModelConfig

    path = build_tiny("qwen2_5_vl", tmp_path)
    own = load_adapter(str(path)).tokenizer.eos_token_id
    content = {"eos_token_id": [own, 5, 7], "repetition_penalty": 1.5, "top_k": 3, "top_p": 0.5, "temperature": 0.1}
    (path / "generation_config.json").write_text(json.dumps(content))
    adapter = load_adapter(str(path))
    assert adapter.stop_token_ids == (own, 5, 7)
    told = engine_arguments(EngineOptions(ModelConfig(str(path), dtype="float32"), device="cpu"), adapter)
    engine = VLLMModelConfig(**{name: told[name] for name in ("model", "dtype", "generation_config")})
    assert engine.get_diff_sampling_param() == {}
    assert {*engine.try_get_generation_config()["eos_token_id"]} == {*adapter.stop_token_ids}
    (path / "generation_config.json").unlink()  # vLLM then goes by config.json
    assert load_adapter(str(path)).stop_token_ids[0] == own

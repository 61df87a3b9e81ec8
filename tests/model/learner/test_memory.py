"""What `saccade plan` says of memory: bytes kept for the backward pass against what autograd keeps, counts by hand,
and, slowly, the peak of a real process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from learner.config import Kl, LearnerConfig
from learner.model.load import load_policy
from learner.model.logprobs import CHUNK_BYTES
from learner.plan.activations import projector_bytes, tower_bytes
from learner.plan.memory import Load, behind_bytes, logits_bytes, plan_memory
from learner.plan.model_shape import ModelShape, describe
from learner.plan.predict import predict
from learner.plan.zero_states import element_bytes, zero_states
from learner.types import LearnerOptions
from saccade.cli import app
from saccade.commands.plan import make_plan
from saccade.config.load import load_config
from tests.helpers.learner_cases import adapter_of, changed
from vlm.adapter import MultimodalAdapter
from vlm.config import Lora, ModelConfig
from vlm.media.video_audio import decode
from vlm.tiny import TinySizes, build_tiny
from vlm.tiny.noise import noise_image

SIZES = TinySizes(hidden=128, intermediate=352, layers=3, vision_hidden=64, vision_intermediate=176)
FAMILIES = (
    "llama",
    "qwen3",
    "gemma3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen2_5_omni",
    "llava",
    "internvl",
    "idefics3",
)
TOKENS = 192
KEPT = 0.15
"""Largest relative difference between predicted and counted bytes."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("memory")

    def model(family: str) -> Path:
        path = folder / family
        return path if path.exists() else build_tiny(family, path, sizes=SIZES)

    return model


def options_of(model: Path, **changes: Any) -> LearnerOptions:
    plain = LearnerOptions(
        ModelConfig(str(model), dtype="float32"), 10, device="cpu", learner=LearnerConfig(gradient_checkpointing=())
    )
    return changed(plain, **changes)


def kept(compute: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps of `compute`, each storage once, parameters left out."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del result
    return sum(count for address, count in storages.items() if address not in own)


def language_bytes(policy: Any, adapter: MultimodalAdapter) -> int:
    ids = torch.randint(5, 100, (1, TOKENS))
    ones = torch.ones_like(ids)
    given = {"attention_mask": ones, "position_ids": adapter.position_ids(ids, ones, {}), **adapter.token_inputs(ids)}
    return kept(lambda: adapter.hidden_states(policy.base, input_ids=ids, **given), policy)


def vision_bytes(policy: Any, adapter: MultimodalAdapter, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes kept, and image tokens."""
    images = [noise_image(seed, 224, 224) for seed in range(2)]
    messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": "?"}]}]
    encoded = adapter.encode(adapter.render(messages), [decode(image, image.data) for image in images])
    inputs = {name: encoded.inputs[name] for name in adapter.modalities["image"].inputs}
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    features: list[Any] = []
    count = kept(lambda: features.append(adapter.media_features(policy.base.base_model, "image", inputs)), policy)
    pooled = features[0].pooler_output
    tokens = sum(int(f.numel()) for f in pooled) // policy.head.weight.shape[1]
    return count, tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16"}, {"lora": Lora(8)}], ids=["float32", "bfloat16", "lora"])
def test_layers_keep_what_is_predicted(models: Callable[[str], Path], family: str, change: dict[str, Any]) -> None:
    adapter, options = adapter_of(models(family)), options_of(models(family), **change)
    policy, shape, size = load_policy(options, adapter), describe(options, adapter), element_bytes(options)
    text = TOKENS * (tower_bytes(shape.language, size, False).saved + behind_bytes(shape, size))
    assert language_bytes(policy, adapter) == pytest.approx(text, rel=KEPT)
    if shape.vision is None or "lora" in change:
        return
    counted, tokens = vision_bytes(policy, adapter, getattr(torch, options.model.dtype))
    patches = tokens * shape.patches_per_token
    own = tower_bytes(shape.vision, size, False).saved + size * shape.patch
    assert counted == pytest.approx(patches * own + tokens * projector_bytes(shape, size), rel=KEPT)


def test_counts_of_a_tiny_llama_by_hand(models: Callable[[str], Path]) -> None:
    path = models("llama")
    adapter, H, wide, layers = adapter_of(path), 128, 352, 3
    V = len(adapter.tokenizer)
    layer = 2 * H * H + 2 * H * (H // 2) + 3 * H * wide + 2 * H  # q, o; k, v of 2 heads of 4; the MLP; norms
    shape = describe(options_of(path), adapter)
    assert shape.total == shape.total_trained == layers * layer + 2 * V * H + H
    assert (shape.hidden, shape.vocabulary, shape.tied) == (H, V, False)
    layer_shape = shape.language.layer
    assert (layer_shape.query, layer_shape.key_value, layer_shape.heads, layer_shape.intermediate) == (
        H,
        H // 2,
        4,
        wide,
    )
    adapted = describe(options_of(path, lora=Lora(8)), adapter)
    added = layers * 8 * (2 * (H + H) + 2 * (H + H // 2) + 3 * (H + wide))
    assert adapted.total_trained == added
    assert adapted.total == shape.total + added


def test_experts_are_refused(models: Callable[[str], Path]) -> None:
    path = models("aria")
    with pytest.raises(ValueError, match="not only linear layers"):
        describe(options_of(path), adapter_of(path))


def test_states_by_stage(models: Callable[[str], Path]) -> None:
    path = models("llama")
    adapter = adapter_of(path)
    shape = describe(options_of(path), adapter)
    n = shape.total

    def states(**changes: Any) -> Any:
        return zero_states(shape, options_of(path, **changes))

    zero, two, three = states(zero_stage=0), states(ranks=2), states(zero_stage=3, ranks=2, dtype="bfloat16")
    assert (zero.parameters, zero.gradients, zero.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (two.parameters, two.gradients, two.optimizer) == (4 * n, 2 * n, 6 * n)
    assert (three.parameters, three.gathered, three.gradients, three.optimizer) == (n, 2 * n, 2 * n + 2 * n, 6 * n)
    one = states(zero_stage=1, dtype="bfloat16", ranks=2)
    assert (one.parameters, one.gradients, one.optimizer) == (2 * n, 6 * n, 6 * n)
    with_reference = states(zero_stage=0, kl=Kl(0.1))
    assert with_reference.parameters == 8 * n
    assert states(zero_stage=0, kl=Kl(0.1), lora=Lora(8)).parameters == 4 * n, (
        "the adapter switched off is the reference"
    )
    offloaded = states(device="cuda", offload="optimizer")
    assert offloaded.optimizer == 0
    assert offloaded.host["optimizer"] >= 12 * n
    assert not states(offload="optimizer").host, "on a CPU there is but one memory"


def test_logits_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = _shape(vocabulary=1000, hidden=10)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 1000)
    one = options_of(Path("none"))
    assert logits_bytes(shape, one, 64) == max(8 * 64 * 1000, 4 * 64 * 1000 + 4 * 10_000) + 2 * 4 * 640
    assert logits_bytes(shape, one, 128) - logits_bytes(shape, one, 64) == 2 * 4 * 640, "one chunk at a time"
    bonus = options_of(Path("none"), entropy_bonus=0.1)
    assert logits_bytes(shape, bonus, 64) == 8 * 64 * 1000 + 4 * 10_000 + 2 * 4 * 640
    frozen = replace(shape, head_trained=False)
    assert logits_bytes(frozen, one, 64) == 8 * 64 * 1000 + 2 * 4 * 640


def _shape(**changes: Any) -> ModelShape:
    given = {
        "parameters": {"language": 10},
        "trained": {"language": 10},
        "tied": False,
        "head_trained": True,
        "embedding_trained": True,
        "language": None,
        **changes,
    }
    return ModelShape(**given)


def test_what_changes_the_plan(models: Callable[[str], Path]) -> None:
    path = models("qwen2_5_vl")
    adapter = adapter_of(path)
    load = Load(tokens=2048, rows=1024, patches=4096)

    def plan(**changes: Any) -> Any:
        options = options_of(path, **changes)
        return plan_memory(describe(options, adapter), options, load)

    whole = plan()
    assert whole.peak == whole.phases[whole.phase] == max(whole.phases.values())
    batch = {"activations", "logits chunk", "vision", "inputs"}
    assert whole.device.keys() == {"parameters", "gradients", "optimizer", "workspace"} | batch
    text, image = (plan(gradient_checkpointing=(part,)) for part in ("language", "vision"))
    assert text.device["activations"] < whole.device["activations"] and text.device["vision"] == whole.device["vision"]
    assert image.device["vision"] < whole.device["vision"]
    frozen = plan(freeze=("vision",))
    assert frozen.device["vision"] < whole.device["vision"] / 3
    # Budgets that are made from the figures per unit hold: what they say of the micro-batch covers the peak.
    static = sum(whole.device[kind] for kind in ("parameters", "gradients", "optimizer", "inputs"))
    assert whole.units.of(load) >= whole.phases["logits"] - static
    assert whole.units.of(load) >= whole.phases["language layers"] - static


def test_a_limit_in_bytes_is_one_of_tokens_patches_and_rows(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches that fill it are planned to take as much, whatever they are made of."""
    path = models("qwen2_5_vl")
    adapter, limit = adapter_of(path), 64 * 2**20
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 128 * 4 * len(adapter.tokenizer))
    predicted = predict(options_of(path, micro_batch=f"{limit / 2**30} GiB"), adapter)
    options = predicted.options
    room = options.micro_batch
    for tokens, patches, rows in ((700, 0, 350), (500, 800, 100), (100, 2000, 4)):
        size = options.size(tokens, patches, rows)
        share = room.bytes / size.bytes
        load = Load(int(share * tokens), int(share * rows), int(share * patches), micro_batches=1)
        units = predicted.memory(load).units
        assert replace(units, fixed=options.unit_bytes[3]).of(load) == pytest.approx(limit, rel=0.02)
    assert predict(options_of(path), adapter).options == options_of(path)
    with pytest.raises(ValueError, match="leave nothing for tokens"):
        predict(options_of(path, micro_batch=f"{1 / 2**12} GiB"), adapter)


CONFIG = """
output_dir: {folder}/run
steps: 2
model: {{path: {model}, dtype: float32}}
data: {{train: [{folder}/none.parquet], max_prompt_length: 64}}
rollout: {{num_generations: 4, max_completion_length: 32}}
learner: {{prompts_per_step: 4, micro_batch: 512}}
cluster: {{device: cpu}}
"""


def test_the_command(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("qwen2_5_vl")
    config, figures = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text(CONFIG.format(folder=tmp_path, model=model))
    result = CliRunner().invoke(app, ["plan", str(config), "learner.zero_stage=1", "--json", str(figures)])
    assert result.exit_code == 0, result.output
    for word in ("parameters", "gradients", "optimizer", "activations", "logits chunk", "vision", "ZeRO-1", "TFLOP"):
        assert word in result.output
    assert "Most of the peak" in result.output
    written = json.loads(figures.read_text())
    n = describe(options_of(model), adapter_of(model)).total
    assert written["device"]["parameters"] == 4 * n
    assert written["device"]["optimizer"] == 12 * n
    assert written["micro_batch"] == {"tokens": 384, "rows": 256, "patches": 512, "micro_batches": 2}
    options = options_of(model, zero_stage=2)
    fixed = plan_memory(describe(options, adapter_of(model)), options, Load(0, 2**20)).units.fixed  # a whole chunk
    gib = fixed / 2**30 + 0.011
    limited = [
        f"learner.micro_batch={gib} GiB",
        "--json",
        str(figures),
    ]
    result = CliRunner().invoke(app, ["plan", str(config), *limited])
    assert result.exit_code == 0, result.output
    units, load = (json.loads(figures.read_text())[name] for name in ("units", "micro_batch"))
    taken = sum(load[n] * units[u] for n, u in (("tokens", "token"), ("patches", "patch"), ("rows", "row")))
    groups = load["tokens"] / 192
    assert groups == round(groups) < 4 and taken * (1 + 1 / groups) + fixed > gib * 2**30
    assert taken + fixed <= gib * 2**30
    assert written["peak"] == max(written["phases"].values())
    assert written["flops"]["total"] == pytest.approx(sum(v for k, v in written["flops"].items() if k != "total"))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        # A group is 64 tokens of prompt, an image's 256 patches, and 4 completions of 32; a step has 4 of them.
        ("qwen2_5_vl", [], Load(4 * 192, 4 * 128, 4 * 256, 1)),
        ("qwen2_5_vl", ["learner.micro_batch=300"], Load(192, 128, 256, 4)),
        ("qwen2_5_vl", ["learner.micro_batch=600"], Load(2 * 192, 2 * 128, 2 * 256, 2)),  # 3 and 1, balanced
        ("qwen2_5_vl", ["learner.micro_batch=130"], Load(128, 64, 256, 8)),  # the prompt twice
        ("qwen2_5_vl", ["learner.ranks=3"], Load(2 * 192, 2 * 128, 2 * 256, 1)),  # of one rank that has two of them
        ("gemma3", ["learner.micro_batch=512"], Load(5 * 96, 5 * 32, 0, 4)),  # padded: images of two prompts
    ],
)
def test_micro_batches_are_those_of_the_run(
    models: Callable[[str], Path], tmp_path: Path, family: str, changes: list[str], expected: Load
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, model=models(family)).replace("512", "8192"))
    plan = make_plan(load_config(config, changes))
    if family == "gemma3":
        expected = replace(expected, patches=2 * sum(plan.group.images))
    assert plan.load == expected


def test_the_command_reports_all_problems(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, model=tmp_path / "no-model"))
    result = CliRunner().invoke(app, ["plan", str(config), "learner.zero_stag=1", "learner.ranks=0"])
    assert "zero_stag: unknown key" in str(result.exception) and "learner.ranks=0" in str(result.exception)
    result = CliRunner().invoke(app, ["plan", str(config)])
    assert "model.path" in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32, ZeRO-0, checkpointing", "bfloat16, ZeRO-2"])
def test_a_process_takes_what_is_predicted(name: str, tmp_path: Path) -> None:
    from bench.memory import CASES, compare

    result = compare(next(case for case in CASES if case.name == name), tmp_path)
    assert 0.85 <= result["ratio"] <= 1.15, result

"""`saccade merge`: write a model directory that transformers and vLLM can load, from a LoRA adapter or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from learner.durable import StorageError
from learner.engines.checkpoint import CheckpointError, read_weights
from learner.engines.export import ADAPTER_ORIGIN, save_policy
from learner.model.load import load_base, load_policy, wrap
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from saccade.checkpoints import DamagedError, read_state
from saccade.commands.merge_source import MergeError, adapter_in, check_source, is_checkpoint
from saccade.commands.peft_fields import field_problems
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import config_adapter, learner_options
from vlm.adapter import MultimodalAdapter
from vlm.config import Lora, ModelConfig
from vlm.families.registry import load_adapter

LIMIT_UNKNOWN = (
    "the adapter does not record an image token limit, so the merged processor has the base model's; if the "
    "adapter was trained with a limit, set it again wherever you use the model (here: model.max_image_tokens)"
)
"""The warning for an adapter that another program wrote, or that was saved before limits were recorded."""


def merge(source: Path, output: Path, *, model: str | None = None, trust_remote_code: bool = False) -> str:
    """Merge `source` into its base model, on the CPU, and write the result to the new directory `output`.

    saccade/commands/merge_source.py lists what `source` may be. `model` names the base model if it has moved. The
    weights are those that the run sent to its engines: a 4-bit base is merged as it was rounded. Returns a warning for
    the user, or an empty string. Raises MergeError, and AdapterError if the base model does not exist."""
    check_source(source, output)
    adapter = None if is_checkpoint(source) else adapter_in(source)
    if adapter is None:
        policy, family = _from_checkpoint(source, model, trust_remote_code)
    else:
        policy, family = _from_adapter(adapter, model, trust_remote_code)
    try:
        save_policy(policy, family, output, rank=0, with_adapter=False)
    except (OSError, ValueError, StorageError) as error:  # adapters on embeddings or a tied head; a full disk
        raise MergeError(f"{source} cannot be merged into {output}: {error}") from error
    known = adapter is None or "max_image_tokens" in _origin(adapter)
    return "" if known or "image" not in family.modalities else LIMIT_UNKNOWN


def _from_adapter(directory: Path, model: str | None, trust: bool) -> tuple[PolicyModule, MultimodalAdapter]:
    from peft import PeftModel, get_peft_model_state_dict

    config = _read(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise MergeError(
            f"{directory}: only LoRA adapters can be merged, and this is a {config.get('peft_type')!r} adapter"
        )
    if problems := field_problems(config):
        raise MergeError(f"{directory} is not a plain LoRA adapter and cannot be merged: " + "; ".join(problems))
    origin = _origin(directory)
    path = model or config.get("base_model_name_or_path")
    if not path:
        raise MergeError(f"{directory} does not say which model it was trained on; name it with --model")
    limit = origin.get("max_image_tokens")
    family = load_adapter(path, origin.get("adapter"), trust_remote_code=trust, max_image_tokens=limit)
    stored = str(getattr(family.model_config, "dtype", None)).removeprefix("torch.")
    base = ModelConfig(
        path,
        dtype=origin.get("dtype") or ("bfloat16" if stored in ("bfloat16", "float16") else "float32"),
        trust_remote_code=trust,
        lora=Lora(int(config.get("r") or 1), quantize=origin.get("quantize", "none")),
    )
    options = LearnerOptions(base, total_steps=1, device="cpu")
    try:
        adapted: Any = PeftModel.from_pretrained(load_base(options, family), str(directory))
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            stray = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
        policy = wrap(adapted, options, family)
    except (OSError, RuntimeError, ValueError) as error:
        raise MergeError(f"{directory} is not a LoRA adapter for the model at {path}: {error}") from error
    if stray:
        raise MergeError(
            f"{directory} does not fit the model at {path}: {len(stray)} tensors exist in only one of them, "
            f"first {min(stray)}"
        )
    return policy, family


def _from_checkpoint(directory: Path, model: str | None, trust: bool) -> tuple[PolicyModule, MultimodalAdapter]:
    try:
        saved = read_state(directory).get("config", {})
    except DamagedError as error:
        raise MergeError(f"{error}; use an earlier checkpoint") from error
    config = parse_config(saved, str(directory / "run.json"))
    base = replace(config.model, trust_remote_code=trust, path=model or config.model.path)
    learner = replace(config.learner, ranks=1, zero_stage=2, offload="none")
    config = config.model_copy(update={"model": base, "learner": learner})
    family = config_adapter(config)
    # Every part is loaded as if it were reached: adapters that the run did not have stay a change of zero.
    options = learner_options(config, "cpu", tuple(family.modalities))
    try:
        policy = load_policy(options, family)
        named = dict(policy.model.named_parameters())
        with torch.no_grad():
            for name, value in read_weights(directory / "learner"):
                if name not in named or named[name].shape != value.shape:
                    raise CheckpointError(f"the model at {config.model.path} has no {name} of shape {[*value.shape]}")
                named[name].copy_(value)
    except (OSError, ValueError) as error:
        raise MergeError(f"{directory}: {error}") from error
    return policy.to(getattr(torch, options.model.dtype)), family  # adapters too, as the run's engines got them


def _origin(directory: Path) -> dict[str, Any]:
    """Read what a run wrote beside the adapter; empty for an adapter that another program wrote."""
    path = directory / ADAPTER_ORIGIN
    return _read(path) if path.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MergeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path} does not contain a JSON object")
    return content


__all__ = ["ConfigError", "MergeError", "merge"]

"""What a saved LoRA adapter may say of itself: each field of peft's LoraConfig is either merged as peft merges it, or
refused by name.

A test walks over the fields of the pinned peft, so that a new one is looked at, and another compares each merged field
with peft's own merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MERGED = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
    ]
)
"""Fields that the merge reproduces whatever they are, or that say nothing of the weights by themselves."""

STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa", "olora")
"""Values of init_lora_weights from which an adapter can be merged: the last two change the base by the same rule each
time that it is loaded. The others need data, chance or a quantized base for that."""

_SEVERAL = "it trains other weights than those of the adapter"
_OTHER = "it is another computation than a product of two matrices beside a linear layer"
REFUSED = {
    "lora_bias": "its biases can be added to layers that have one only",
    "alora_invocation_tokens": "aLoRA switches the adapter on behind certain tokens, and no single model does that",
    "modules_to_save": _SEVERAL,
    "trainable_token_indices": _SEVERAL,
    "target_parameters": "it is on parameters that are no linear layer's",
    "ensure_weight_tying": "its adapters are on embeddings",
    "layer_replication": "it is for a model with more layers than the base",
    "megatron_config": "it is for layers of Megatron",
    "use_dora": _OTHER,
    "use_qalora": _OTHER,
    "use_bdlora": _OTHER,
    "arrow_config": _OTHER,
    "kasa_config": _OTHER,
    "monteclora_config": _OTHER,
    "velora_config": _OTHER,
    "loftq_config": "its base was rounded in a way that is not repeated here",
    "corda_config": "it was begun from data",
    "lora_ga_config": "it was begun from data",
}
"""Field -> why an adapter that sets it is not merged."""


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """One text for each field of an adapter_config.json with which the adapter cannot be merged."""
    found = []
    for name, value in config.items():
        if name in MERGED or not value:
            continue
        why = REFUSED.get(name, "the installed peft does not know it")
        found.append(f"{name}={value!r}: {why}")
    start = config.get("init_lora_weights")
    if start not in STARTS:
        found.append(
            f"init_lora_weights={start!r}: it changed the base, which cannot be repeated; save the adapter with peft's "
            "path_initial_model_for_weight_conversion, and merge that"
        )
    return found

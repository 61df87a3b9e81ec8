"""The fields of a saved LoRA adapter: each field of peft's LoraConfig is either merged as peft merges it, or refused by
name.

One test goes through all fields of the pinned peft, so that nobody overlooks a new one. Another compares each merged
field with peft's own merge.
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
"""Fields that the merge reproduces for any value, or that do not affect the weights."""

STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa", "olora")
"""Values of init_lora_weights that can be merged. The last two change the base by the same rule each time it is loaded.
All other values change it by data, by chance, or by quantization."""

_SEVERAL = "it also trains weights outside the adapter"
_OTHER = "it computes something other than a product of two matrices beside a linear layer"
REFUSED = {
    "lora_bias": "its biases can be added only to layers that have a bias",
    "alora_invocation_tokens": "aLoRA switches the adapter on after certain tokens, which a merged model cannot do",
    "modules_to_save": _SEVERAL,
    "trainable_token_indices": _SEVERAL,
    "target_parameters": "it adapts parameters that do not belong to a linear layer",
    "ensure_weight_tying": "it adapts embeddings",
    "layer_replication": "it needs a model with more layers than the base",
    "megatron_config": "it adapts Megatron layers",
    "use_dora": _OTHER,
    "use_qalora": _OTHER,
    "use_bdlora": _OTHER,
    "arrow_config": _OTHER,
    "kasa_config": _OTHER,
    "monteclora_config": _OTHER,
    "velora_config": _OTHER,
    "loftq_config": "its base was quantized in a way that the merge cannot repeat",
    "corda_config": "it was initialised from data",
    "lora_ga_config": "it was initialised from data",
}
"""Field -> why an adapter that sets it cannot be merged."""


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one message for each field of adapter_config.json that prevents the merge."""
    found = []
    for name, value in config.items():
        if name in MERGED or not value:
            continue
        why = REFUSED.get(name, "the installed peft does not know it")
        found.append(f"{name}={value!r}: {why}")
    start = config.get("init_lora_weights")
    if start not in STARTS:
        found.append(
            f"init_lora_weights={start!r}: it changed the base in a way that cannot be repeated; save the "
            "adapter with peft's path_initial_model_for_weight_conversion and merge that"
        )
    return found

"""Fields of peft's LoraConfig as knobs. Modules are named by their part of the model: the family knows the layers."""

from __future__ import annotations

from typing import Any, get_args

from saccade.trainer.fields import Fields, Knobs
from vlm.parameter_names import LoraRole

SAME = {"r": "model.lora.rank", "lora_alpha": "model.lora.alpha"}
"""Field -> the knob that takes its value."""
HONOURED = frozenset(
    ["task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"]
)
"""Fields that say what the adapter is for, and nothing of its weights."""


def carry_over(given: Any) -> tuple[Knobs, list[str]]:
    """The knobs of a LoraConfig, or of a dictionary of its fields, and what cannot be carried over."""
    fields = Fields(given, {"r": 8, "lora_alpha": 8, "target_modules": None}, "peft_config")
    knobs: Knobs = {knob: fields[field] for field, knob in SAME.items()}
    roles, problems, named = get_args(LoraRole), [], fields["target_modules"]
    if named is not None:
        targets = [named] if isinstance(named, str) else list(named)
        if unknown := sorted(set(targets) - set(roles)):
            problems.append(
                f"peft_config.target_modules={unknown}: name parts of the model instead of modules: {', '.join(roles)}"
            )
        knobs["model.lora.targets"] = [role for role in roles if role in targets]
    return knobs, [*problems, *fields.refused(HONOURED)]

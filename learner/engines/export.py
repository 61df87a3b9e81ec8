"""The trained policy in Hugging Face format, which `transformers` and `vllm` load."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch

from learner.durable import atomic_directory
from learner.engines.checkpoint import check_finite
from learner.model.policy import PolicyModule
from vlm.adapter import MultimodalAdapter
from vlm.families.registry import ADAPTERS
from vlm.publish import publish_saved_model
from vlm.user_code import name_of
from weight_sync.source import PolicySource, gathered

ADAPTER_ORIGIN = "saccade.json"
"""The file beside a saved adapter that describes its base beyond peft's own configuration."""


def save_policy(
    policy: PolicyModule, adapter: MultimodalAdapter, directory: Path, *, rank: int, with_adapter: bool = True
) -> None:
    """Write model (LoRA merged), configuration, tokenizer, processor and chat template into `directory`, replacing what
    was there. With LoRA the peft adapter goes into `directory/adapter`, unless `with_adapter` is False.

    Collective: under ZeRO-3 every rank takes part in gathering, parameter by parameter. Rank 0 holds the whole model in
    CPU memory and writes. If a weight is not finite, rank 0 raises NotFiniteError, and what was there stays."""
    with torch.no_grad():
        weights = {
            name: tensor.cpu().clone() if rank == 0 else torch.empty(0) for name, tensor in PolicySource(policy.model)
        }
        lora = {}
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name and with_adapter:
                with gathered([parameter]):
                    lora[name] = parameter.detach().cpu().clone()
    if rank == 0:
        for name, tensor in [*weights.items(), *lora.items()]:
            check_finite(name, tensor, directory)
    needed = sum(tensor.nbytes for tensor in [*weights.values(), *lora.values()]) if rank == 0 else 0
    with atomic_directory(directory, needed=needed) if rank == 0 else nullcontext() as partial:
        if partial is None:
            return
        policy.base.save_pretrained(partial, state_dict=weights)
        publish_saved_model(partial, adapter, policy.base)
        adapter.processor.save_pretrained(partial)
        if lora:
            for config in policy.model.peft_config.values():
                if Path(config.base_model_name_or_path or "").is_dir():  # so that it is found from any folder
                    config.base_model_name_or_path = str(Path(config.base_model_name_or_path).absolute())
            policy.model.save_pretrained(partial / "adapter", state_dict=lora)
            family = type(adapter)
            origin = {
                "adapter": None if family in ADAPTERS.values() else name_of(family),
                "dtype": str(policy.base.get_output_embeddings().weight.dtype).removeprefix("torch."),
                "max_image_tokens": adapter.image_limit,
                "quantize": "nf4" if getattr(policy.base, "is_loaded_in_4bit", False) else "none",
            }
            (partial / "adapter" / ADAPTER_ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")

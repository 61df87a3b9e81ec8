"""Loading the model to train: precision, what is frozen, LoRA."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from learner.attention import IMPLEMENTATION, register
from learner.policy import PolicyModule
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter


def load_policy(options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    """The policy to train, on the CPU (or partitioned, if DeepSpeed's ZeRO-3 configuration is in force).

    Raises ValueError naming what LoRA or freezing did not find in the model."""
    model = _load(options, adapter)
    if options.freeze_vision and all(adapter.role(name) != "vision" for name, _ in model.named_parameters()):
        raise ValueError(f"freeze_vision: {type(adapter).__name__} knows no vision tower in {type(model).__name__}")
    if options.lora_rank:
        model = _with_lora(model, options, adapter)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_trained(name, options, adapter))
    _disable_dropout(model)
    policy = _wrap(model, options, adapter).train()
    if options.gradient_checkpointing:
        _checkpoint(policy.base, options.gradient_checkpointing, adapter)
    return policy


def load_reference(options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    """The frozen initial policy."""
    return _wrap(_load(options, adapter).requires_grad_(False), options, adapter).eval()


def _load(options: LearnerOptions, adapter: MultimodalAdapter) -> Any:
    model = adapter.model_class().from_pretrained(
        options.model,
        dtype=getattr(torch, options.dtype),
        attn_implementation="sdpa",
        trust_remote_code=options.trust_remote_code,
    )
    if adapter.shares_prompts:
        register()
        nested = "text_config" in type(model.config).sub_configs
        model.set_attn_implementation({"text_config": IMPLEMENTATION} if nested else IMPLEMENTATION)
    adapter.prepare_model(model)
    return model


def _wrap(model: Any, options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    return PolicyModule(
        model,
        adapter,
        temperature=options.temperature,
        chunk_rows=options.logprob_chunk_rows,
        media_kinds=options.media_kinds,
        attention=options.attention,
    )


def _is_trained(name: str, options: LearnerOptions, adapter: MultimodalAdapter) -> bool:
    """Whether a parameter has a gradient: not what is frozen, nor what no batch or no output ever depends on."""
    role = adapter.role(name)
    sees, hears = bool({"image", "video"} & set(options.media_kinds)), "audio" in options.media_kinds
    reached = {"vision": sees and not options.freeze_vision, "projector": sees, "audio": hears}.get(role, True)
    return reached and adapter.is_used(name)


def _with_lora(model: Any, options: LearnerOptions, adapter: MultimodalAdapter) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = [name for name in linear if name.rpartition(".")[2] in options.lora_targets]
    chosen = [name for name in named if _is_trained(f"{name}.weight", options, adapter)]
    if not chosen:
        have = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"no layer is called {' or '.join(options.lora_targets)} (lora_targets); there are {have}")
    if any(model.get_submodule(name) is model.get_output_embeddings() for name in chosen):
        raise ValueError("lora_targets names the output head, which log-probabilities are computed from directly")
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=chosen, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)  # the same A on every rank
        return get_peft_model(model, config)


def _checkpoint(model: Any, roles: Collection[str], adapter: MultimodalAdapter) -> None:
    """Recompute layers in the backward pass, those of the parts of the model with one of `roles`.

    Non-reentrant: the head and the tower may then run on inputs without a gradient, and ZeRO sees each gradient
    once."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = adapter.role(f"{name}.") in roles


def _disable_dropout(model: nn.Module) -> None:
    """The engine samples without dropout; with it, the learner's log-probabilities would be another policy's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010

"""Loading the model to train: precision, what is frozen, LoRA and QLoRA."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from learner.model.attention import IMPLEMENTATION, register
from learner.model.policy import PolicyModule
from learner.model.quantize import quantize_linear_layers
from learner.model.windows import attend_windows_at_once
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.parameter_names import part_of


def load_policy(options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    """The policy to train, on the CPU (or partitioned, if DeepSpeed's ZeRO-3 configuration is in force).

    Raises ValueError naming what LoRA or freezing did not find in the model, or that bitsandbytes is missing."""
    if problems := adapter.part_problems(options.model.freeze, options.model.lora_targets, options.media_kinds):
        raise ValueError("; ".join(problems))
    model = load_base(options, adapter)
    parts = {adapter.role(name) for name, _ in model.named_parameters()}
    if absent := set(options.model.freeze) - parts:
        raise ValueError(f"freeze: {type(adapter).__name__} finds no {', '.join(absent)} in {type(model).__name__}")
    model = select_trained(model, options, adapter)
    _disable_dropout(model)
    policy = wrap(model, options, adapter).train()
    if options.learner.gradient_checkpointing:
        _checkpoint(policy.base, options.learner.gradient_checkpointing, adapter)
    return policy


def select_trained(model: Any, options: LearnerOptions, adapter: MultimodalAdapter) -> Any:
    """`model` with gradients where they are wanted, or a peft model around it whose adapters alone have them. Raises
    ValueError for LoRA targets that it has no layers of."""
    if (lora := options.model.lora) is not None:
        chosen = _targets(model, options, adapter)
        return with_lora(model, chosen, rank=lora.rank, alpha=lora.alpha, seed=options.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, options, adapter))
    return model


def load_reference(options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    """The frozen initial policy."""
    return wrap(load_base(options, adapter).requires_grad_(False), options, adapter).eval()


def load_base(options: LearnerOptions, adapter: MultimodalAdapter) -> Any:
    """The Hugging Face model as it lies in `model.path`, quantized if that is asked for."""
    model = adapter.model_class().from_pretrained(
        options.model.path,
        dtype=getattr(torch, options.model.dtype),
        attn_implementation="sdpa",
        trust_remote_code=options.model.trust_remote_code,
    )
    if adapter.shares_prompts:
        register()
        nested = "text_config" in type(model.config).sub_configs
        model.set_attn_implementation({"text_config": IMPLEMENTATION} if nested else IMPLEMENTATION)
    if options.device == "cuda" and options.model.dtype == "bfloat16":
        attend_windows_at_once(model)
    adapter.prepare_model(model)
    if options.model.quantize == "nf4":
        quantize_linear_layers(model, [name for names in adapter.linear_layers(model).values() for name in names])
    return model


def wrap(model: Any, options: LearnerOptions, adapter: MultimodalAdapter) -> PolicyModule:
    """`model`, or a peft model around it, as the module that gives log-probabilities."""
    return PolicyModule(
        model,
        adapter,
        temperature=options.rollout.temperature,
        media_kinds=options.media_kinds,
    )


def _is_trained(name: str, options: LearnerOptions, adapter: MultimodalAdapter) -> bool:
    """Whether a parameter has a gradient: not what is frozen, nor what no batch or no output ever depends on."""
    role = adapter.role(name)
    return role not in options.model.freeze and role in adapter.reached(options.media_kinds) and adapter.is_used(name)


def _targets(model: Any, options: LearnerOptions, adapter: MultimodalAdapter) -> list[str]:
    """Names of the linear layers that get adapters. Raises ValueError for a role that the model has no layer of."""
    layers = adapter.linear_layers(model)
    if absent := [role for role in options.model.lora_targets if role not in layers]:
        raise ValueError(
            f"lora.targets: {type(model).__name__} has no linear layers of {' or '.join(absent)}; it has "
            f"{', '.join(layers)}"
        )
    reached = adapter.reached(options.media_kinds)
    return [name for role in options.model.lora_targets if part_of(role) in reached for name in layers[role]]


def with_lora(model: Any, layers: Sequence[str], *, rank: int, alpha: float, seed: int = 0) -> Any:
    """A peft model with new LoRA adapters on `layers`; they alone are trained, and begin as a change of zero.

    Raises ValueError naming the layers where peft put none, or put one that is not asked for."""
    from peft import LoraConfig, get_peft_model

    if not layers:
        raise ValueError(f"lora.targets: none of the linear layers of {type(model).__name__} is chosen")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same A on every rank
        adapted = get_peft_model(model, config)
    bound = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "base_layer")}
    if wrong := sorted(bound ^ set(layers)):
        raise ValueError(
            f"lora.targets: peft's adapters and the layers chosen for them differ in {len(wrong)} of {len(layers)} "
            f"layers: {', '.join(wrong[:5])}"
        )
    return adapted


def _checkpoint(model: Any, roles: Collection[str], adapter: MultimodalAdapter) -> None:
    """Recompute layers in the backward pass, those of the parts of the model with one of `roles`.

    Non-reentrant: the head and the tower may then run on inputs without a gradient, and ZeRO sees each gradient
    once. Outputs of embeddings and of the tower's first layer need none either: with one, as transformers then gives
    them, a backward pass would go through towers that are frozen."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
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

"""Find the part of the model that a parameter belongs to, and its name in the engine, from the parameter's name.

The configuration reads the names of the parts here, so this module loads without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

from vlm.errors import AdapterError
from vlm.media.types import MediaKind

Part = Literal["vision", "projector", "audio", "language"]
LoraRole = Literal["language.attention", "language.mlp", "projector", "vision", "audio"]
DEFAULT_LORA_TARGETS: tuple[LoraRole, ...] = ("language.attention", "language.mlp")
THROUGH = {"vision": {"image", "video"}, "projector": {"image", "video"}, "audio": {"audio"}}
"""The kinds of media that each part is for."""


def part_of(role: str) -> str:
    """`language.mlp` belongs to the part `language`; the other roles are whole parts."""
    return role.partition(".")[0]


def tower_part(kind: MediaKind) -> str:
    """The part that is the tower of a kind of media."""
    return "audio" if kind in THROUGH["audio"] else "vision"


class ParameterNames:
    """The part of `MultimodalAdapter` that goes by names of parameters and modules."""

    modalities: ClassVar[Mapping[MediaKind, Any]] = {}
    engine_name_parts: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Parts of parameter names that the engine spells differently, as (trainer's, engine's)."""
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower.", "model.vision_model.", "model.visual."),
        "projector": (
            "model.multi_modal_projector.",
            "model.connector.",
            "model.image_newline",
            "model.visual.merger.",
            "model.visual.deepstack_merger_list.",
        ),
    }
    """Part of the model -> beginnings of the names of its parameters. All other parameters are `language`."""
    language_layers: ClassVar[Mapping[str, str]] = {"language.attention": ".self_attn.", "language.mlp": ".mlp."}
    """LoRA role -> a text that the names of its linear layers in the language model contain."""
    not_adapted: ClassVar[Mapping[str, str]] = {}
    """LoRA role -> why this family has no adapters for it."""

    # ------------------------------------------------------------------ the engine's names

    def engine_weight_name(self, name: str) -> str | None:
        """The engine's name of the trainer's parameter `name`. None for a parameter that affects nothing the model
        computes, which the engine therefore does not have."""
        return self.published_weight_name(name)

    def is_used(self, name: str) -> bool:
        """Whether the parameter `name` affects anything that the model computes."""
        return self.engine_weight_name(name) is not None

    def published_weight_name(self, name: str) -> str:
        """The name of a parameter in published checkpoints of the family, which the engine loads."""
        for trainer, engine in self.engine_name_parts:
            if trainer in name and engine not in name:
                return name.replace(trainer, engine, 1)
        return name

    # ------------------------------------------------------------------ parts of the model

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the family has: `language`, and those of `roles` that its media run through."""
        return self.reached(self.modalities)

    def reached(self, kinds: Collection[str]) -> tuple[str, ...]:
        """Parts that prompts with media of `kinds` run through."""
        there = set(kinds) & set(self.modalities)
        return ("language", *(part for part in self.roles if part not in THROUGH or THROUGH[part] & there))

    def role(self, name: str) -> str:
        """The part of the model that a parameter or module belongs to, by the longest matching beginning in `roles`."""
        fitting = [(len(p), role) for role, prefixes in self.roles.items() for p in prefixes if name.startswith(p)]
        return max(fitting, default=(0, "language"))[1]

    def lora_role(self, name: str) -> str:
        """The LoRA role (`LoraRole`) of the linear layer called `name`.

        Raises AdapterError for a layer of the language model that is neither attention nor mlp by its name."""
        part = self.role(f"{name}.weight")
        if part != "language":
            return part
        for role, mark in self.language_layers.items():
            if mark in f".{name}.":
                return role
        raise AdapterError(
            f"{type(self).__name__}: is the linear layer {name} of the language model's attention or of its mlp? Say "
            "so in `language_layers`, or in `lora_role`"
        )

    def linear_layers(self, model: Any) -> dict[str, tuple[str, ...]]:
        """LoRA role -> names of its linear layers in `model`, a Hugging Face model as loaded: all that affect anything
        computed, except the output head."""
        from torch import nn
        from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

        found: dict[str, tuple[str, ...]] = {}
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            # torch's MultiheadAttention uses the weight of its output layer without calling the layer. An adapter there
            # would change what is merged, but not what is computed. torch marks the layer by this class.
            bypassed = isinstance(module, NonDynamicallyQuantizableLinear)
            if isinstance(module, nn.Linear) and not bypassed and module is not head and self.is_used(f"{name}.weight"):
                role = self.lora_role(name)
                found[role] = (*found.get(role, ()), name)
        return found

    def part_problems(self, freeze: Sequence[str], lora_targets: Sequence[str], kinds: Collection[str]) -> list[str]:
        """Reasons why this family cannot be trained with `freeze` and with LoRA on `lora_targets` (empty: full weights)
        on data with media of `kinds`."""
        family, parts, found = type(self).__name__, self.parts, []
        if absent := [part for part in freeze if part not in parts]:
            found.append(f"freeze: {family} has no {' and no '.join(absent)}; it has {', '.join(parts)}")
        if absent := [role for role in lora_targets if part_of(role) not in parts]:
            found.append(f"lora.targets: {family} has no {' and no '.join(absent)}; {self._targets()}")
        for role in lora_targets:
            if role in self.not_adapted:
                found.append(f"lora.targets: {family}, {role}: {self.not_adapted[role]}; {self._targets()}")
        wanted = [part_of(role) for role in lora_targets] or parts
        if not found and not [part for part in self.reached(kinds) if part in wanted and part not in freeze]:
            left = f"LoRA is on {', '.join(lora_targets)}" if lora_targets else f"frozen: {', '.join(freeze)}"
            media = ", ".join(kinds) or "none"
            found.append(f"freeze or lora.targets: nothing would be trained: {left}; media of the data: {media}")
        return found

    def _targets(self) -> str:
        roles = (*self.language_layers, *(part for part in self.parts if part != "language"))
        return f"choose from {', '.join(role for role in roles if role not in self.not_adapted)}"

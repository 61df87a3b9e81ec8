"""Names of the parts of a model: those that can be frozen, and those that LoRA adapters can be put on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Part = Literal["vision", "projector", "audio", "language"]
LoraRole = Literal["language.attention", "language.mlp", "projector", "vision", "audio"]
DEFAULT_LORA_TARGETS: tuple[LoraRole, ...] = ("language.attention", "language.mlp")


def part_of(role: str) -> str:
    """`language.mlp` is of the part `language`; the other roles are whole parts."""
    return role.partition(".")[0]


def role_problems(freeze: Sequence[str], lora_rank: int, lora_targets: Sequence[str]) -> list[str]:
    """What contradicts itself whatever the family of the model; `MultimodalAdapter.part_problems` has the rest."""
    found = []
    if set(freeze) == set(get_args(Part)):
        found.append("freeze names every part of a model: nothing would be trained")
    if lora_rank and not lora_targets:
        found.append(f"lora_targets is empty with lora_rank={lora_rank}: nothing would be trained")
    both = [role for role in lora_targets if part_of(role) in freeze]
    if lora_rank and both:
        found.append(
            f"lora_targets names {', '.join(both)}, which freeze={', '.join(freeze)} rules out; take one of them away "
            "(with LoRA everything that is no target stays as it is)"
        )
    return found

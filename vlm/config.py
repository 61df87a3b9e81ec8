"""The section `model`: which model, and what of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, MinLen

from vlm.parameter_names import DEFAULT_LORA_TARGETS, LoraRole, Part, part_of
from vlm.section import Before, ListOfOne, section, short


def _at_home(path: Any) -> Any:
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


@section
class Lora:
    rank: Annotated[int, Ge(1)] = 16
    """Rank of the adapter. Switched off, it is the reference policy, so that no second copy of the model is held."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """LoRA scale: updates are scaled by alpha / rank."""
    targets: Annotated[tuple[LoraRole, ...], ListOfOne] = DEFAULT_LORA_TARGETS
    """Parts of the model whose linear layers get an adapter: language.attention, language.mlp, projector, vision,
    audio. The family's adapter knows the layers."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: QLoRA. The base weights of the linear layers are held in 4 bits, and adapters trained over them; the engines
    sample with the same rounded weights. Needs the package bitsandbytes."""


@section
class ModelConfig:
    path: Annotated[str, MinLen(1), Before(_at_home)]
    """Model to train: a directory in Hugging Face format, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of engine and learner. bfloat16 keeps float32 master weights and a float32 loss."""
    adapter: str | None = None
    """Adapter of a model family of your own, as package.module:Class (file.py:Class); by model_type otherwise."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    lora: Annotated[Lora | None, short("rank")] = None
    """A LoRA adapter that is trained instead of the full weights; a number is its rank."""
    max_image_tokens: Annotated[int, Ge(1)] | None = None
    """Tokens that an image may take: the processors of engine and learner shrink larger ones, or cut them into fewer
    tiles. null: as the model's own processor has it. docs/data.md says which families can."""
    freeze: Annotated[tuple[Part, ...], ListOfOne] = ()
    """Parts that stay as they are when the full weights are trained: vision, projector, audio, language."""

    @property
    def quantize(self) -> Literal["none", "nf4"]:
        """How the base weights are held."""
        return "none" if self.lora is None else self.lora.quantize

    @property
    def lora_targets(self) -> tuple[LoraRole, ...]:
        """The roles whose layers get an adapter; empty without LoRA."""
        return () if self.lora is None else self.lora.targets


def role_problems(model: ModelConfig) -> list[str]:
    """Contradictions that do not depend on the family of the model; `MultimodalAdapter.part_problems` has the
    others."""
    found = []
    if set(model.freeze) == set(get_args(Part)):
        found.append("freeze names every part of a model: nothing would be trained")
    if model.lora is not None and not model.lora.targets:
        found.append("lora.targets is empty: nothing would be trained")
    if both := [role for role in model.lora_targets if part_of(role) in model.freeze]:
        found.append(
            f"lora.targets names {', '.join(both)}, which freeze={', '.join(model.freeze)} rules out; take one of them "
            "away (with LoRA everything that is not a target stays as it is)"
        )
    return found

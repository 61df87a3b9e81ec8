"""The outputs of towers, as the language model takes them: computed, repeated, cut into rows and joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm.encoding import EncodedPrompt, FeatureRow, Modality
from vlm.media.types import MediaKind
from vlm.tower_end import TowerEnd


class TowerOutputs:
    """The part of `MultimodalAdapter` that is about outputs of towers. Their `pooler_output` has one entry per row; a
    row is an item, or one of its tiles."""

    model_config: Any
    modalities: ClassVar[Mapping[MediaKind, Modality]] = {}
    tower: ClassVar[str | None] = None
    """The module of the backbone that images and videos go through before the projector. Only its last hidden state is
    used, or those of `vision_feature_layer`. None: not known; the tower then runs in every pass unless its projector is
    frozen too."""
    tower_dimension: ClassVar[int] = 0
    """The dimension of the tower's output along which items (or their tiles, or patches) follow one another."""

    def media_features(self, backbone: Any, kind: MediaKind, inputs: Mapping[str, Tensor]) -> Any:
        """Run a tower. The `pooler_output` of the result has one entry per row (`feature_rows`)."""
        return getattr(backbone, self.modalities[kind].features)(**inputs, return_dict=True)

    def tower_end(self, backbone: Any) -> TowerEnd | None:
        """The point at which the tower of images and videos hands over to the projector; None: not known (`tower`)."""
        if self.tower is None:
            return None
        return TowerEnd((getattr(backbone, self.tower),), layers=self.tower_layers())

    def knows_tower_end(self) -> bool:
        """Whether `tower_end` is known for the family, without a model to ask."""
        return self.tower is not None or type(self).tower_end is not TowerOutputs.tower_end

    def tower_layers(self) -> tuple[int, ...]:
        """Layers of the tower whose hidden states go to the projector. Empty: its last hidden state goes there, which
        may have been normalised once more."""
        layers = getattr(self.model_config, "vision_feature_layer", ())
        return tuple(layers) if isinstance(layers, list | tuple) else (layers,)

    def join_tower_outputs(self, rows: Sequence[FeatureRow]) -> FeatureRow:
        """Join the tower outputs (`TowerEnd.collecting`) of single items into those of all items together."""
        return tuple(torch.cat(parts, self.tower_dimension) for parts in zip(*rows, strict=True))

    def feature_rows(self, prompt: EncodedPrompt, kind: MediaKind) -> int:
        """The number of rows of features that belong to a prompt: one per item, or per tile."""
        return prompt.counts.get(kind, 0)

    def repeat_features(self, features: Any, index: Tensor) -> None:
        """Replace features (of `media_features`) by those at `index` int64 `[n]`, in place."""
        values = features.pooler_output
        features.pooler_output = values[index] if isinstance(values, Tensor) else [values[i] for i in index]

    def cut_features(self, features: Any) -> list[FeatureRow]:
        """Cut features (of `media_features`) into rows, without anything else that the output holds."""
        values = features.pooler_output
        return [(row,) for row in (values.split(1) if isinstance(values, Tensor) else values)]

    def join_features(self, rows: Sequence[FeatureRow]) -> Any:
        """The inverse of `cut_features`, for one row or more."""
        return BaseModelOutputWithPooling(pooler_output=join_entries([row[0] for row in rows]))


def join_entries(values: Sequence[Tensor]) -> Any:
    """Entries as a tower gives them: `[1, tokens, H]`, of one tensor, or each `[tokens, H]` of its own length."""
    return torch.cat(list(values)) if values[0].ndim == 3 else list(values)

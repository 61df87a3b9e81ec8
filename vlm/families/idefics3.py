"""Idefics3 and SmolVLM: an image is cut into tiles, each announced by a token that names its row and column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Counts, EncodedPrompt, Modality
from vlm.media.types import MediaKind


def place_patches_as_vllm(embeddings: Any) -> None:
    """Make the tower compute the positions of its patches in float32, whatever its precision. transformers multiplies
    by a rounded step and compares in the precision of the weights, which misplaces patches of large tiles."""

    def forward(pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + embeddings.position_embedding(
            patch_places(patch_attention_mask, embeddings.num_patches_per_side)
        )

    embeddings.forward = forward


def patch_places(mask: Tensor, side: int) -> Tensor:
    """Return int64 `[B, H W]`: the position of each patch of an image in a grid of `side` x `side` positions, and 0
    where `mask` `[B, H, W]` is False. Patch n of m is at the position that contains n / m of the side."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=mask.device)

    def places(count: Tensor, patches: int) -> Tensor:
        along = torch.arange(patches, device=mask.device)[None] / count.clamp(min=1)[:, None]
        return torch.bucketize(along, boundaries, right=True)

    rows, columns = places(mask[:, :, 0].sum(1), mask.shape[1]), places(mask[:, 0, :].sum(1), mask.shape[2])
    return torch.where(mask, rows[:, :, None] * side + columns[:, None, :], 0).flatten(1)


class Idefics3Adapter(MultimodalAdapter):
    """Takes `pixel_values [B, tiles, 3, H, W]` and `pixel_attention_mask [B, tiles, H, W]`, with one entry per *prompt*
    with images. Zeros pad them to the largest number of tiles; the model ignores these."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "pixel_attention_mask")),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<fake_token_around_image>", "<global-img>")
    nested_images: ClassVar[bool] = True
    tower: ClassVar[str | None] = "vision_model"
    shares_prompts: ClassVar[bool] = True
    images_alone: ClassVar[bool] = False

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        tiles = [i for t, i in self.tokenizer.get_vocab().items() if t.startswith("<row_") and t.endswith(">")]
        return tuple(sorted((*super().banned_token_ids, *tiles)))

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Return longest edges to which images are scaled (up or down) before they are cut into tiles, with one tile
        less along the edge each time."""
        images = self.processor.image_processor
        tile, now = int(images.max_image_size["longest_edge"]), int(images.size["longest_edge"])
        for count in range((now - 1) // tile, 0, -1):
            yield {"size": {"longest_edge": count * tile}}

    def entries(
        self, name: str, inputs: Mapping[str, Tensor], input_ids: Sequence[Tensor], counts: Sequence[Counts]
    ) -> list[int]:
        return [min(1, n) for n in super().entries(name, inputs, input_ids, counts)]

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        return {name: value[:, : self._tiles(input_ids)] for name, value in inputs.items()}

    def feature_rows(self, prompt: EncodedPrompt, kind: MediaKind) -> int:
        return self._tiles(prompt.input_ids)

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        return super().without_bookkeeping({k: v for k, v in outputs.items() if k not in ("rows", "cols")})

    def prepare_model(self, model: Any) -> None:
        place_patches_as_vllm(model.base_model.vision_model.embeddings)

    def _tiles(self, input_ids: Tensor) -> int:
        return input_ids.tolist().count(self.placeholder_ids["image"]) // int(self.processor.image_seq_len)

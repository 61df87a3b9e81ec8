"""Idefics3 and SmolVLM: an image is cut into tiles, each announced by a token that names its row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from rollout.types import MediaKind
from vlm.adapter import MultimodalAdapter
from vlm.encoded import Counts, EncodedPrompt, Modality


class Idefics3Adapter(MultimodalAdapter):
    """`pixel_values [B, tiles, 3, H, W]` and `pixel_attention_mask [B, tiles, H, W]`, one entry per *prompt* with
    images, padded to the most tiles of any with zeros, which the model leaves out."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "pixel_attention_mask")),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<fake_token_around_image>", "<global-img>")
    nested_images: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = True

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        tiles = [i for t, i in self.tokenizer.get_vocab().items() if t.startswith("<row_") and t.endswith(">")]
        return tuple(sorted((*super().banned_token_ids, *tiles)))

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

    def _tiles(self, input_ids: Tensor) -> int:
        return input_ids.tolist().count(self.placeholder_ids["image"]) // int(self.processor.image_seq_len)

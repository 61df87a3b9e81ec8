"""Idefics3 and SmolVLM: an image is cut into tiles, each announced by a token that names its row and column."""

from __future__ import annotations

from typing import Any, ClassVar

from vlm.adapter import EncodedPrompt, MultimodalAdapter


class Idefics3Adapter(MultimodalAdapter):
    """`pixel_values [B, tiles, 3, H, W]` and `pixel_attention_mask [B, tiles, H, W]`, one entry per *prompt*, padded to
    the most tiles of any with zeros, which the model leaves out."""

    image_token: ClassVar[str] = "<image>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<fake_token_around_image>", "<global-img>")
    image_kwargs: ClassVar[tuple[str, ...]] = ("pixel_attention_mask",)
    nested_images: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = True

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        tiles = [i for t, i in self.tokenizer.get_vocab().items() if t.startswith("<row_") and t.endswith(">")]
        return tuple(sorted((*super().banned_token_ids, *tiles)))

    def feature_rows(self, prompt: EncodedPrompt) -> int:
        return prompt.input_ids.tolist().count(self.image_token_id) // int(self.processor.image_seq_len)

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in super().without_bookkeeping(outputs).items() if k not in ("rows", "cols")}

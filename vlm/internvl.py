"""InternVL (in transformers' own format): one to many tiles an image, a fixed number of tokens each."""

from __future__ import annotations

from typing import ClassVar

from vlm.adapter import EncodedPrompt, MultimodalAdapter


class InternVLAdapter(MultimodalAdapter):
    """`pixel_values [tiles, 3, H, W]`; nothing but the number of placeholders tells how many tiles a prompt has."""

    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    shares_prompts: ClassVar[bool] = True

    def feature_rows(self, prompt: EncodedPrompt) -> int:
        return prompt.input_ids.tolist().count(self.image_token_id) // int(self.model_config.image_seq_length)

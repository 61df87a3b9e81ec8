"""MultimodalAdapter: everything that differs between model families, behind one class.

    messages ──render──▶ text ──tokenize──▶ ids ──▶ engine (expands placeholders itself)
                                             └─encode(+ images)──▶ Sample (expanded ids, model inputs) ──join──▶ batch

The engine and the learner must see the same expanded ids and the same pixels; an adapter is where that is arranged.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from rollout.types import Media
from vlm.media import open_image

Messages = Sequence[Mapping[str, Any]]


class AdapterError(ValueError):
    """The model's files and the adapter do not fit, or a prompt cannot be encoded; says which and why."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the Hugging Face model takes it."""

    input_ids: Tensor
    """int64 `[T]`, placeholders expanded."""
    pixel_values: Tensor | None = None
    extra_model_kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-image or per-patch tensors, concatenated over samples along dimension 0. Token-aligned inputs are not here:
    `token_inputs` derives them from the padded ids."""
    num_images: int = 0


class MultimodalAdapter(ABC):  # noqa: B024
    """Base of all families; the defaults fit models whose processor follows the common Hugging Face interface."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that stand for media, or open and close it. Never sampled, never trained on."""
    image_token: ClassVar[str] = ""
    """The one placeholder that the processor expands to an image's tokens."""
    image_kwargs: ClassVar[tuple[str, ...]] = ()
    """Those of the model's inputs, besides pixels, that have one entry per image and that its `get_image_features`
    takes too."""
    shares_prompts: ClassVar[bool] = False
    """Whether the model takes a 4-D boolean attention mask and given positions, so that several completions can be
    laid behind one copy of their prompt. False where layers differ in what they attend to (sliding windows, image
    tokens that see each other)."""
    engine_name_prefixes: ClassVar[Mapping[str, str]] = {}
    """Parameter-name prefixes that the engine spells differently: trainer's -> engine's."""

    def __init__(self, processor: Any, model_config: Any) -> None:
        self.processor = processor
        self.model_config = model_config
        self.tokenizer = getattr(processor, "tokenizer", processor)
        vocabulary = self.tokenizer.get_vocab()
        missing = [t for t in self.placeholder_tokens if t not in vocabulary]
        if missing:
            raise AdapterError(f"{type(self).__name__}: the tokenizer lacks {', '.join(missing)}")
        self.image_token_id: int | None = vocabulary[self.image_token] if self.image_token else None

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False) -> MultimodalAdapter:
        """Load processor and configuration from a path or hub name, without weights."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cls(processor, config)

    # ------------------------------------------------------------------ prompt side

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids that neither engine nor learner may give probability: a sampled placeholder has no image behind it."""
        return tuple(sorted(self.tokenizer.convert_tokens_to_ids(list(self.placeholder_tokens))))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion; they are sampled and trained on."""
        return (self.tokenizer.eos_token_id,) if self.tokenizer.eos_token_id is not None else ()

    @property
    def pad_token_id(self) -> int:
        """What fills rows up; it is masked wherever it stands, so any id will do where a tokenizer has none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @property
    def has_vision(self) -> bool:
        return bool(self.image_token)

    def render(self, messages: Messages) -> str:
        """The chat template's text up to where the assistant speaks, one placeholder per media item."""
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def tokenize(self, text: str) -> list[int]:
        """Unexpanded ids. Raises AdapterError if the text holds a placeholder run, which would be expanded twice."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        image = self.image_token_id
        if image is not None and any(a == b == image for a, b in pairwise(ids)):
            raise AdapterError(f"the prompt holds {self.image_token} twice in a row: already expanded?")
        return ids

    def count_images(self, token_ids: Sequence[int]) -> int:
        """Image placeholders in unexpanded ids."""
        return sum(1 for t in token_ids if t == self.image_token_id) if self.image_token_id is not None else 0

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens each image of `(height, width)` expands to, computed from the size alone."""
        if not sizes:
            return []
        return list(self.processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in sizes])["num_image_tokens"])

    def expanded_length(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
        """Prompt length in tokens as engine and learner count it, from unexpanded ids and image `(height, width)`s."""
        return len(token_ids) - len(sizes) + sum(self.image_lengths(sizes))

    # ------------------------------------------------------------------ engine side

    def engine_prompt(self, token_ids: Sequence[int], media: Sequence[Media]) -> dict[str, Any]:
        """A vLLM prompt: unexpanded ids, decoded images, and their digests as cache identities."""
        prompt: dict[str, Any] = {"prompt_token_ids": [int(t) for t in token_ids]}
        if media:
            prompt["multi_modal_data"] = {"image": [open_image(m.data) for m in media]}
            prompt["multi_modal_uuids"] = {"image": [m.digest for m in media]}
        return prompt

    def engine_weight_name(self, name: str) -> str:
        """The engine's name of the trainer's parameter `name`."""
        for trainer, engine in self.engine_name_prefixes.items():
            if name.startswith(trainer):
                return engine + name[len(trainer) :]
        return name

    # ------------------------------------------------------------------ learner side

    def encode(self, text: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """Run the Hugging Face processor over one prompt."""
        if not images:
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            return EncodedPrompt(ids)
        out = dict(self.processor(text=[text], images=list(images), return_tensors="pt", add_special_tokens=False))
        ids = out.pop("input_ids")[0]
        for aligned in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            out.pop(aligned, None)
        return EncodedPrompt(ids, out.pop("pixel_values"), out, len(images))

    def encode_batch(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[EncodedPrompt]:
        """`encode` of many prompts. A family whose processor is faster on batches, and whose outputs it can cut apart
        again, overrides this."""
        return [self.encode(text, own) for text, own in zip(texts, images, strict=True)]

    def join(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Concatenate the media inputs of several prompts, in order: `(pixel_values, extra_model_kwargs)`."""
        with_media = [p for p in prompts if p.pixel_values is not None]
        if not with_media:
            return None, {}
        pixels = torch.cat([p.pixel_values for p in with_media if p.pixel_values is not None])
        keys = with_media[0].extra_model_kwargs
        return pixels, {k: torch.cat([p.extra_model_kwargs[k] for p in with_media]) for k in keys}

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Token-aligned model inputs that follow from the padded ids `[B, L]` alone (type ids, say)."""
        return {}

    def position_ids(
        self, backbone: Any, input_ids: Tensor, attention_mask: Tensor, extra: Mapping[str, Any]
    ) -> Tensor:
        """Positions the model would derive for rows padded on the right: `[B, L]`, or `[3, B, L]` for M-RoPE.

        `backbone`: the model without its head; `extra`: its further inputs, one entry per place for an image."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def dummy_prompt(self) -> EncodedPrompt | None:
        """The smallest prompt with an image, for ranks whose micro-batch has none: under ZeRO-3 every rank must run the
        vision tower. None for text-only families."""
        if not self.has_vision:
            return None
        text = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}])
        return self.encode(text, [Image.new("RGB", (56, 56))])

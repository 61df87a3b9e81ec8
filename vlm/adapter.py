"""MultimodalAdapter: everything that differs between model families, behind one class.

    messages ──render──▶ text ──tokenize──▶ ids ──▶ engine (expands placeholders itself)
                                             └─encode(+ images)──▶ Sample (expanded ids, model inputs) ──join──▶ batch

The engine and the learner must see the same expanded ids and the same pixels; an adapter is where that is arranged.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from rollout.types import Media
from vlm.media import open_image

Messages = Sequence[Mapping[str, Any]]
_TOKEN_ALIGNED = ("attention_mask", "mm_token_type_ids", "token_type_ids")


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
    """Those of the model's inputs, besides pixels, that its `get_image_features` takes."""
    position_kwargs: ClassVar[tuple[str, ...]] = ()
    """Those of `image_kwargs` that positions derive from; they have one entry per image."""
    nested_images: ClassVar[bool] = False
    """Whether the processor takes images as one list per prompt, instead of one list."""
    shares_prompts: ClassVar[bool] = False
    """Whether the model takes a 4-D boolean attention mask and given positions, so that several completions can be
    laid behind one copy of their prompt. False where layers differ in what they attend to (sliding windows, image
    tokens that see each other)."""
    engine_name_parts: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Parts of parameter names that the engine spells differently: (trainer's, engine's)."""

    untrainable_on: ClassVar[Mapping[str, str]] = {}
    """Device -> why a model of the family is not trained there: the engine would sample from something else than the
    learner computes, or nobody has seen that it does not."""

    def __init__(self, processor: Any, model_config: Any) -> None:
        self.processor = processor
        self.model_config = model_config
        self.tokenizer = getattr(processor, "tokenizer", processor)
        vocabulary = self.tokenizer.get_vocab()
        missing = [t for t in self.placeholder_tokens if t not in vocabulary]
        if missing:
            raise AdapterError(f"{type(self).__name__}: the tokenizer lacks {', '.join(missing)}")
        self.image_token_id: int | None = vocabulary[self.image_token] if self.image_token else None
        self._lengths: dict[tuple[int, int], int] = {}

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
        """Unexpanded ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def count_images(self, token_ids: Sequence[int]) -> int:
        """Image placeholders in unexpanded ids."""
        return sum(1 for t in token_ids if t == self.image_token_id) if self.image_token_id is not None else 0

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens each image of `(height, width)` expands to, from the size alone."""
        if not sizes:
            return []
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return [self._length_by_trial(*size) for size in sizes]
        return list(self.processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in sizes])["num_image_tokens"])

    def _length_by_trial(self, height: int, width: int) -> int:
        """Run the processor over a blank image of that size, once per size."""
        if (height, width) not in self._lengths:
            with_image = len(self.encode(self.image_token, [Image.new("RGB", (width, height))]).input_ids)
            self._lengths[height, width] = with_image - len(self.tokenize(self.image_token)) + 1
        return self._lengths[height, width]

    def expanded_length(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
        """Prompt length in tokens as engine and learner count it, from unexpanded ids and image `(height, width)`s."""
        return len(token_ids) - len(sizes) + sum(self.image_lengths(sizes))

    # ------------------------------------------------------------------ engine side

    def engine_prompt(self, token_ids: Sequence[int], media: Sequence[Media]) -> dict[str, Any]:
        """A vLLM prompt: unexpanded ids, decoded images, and their digests as cache identities.

        Raises AdapterError unless there is one placeholder per image: vLLM would expand an expanded prompt again,
        without an error."""
        if self.count_images(token_ids) != len(media):
            raise AdapterError(
                f"{self.count_images(token_ids)} times {self.image_token} in the prompt for {len(media)} image(s): "
                "already expanded?"
            )
        prompt: dict[str, Any] = {"prompt_token_ids": [int(t) for t in token_ids]}
        if media:
            prompt["multi_modal_data"] = {"image": [open_image(m.data) for m in media]}
            prompt["multi_modal_uuids"] = {"image": [m.digest for m in media]}
        return prompt

    def engine_weight_name(self, name: str) -> str | None:
        """The engine's name of the trainer's parameter `name`; None for one that nothing the model computes depends on
        and that the engine therefore does not have."""
        return self.published_weight_name(name)

    def published_weight_name(self, name: str) -> str:
        """The name of a parameter in published checkpoints of the family, which the engine loads."""
        for trainer, engine in self.engine_name_parts:
            if trainer in name and engine not in name:
                return name.replace(trainer, engine, 1)
        return name

    # ------------------------------------------------------------------ learner side

    def encode(self, text: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """Run the Hugging Face processor over one prompt."""
        if not images:
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            return EncodedPrompt(ids)
        given = [list(images)] if self.nested_images else list(images)
        out = dict(self.processor(text=[text], images=given, return_tensors="pt", add_special_tokens=False))
        ids = out.pop("input_ids")[0]
        out = self.without_bookkeeping(out)
        return EncodedPrompt(ids, out.pop("pixel_values"), out, len(images))

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Those of the processor's outputs that describe images, as the model takes them; token-aligned ones are
        derived from the padded ids later (`token_inputs`)."""
        return {k: v for k, v in outputs.items() if k not in _TOKEN_ALIGNED}

    def feature_rows(self, prompt: EncodedPrompt) -> int:
        """How many entries of the model's image features belong to a prompt: one per image, or per tile."""
        return prompt.num_images

    def repeat_features(self, encoded: Any, index: Tensor) -> None:
        """Replace image features (an output of `get_image_features`) by those at `index` int64 `[n]`, in place."""
        features = encoded.pooler_output
        encoded.pooler_output = features[index] if isinstance(features, Tensor) else [features[i] for i in index]

    def encode_batch(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[EncodedPrompt]:
        """`encode` of many prompts. A family whose processor is faster on batches, and whose outputs it can cut apart
        again, overrides this."""
        return [self.encode(text, own) for text, own in zip(texts, images, strict=True)]

    def join(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Concatenate the media inputs of several prompts, in order: `(pixel_values, extra_model_kwargs)`."""
        with_media = [p for p in prompts if p.pixel_values is not None]
        if not with_media:
            return None, {}
        pixels = concatenate_padded([p.pixel_values for p in with_media if p.pixel_values is not None])
        keys = with_media[0].extra_model_kwargs
        return pixels, {k: concatenate_padded([p.extra_model_kwargs[k] for p in with_media]) for k in keys}

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Token-aligned model inputs that follow from the padded ids `[B, L]` alone (type ids, say)."""
        return {}

    def position_ids(
        self, backbone: Any, input_ids: Tensor, attention_mask: Tensor, extra: Mapping[str, Any]
    ) -> Tensor:
        """Positions the model would derive for rows padded on the right: `[B, L]`, or `[3, B, L]` for M-RoPE.

        `backbone`: the model without its head; `extra`: its further inputs, one entry per place for an image."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def prepare_model(self, model: Any) -> None:  # noqa: B027
        """Change the freshly loaded Hugging Face model where it computes something else than the engine does."""

    def dummy_prompt(self) -> EncodedPrompt | None:
        """The smallest prompt with an image, for ranks whose micro-batch has none: under ZeRO-3 every rank must run the
        vision tower. None for text-only families."""
        if not self.has_vision:
            return None
        text = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}])
        return self.encode(text, [Image.new("RGB", (56, 56))])


def concatenate_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Along dimension 0; every other dimension is padded with zeros at its end to the largest: tiles and sides of
    images of different sizes."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [n for m in reversed(missing) for n in (0, m)]))
    return torch.cat(padded)

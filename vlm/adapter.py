"""MultimodalAdapter: all differences between model families, behind one class.

    messages ──render──▶ text ──tokenize──▶ ids ──▶ engine (expands placeholders itself)
                                             └─encode(+ media)──▶ EncodedPrompt ──join──▶ a batch's media inputs
                                                                        ◀──split──
The engine and the learner must see the same expanded ids and the same pixels. The adapter makes sure of that.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from vlm.control_tokens import control_tokens
from vlm.encoding import (
    Counts,
    EncodedPrompt,
    Modality,
    concatenate_padded,
    counts_of,
    dummy_messages,
    for_engine,
    smallest,
)
from vlm.end_tokens import end_tokens
from vlm.errors import AdapterError
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import Decoded, Video, decode
from vlm.media_tokens import MediaTokens
from vlm.parameter_names import ParameterNames
from vlm.tower_outputs import TowerOutputs

Messages = Sequence[Mapping[str, Any]]
_TOKEN_ALIGNED = ("attention_mask", "mm_token_type_ids", "token_type_ids")


class MultimodalAdapter(ParameterNames, TowerOutputs, MediaTokens, ABC):
    """The base of all families. The defaults fit models whose processor follows the common Hugging Face interface.

    Its other parts: `vlm/parameter_names.py` (parts of the model, LoRA, the engine's names), `vlm/tower_outputs.py`,
    and `vlm/media_tokens.py` (how many tokens media take)."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {}
    """The kinds of media that the family takes besides text; empty for a text model."""
    placeholder_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that stand for media, or open and close it. Never sampled, never truncated, never trained on."""
    nested_images: ClassVar[bool] = False
    """Whether the processor takes images as one list per prompt, instead of one list."""
    shares_prompts: ClassVar[bool] = False
    """Whether every layer of the language model is plainly causal, and passes its keyword arguments on to its
    attention. Completions can then share one copy of their prompt. That is not possible with sliding windows, or with
    image tokens that see each other."""
    more_ends: tuple[int, ...] = ()
    """Ids that end a completion according to the model's files, besides the tokenizer's end of sequence."""
    untrainable_on: ClassVar[Mapping[str, str]] = {}
    """Device -> why the family is not trained there: the engine is known to sample from another distribution than the
    learner computes, or nobody has checked that it does not."""

    def __init__(self, processor: Any, model_config: Any) -> None:
        self.processor = processor
        self.model_config = model_config
        self.tokenizer = getattr(processor, "tokenizer", processor)
        vocabulary = self.tokenizer.get_vocab()
        named = (*self.placeholder_tokens, *(m.placeholder for m in self.modalities.values()))
        missing = [token for token in dict.fromkeys(named) if token not in vocabulary]
        if missing:
            raise AdapterError(f"{type(self).__name__}: the tokenizer lacks {', '.join(missing)}")
        self.placeholder_ids: dict[MediaKind, int] = {k: vocabulary[m.placeholder] for k, m in self.modalities.items()}
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.control_tokens: Mapping[int, str] = control_tokens(self.tokenizer, template, named)
        """Tokens, by id, that only the chat template may put into a prompt."""
        self._unread = {*self.control_tokens, self.tokenizer.unk_token_id}
        self._lengths: dict[tuple[Any, ...], int] = {}

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False) -> MultimodalAdapter:
        """Load processor and configuration from a path or hub name, without weights."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        adapter = cls(processor, config)
        adapter.more_ends = end_tokens(path, config)
        return adapter

    # ------------------------------------------------------------------ prompt side

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids to which engine and learner must give no probability: a sampled placeholder has no image."""
        return tuple(sorted(self.tokenizer.convert_tokens_to_ids(list(self.placeholder_tokens))))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, the tokenizer's first. They are sampled and trained on."""
        own = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(i for i in (own, *self.more_ends) if i is not None))

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up. It is masked everywhere, so any id will do if the tokenizer has none."""
        return self.tokenizer.pad_token_id or 0

    @property
    def has_vision(self) -> bool:
        return "image" in self.modalities

    def towers(self) -> dict[MediaKind, Modality]:
        """Modalities by kind, one for each tower: of those that share their inputs only the first."""
        first: dict[str, MediaKind] = {}
        for kind, modality in self.modalities.items():
            first.setdefault(modality.inputs[0], kind)
        return {kind: self.modalities[kind] for kind in first.values()}

    def render(self, messages: Messages) -> str:
        """Render the chat template up to where the assistant speaks, with one placeholder per media item."""
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with placeholders not expanded."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def completion_text(self, token_ids: Iterable[int]) -> str:
        """A completion as rewards read it: without control tokens (such as its end), but with tags, whether or not they
        are special tokens."""
        said = [token for token in map(int, token_ids) if token not in self._unread]
        return self.tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def media_order(self, token_ids: Sequence[int]) -> list[MediaKind]:
        """Return the kinds of the media whose placeholders are in unexpanded ids, in order."""
        kinds = {token: kind for kind, token in self.placeholder_ids.items()}
        return [kinds[t] for t in map(int, token_ids) if t in kinds]

    # ------------------------------------------------------------------ engine side

    def engine_prompt(self, token_ids: Sequence[int], media: Sequence[Media]) -> dict[str, Any]:
        """Return a vLLM prompt: unexpanded ids, decoded media, and their digests as cache keys.

        Raises AdapterError unless there is one placeholder per item, in their order: vLLM would expand an already
        expanded prompt again without an error."""
        order = self.media_order(token_ids)
        if order != [m.kind for m in media]:
            raise AdapterError(
                f"the prompt has places for {', '.join(order) or 'nothing'}, but its media are "
                f"{', '.join(m.kind for m in media) or 'none'}; was it expanded already?"
            )
        prompt: dict[str, Any] = {"prompt_token_ids": [int(t) for t in token_ids]}
        if media:
            data: dict[str, list[Any]] = {}
            for item in media:
                data.setdefault(item.kind, []).append(for_engine(decode(item, item.data)))
            prompt["multi_modal_data"] = data
            prompt["multi_modal_uuids"] = {k: [m.digest for m in media if m.kind == k] for k in data}
        return prompt

    def ids_from_engine(self, token_ids: np.ndarray) -> np.ndarray:
        """Translate expanded ids, int32 `[T]`, from the engine's form to that of the learner's processor."""
        return token_ids

    def comparable(
        self, learner: Mapping[str, Tensor], engine: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Make a prompt's media inputs of both sides comparable, if the engine has other names or another layout."""
        return learner, engine

    def published_config(self, model: Any) -> Any | None:
        """The configuration of published checkpoints, if it differs from that of the model that is trained."""
        return None

    # ------------------------------------------------------------------ learner side: inputs

    def encode(self, text: str, media: Sequence[Decoded]) -> EncodedPrompt:
        """Run the Hugging Face processor on one prompt."""
        return self.encode_batch([text], [media])[0]

    def encode_batch(self, texts: Sequence[str], media: Sequence[Sequence[Decoded]]) -> list[EncodedPrompt]:
        """Encode many prompts in one call of the processor, which is three times as fast as one call each."""
        if self.stacks_videos and len(texts) > 1 and any(isinstance(item, Video) for own in media for item in own):
            return [self.encode(text, own) for text, own in zip(texts, media, strict=True)]
        where = [i for i, own in enumerate(media) if own]
        done = {i: EncodedPrompt(torch.tensor(self.tokenize(texts[i]))) for i in range(len(texts)) if i not in where}
        if where:
            chosen = [media[i] for i in where]
            given = self.processor_arguments(chosen)
            out = dict(
                self.processor(
                    text=[texts[i] for i in where],
                    **given,
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    add_special_tokens=False,
                )
            )
            ids = [row[mask.bool()] for row, mask in zip(out.pop("input_ids"), out["attention_mask"], strict=True)]
            parts = self.split(self.without_bookkeeping(out), ids, [counts_of(own) for own in chosen])
            done |= dict(zip(where, parts, strict=True))
        return [done[i] for i in range(len(texts))]

    def processor_arguments(self, media: Sequence[Sequence[Decoded]]) -> dict[str, Any]:
        """Return the media arguments of the processor, for the media of several prompts."""
        images = [[m for m in own if isinstance(m, Image.Image)] for own in media]
        videos = [m for own in media for m in own if isinstance(m, Video)]
        sounds = [m for own in media for m in own if isinstance(m, np.ndarray)]
        given: dict[str, Any] = {}
        if any(images):
            given["images"] = images if self.nested_images else [image for own in images for image in own]
        if videos:
            given |= {"videos": [v.frames for v in videos], "video_metadata": [v.metadata() for v in videos]}
            given["do_sample_frames"] = False
        if sounds:
            given["audio"] = sounds
        return given

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """The processor's outputs that describe media, as the model takes them. Token-aligned ones are derived from the
        padded ids later (`token_inputs`)."""
        return {k: torch.as_tensor(v) for k, v in outputs.items() if k not in (*_TOKEN_ALIGNED, "video_metadata")}

    def join(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        """Concatenate the media inputs of several prompts, in order."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.inputs)
        return {name: concatenate_padded([p.inputs[name] for p in prompts if name in p.inputs]) for name in names}

    def split(
        self, inputs: Mapping[str, Tensor], input_ids: Sequence[Tensor], counts: Sequence[Counts]
    ) -> list[EncodedPrompt]:
        """The inverse of `join`: cut the `inputs` of several prompts, with expanded `input_ids` int64 `[T]` and
        `counts`, into those of each. Raises AdapterError for an input with another number of entries than expected."""
        parts: list[dict[str, Tensor]] = [{} for _ in input_ids]
        for name, tensor in inputs.items():
            entries = self.entries(name, inputs, input_ids, counts)
            if sum(entries) != len(tensor):
                raise AdapterError(f"{type(self).__name__}: {name} has {len(tensor)} entries, expected {sum(entries)}")
            for part, own, n in zip(parts, tensor.split(entries), entries, strict=True):
                if n:
                    part[name] = own
        return [
            EncodedPrompt(ids, self.without_padding(part, ids), count)
            for ids, part, count in zip(input_ids, parts, counts, strict=True)
        ]

    def entries(
        self, name: str, inputs: Mapping[str, Tensor], input_ids: Sequence[Tensor], counts: Sequence[Counts]
    ) -> list[int]:
        """The number of entries of input `name`, along dimension 0, that belong to each prompt: one per item."""
        kinds = [k for k, m in self.modalities.items() if name in (*m.inputs, *m.positions)]
        if not kinds:
            raise AdapterError(
                f"{type(self).__name__}: the processor returns {name!r}, which no modality takes; add it to a "
                "modality, or remove it in `without_bookkeeping`"
            )
        return [sum(count.get(kind, 0) for kind in kinds) for count in counts]

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        """The inputs of one prompt without the padding that longer prompts of its batch caused."""
        return inputs

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Token-aligned model inputs, such as type ids, that follow from the padded ids `[B, L]` alone."""
        return {}

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return positions as the engine counts them, for rows padded on the right: `[B, L]`, or `[3, B, L]` for
        M-RoPE.

        `inputs` are those of `Modality.positions`, with one entry per place, in the order of the rows."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def dummy_prompt(self, kind: MediaKind) -> EncodedPrompt:
        """The smallest prompt with one item, for ranks whose micro-batch has none: under ZeRO-3 every rank must run the
        same towers."""
        return self.encode(self.render(dummy_messages(kind)), [smallest(kind)])

    # ------------------------------------------------------------------ learner side: the model

    def model_class(self) -> Any:
        """Return the transformers class whose `from_pretrained` loads the model."""
        return AutoModelForImageTextToText if self.has_vision else AutoModelForCausalLM

    def prepare_model(self, model: Any) -> None:
        """Change the newly loaded Hugging Face model where it computes something else than the engine does."""

    def hidden_states(self, model: Any, **inputs: Any) -> Tensor:
        """The states `[B, L, H]` that the head projects. `inputs` has features by kind as `mm_encoder_outputs`."""
        return model.base_model(**inputs, use_cache=False).last_hidden_state

"""How many tokens media take, and a limit for those of an image that learner and engine both keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vlm.encoding import EncodedPrompt, Modality, blank
from vlm.errors import AdapterError
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import Decoded

PROBE = 4096
"""Width and height of an image that is larger than any processor leaves it."""


class MediaTokens:
    """The part of `MultimodalAdapter` that is about the tokens that media expand to."""

    processor: Any
    modalities: ClassVar[Mapping[MediaKind, Modality]]
    encode: Callable[[str, Sequence[Decoded]], EncodedPrompt]
    tokenize: Callable[[str], list[int]]
    _lengths: dict[tuple[Any, ...], int]

    stacks_videos: ClassVar[bool] = False
    """Whether the processor takes several videos in one call only if they have equally many frames."""

    image_tokens_fixed: ClassVar[str] = "the family's processor has no such setting"
    """Says why a family without `image_settings` cannot limit the number."""
    images_alone: ClassVar[bool] = True
    """Whether vLLM takes settings of the image processor separately from those of other media."""
    image_limit: int | None = None
    """The limit that `limit_images` has set."""
    engine_processor: Mapping[str, Any] = {}
    """Arguments with which the engine's processor does the same as the learner's."""

    def expanded_length(self, token_ids: Sequence[int], media: Sequence[Media]) -> int:
        """Prompt length in tokens as engine and learner count it, from unexpanded ids and the shapes of the media.
        Raises ValueError for shapes that the processor refuses."""
        return len(token_ids) - len(media) + sum(self.media_lengths(media))

    def media_lengths(self, media: Sequence[Media]) -> list[int]:
        """Tokens that each item expands to, from its shape alone. Raises ValueError for shapes that the processor
        refuses."""
        if self.stacks_videos and len({len(m.frames) for m in media if m.kind == "video"}) > 1:
            raise AdapterError(
                f"{type(self).__name__} takes several videos in one prompt only if they have equally many frames"
            )
        images = [m for m in media if m.kind == "image"]
        counted: dict[int, int] = {}
        if images and hasattr(self.processor, "_get_num_multimodal_tokens"):
            sizes = [[m.height, m.width] for m in images]
            tokens = self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
            counted = {id(m): n for m, n in zip(images, tokens, strict=True)}
        return [counted[id(m)] if id(m) in counted else self.length_by_trial(m) for m in media]

    def length_by_trial(self, media: Media) -> int:
        """Run the processor over a blank item of that shape, once per shape."""
        shape = (media.kind, media.width, media.height, media.frames, media.total_frames, media.fps, media.samples)
        if shape not in self._lengths:
            text = self.modalities[media.kind].placeholder
            expanded = self.encode(text, [blank(media)]).input_ids
            self._lengths[shape] = len(expanded) - len(self.tokenize(text)) + 1
        return self._lengths[shape]

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Settings of the image processor that may keep images within `tokens`, the largest first; none if the family
        has no such setting."""
        return iter(())

    def most_image_tokens(self) -> int:
        """The tokens of an image that is larger than any that the processor keeps: here a square one, by its shape."""
        return self.media_lengths([Media("image", "", b"", PROBE, PROBE)])[0]

    def limit_images(self, tokens: int) -> None:
        """Shrink images that would take more than `tokens`, in the learner's processor and, through `engine_processor`,
        in the engine's. Raises AdapterError if that is impossible."""
        if "image" not in self.modalities:
            raise AdapterError("the model takes no images")
        self.image_limit = tokens
        if self.most_image_tokens() <= tokens:  # so in a model that was saved with the limit
            return
        images, least = self.processor.image_processor, 0
        for settings in self.image_settings(tokens):
            self.processor.image_processor = type(images).from_dict({**images.to_dict(), **settings})
            self._lengths.clear()
            if (least := self.most_image_tokens()) <= tokens:
                self.engine_processor = {"images_kwargs": settings} if self.images_alone else settings
                return
        if least:
            raise AdapterError(f"an image takes at least {least} tokens")
        raise AdapterError(f"{self.image_tokens_fixed} ({type(self).__name__})")

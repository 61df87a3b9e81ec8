"""How many tokens an image may take: one limit, which the learner's processor and the engine's both keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vlm.encoding import AdapterError, Modality
from vlm.media.types import Media, MediaKind

PROBE = 4096
"""Width and height of an image that is larger than any processor leaves it."""


class ImageTokens:
    """The part of an adapter that sets what its processor makes of images."""

    processor: Any
    modalities: ClassVar[Mapping[MediaKind, Modality]]
    media_lengths: Callable[[Sequence[Media]], list[int]]
    _lengths: dict[tuple[Any, ...], int]

    image_tokens_fixed: ClassVar[str] = "the family's processor has no such setting"
    """Why the number cannot be chosen, in a family without `image_settings`."""
    images_alone: ClassVar[bool] = True
    """Whether vLLM takes settings of the image processor apart from those of other media."""
    image_limit: int | None = None
    """What `limit_images` was asked for."""
    engine_processor: Mapping[str, Any] = {}
    """Arguments of the engine's processor with which it does what the learner's does."""

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Settings of the image processor that may hold images to `tokens`, the largest first; none where the family
        has no such setting."""
        return iter(())

    def most_image_tokens(self) -> int:
        """What an image takes that is larger than the processor leaves it: here a square one, by its shape."""
        return self.media_lengths([Media("image", "", b"", PROBE, PROBE)])[0]

    def limit_images(self, tokens: int) -> None:
        """Shrink images that would take more than `tokens`, in the learner's processor and by `engine_processor` in
        the engine's. Raises AdapterError where that cannot be."""
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

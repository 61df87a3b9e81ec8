"""The vocabulary of adapters: modalities, encoded prompts, and small helpers to make them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import SOUND_RATE, Decoded, Video

Counts = Mapping[MediaKind, int]
"""Kind -> number of media items in a prompt."""


FeatureRow = tuple[Tensor, ...]
"""The features of an item, or of one of its tiles: what takes the places of its tokens, `[tokens, H]` (`[1, tokens, H]`
where a family has all rows in one tensor), then what enters later layers, if the family has such. Or the tower outputs
of a whole item: what its tower gives to the projector (`vlm.tower_end.TowerEnd`)."""


@dataclass(frozen=True)
class Modality:
    """The inputs of one kind of media in a family."""

    placeholder: str
    """The one token in a rendered prompt that is expanded to the item's tokens."""
    inputs: tuple[str, ...] = ("pixel_values",)
    """Inputs from which the tower computes features, with pixels (or sound) first. Two kinds may share them."""
    positions: tuple[str, ...] = ()
    """Inputs from which positions are derived, with one entry per item."""
    features: str = "get_image_features"
    """The model's method from `inputs` to features."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in the form that the Hugging Face model takes."""

    input_ids: Tensor
    """int64 `[T]`, placeholders expanded."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Media inputs by the model's own names (`pixel_values`, `image_grid_thw`, ...); empty without media. Token-aligned
    inputs are not included: `MultimodalAdapter.token_inputs` derives them from the padded ids."""
    counts: Counts = field(default_factory=dict)
    cached: Mapping[MediaKind, tuple[FeatureRow, ...]] = field(default_factory=dict)
    """Cached values of the prompt's media, by kind of tower, in the order of the items: features, which replace the
    inputs that they were computed from, or tower outputs, which come with these inputs."""


def kind_of(item: Decoded) -> MediaKind:
    if isinstance(item, Image.Image):
        return "image"
    return "video" if isinstance(item, Video) else "audio"


def counts_of(items: Sequence[Decoded]) -> Counts:
    return Counter(kind_of(item) for item in items)


def blank(media: Media) -> Decoded:
    """Make an item of the same shape without content."""
    if media.kind == "image":
        return Image.new("RGB", (media.width, media.height))
    if media.kind == "audio":
        return np.zeros(media.samples, np.float32)
    frames = np.zeros((len(media.frames), media.height, media.width, 3), np.uint8)
    return Video(frames, media.frames, media.total_frames, media.fps)


def smallest(kind: MediaKind) -> Decoded:
    """Make the smallest item that every family takes."""
    if kind == "image":
        return Image.new("RGB", (56, 56))
    if kind == "audio":
        return np.zeros(SOUND_RATE // 10, np.float32)
    return Video(np.zeros((2, 56, 56, 3), np.uint8), (0, 1), 2, 2.0)


def dummy_messages(kind: MediaKind) -> list[dict[str, Any]]:
    """Make a conversation about one item."""
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "."}]}]


def for_engine(item: Decoded) -> Any:
    """Convert an item to what vLLM's data parser takes."""
    if isinstance(item, Video):
        return item.frames, {**item.metadata(), "do_sample_frames": False}
    return (item, SOUND_RATE) if isinstance(item, np.ndarray) else item


def concatenate_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along dimension 0. Every other dimension (tiles, sides of images) is padded with zeros at its end to
    the largest."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [n for m in reversed(missing) for n in (0, m)]))
    return torch.cat(padded)

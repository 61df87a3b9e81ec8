"""Make the prompts of `saccade parity`: text, and images, videos and sounds of noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollout.types import Prompt, PromptRef
from vlm.adapter import MultimodalAdapter
from vlm.media.types import Media
from vlm.media.video_audio import SOUND_RATE
from vlm.tiny.noise import noise

SIZES = ((84, 84), (120, 60), (60, 150))
"""Width and height of the images: square, wide and high."""
SHAPES: Mapping[str, Mapping[str, Any]] = {"video": {"frames": 27, "fps": 10, "shown": 6}}
"""The test video leaves out frames, and its steps in time are not a whole number of positions."""


def cases(family: MultimodalAdapter, images: int, video: bool = True) -> dict[str, list[str]]:
    """Return name -> parts of the user's message. A part is a text, or a kind of media in place of an item."""
    cases = {"text": ["Name a number."]}
    if "image" in family.modalities:
        cases["1 image"] = ["image", "What is this?"]
        cases[f"{images} images"] = [*["image"] * images, "What are these?"]
        cases["interleaved"] = ["First", "image", "then", "image", "and what now?"]
    if "video" in family.modalities and video:
        cases["video"] = ["video", "What happens?"]
        cases["video, image"] = ["image", "Is this in", "video", "?"]
    if "audio" in family.modalities:
        cases["audio"] = ["audio", "What is heard?"]
        cases["audio, image"] = ["image", "Does", "audio", "belong to it?"]
    return cases


def case_prompt(family: MultimodalAdapter, name: str, parts: Sequence[str], seed: int) -> Prompt:
    media = case_media(family, parts, seed)
    content = [{"type": part} if part in family.modalities else {"type": "text", "text": part} for part in parts]
    text = family.render([{"role": "user", "content": content if family.modalities else "".join(parts)}])
    ids = family.tokenize(text)
    return Prompt(PromptRef(name), text, np.asarray(ids, np.int32), family.expanded_length(ids, media), media)


def case_media(family: MultimodalAdapter, parts: Sequence[str], seed: int) -> tuple[Media, ...]:
    kinds = [part for part in parts if part in family.modalities]
    shapes = [{**SHAPES.get(kind, {}), **_size(kind, i)} for i, kind in enumerate(kinds)]
    return tuple(noise(kind, seed + i, **shapes[i]) for i, kind in enumerate(kinds))


def _size(kind: str, i: int) -> dict[str, int]:
    return dict(zip(("width", "height"), SIZES[i % len(SIZES)], strict=True)) if kind == "image" else {}


def shape(media: Media) -> dict[str, Any]:
    """Return the arguments with which `noise` makes an item of the same number of tokens."""
    if media.kind == "audio":
        return {"seconds": media.samples / SOUND_RATE}
    frames: dict[str, Any] = {}
    if media.kind == "video":
        frames = {"frames": media.total_frames, "fps": int(media.fps), "shown": len(media.frames)}
    return {"width": media.width, "height": media.height, **frames}

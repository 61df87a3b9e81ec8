"""The cost of media for the towers, in patches (and in frames of sound)."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.encoding import dummy_messages
from vlm.media.types import MediaKind


def patches(adapter: MultimodalAdapter, prompt: EncodedPrompt) -> int:
    """Count the patches of all media of a prompt."""
    size = getattr(getattr(adapter.model_config, "vision_config", None), "patch_size", 1)
    height, width = (size, size) if isinstance(size, int) else size
    firsts = [modality.inputs[0] for modality in adapter.towers().values()]
    return sum(_count(prompt.inputs[name], height * width) for name in firsts if name in prompt.inputs)


def _count(inputs: Tensor, pixels: int) -> int:
    """Count in a tower's first input: rows of patches `[P, D]`, frames of sound `[N, M, S]`, images `[..., 3, H,
    W]`."""
    if inputs.ndim == 2:
        return len(inputs)
    return inputs.numel() // (inputs.shape[-2] if inputs.ndim == 3 else 3 * pixels)


def patches_per_token(adapter: MultimodalAdapter, kind: MediaKind) -> float:
    """Patches for each token of an item, measured on the smallest item. The most frequent of the tokens that it expands
    to stands for patches; others announce them."""
    prompt = adapter.dummy_prompt(kind)
    expanded = Counter(prompt.input_ids.tolist())
    expanded.subtract(adapter.tokenize(adapter.render(dummy_messages(kind))))
    place = expanded[adapter.placeholder_ids[kind]] + 1
    return patches(adapter, prompt) / max(place, *expanded.values())

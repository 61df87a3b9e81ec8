"""Whether a model that sees is shown what the data have: columns of media that no role is for, and data without any."""

from __future__ import annotations

from rollout.data.source import PromptSource
from saccade.config.run_config import RunConfig
from vlm.adapter import MultimodalAdapter


def overlooked_media(key: str, source: PromptSource, adapter: MultimodalAdapter) -> list[str]:
    """Problems: images, videos and sounds that would be left out although the model takes them."""
    return [
        f"{key}: the column {column!r} holds {kind}s, and no role is for it: set "
        f"data.columns: {{{kind}: {column}}}, or {{{kind}: null}} to leave them out"
        for column, kind in source.overlooked().items()
        if kind in adapter.modalities
    ]


def blindness(key: str, source: PromptSource, adapter: MultimodalAdapter, config: RunConfig) -> list[str]:
    """A warning, where a model that takes media is given text alone and nobody said that this is meant."""
    if not adapter.modalities or source.columns.media or any(k in config.data.columns for k in adapter.modalities):
        return []
    kind = next(iter(adapter.modalities))
    return [
        f"WARNING: {key} has no column of {kind}s, and the model takes them: its prompts are text alone. Name the "
        f"column, data.columns: {{{kind}: ...}}, or say that it is meant: {{{kind}: null}}"
    ]

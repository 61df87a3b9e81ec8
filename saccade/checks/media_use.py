"""Checks that a model which takes media gets those of the data: unused media columns, and data without media."""

from __future__ import annotations

from rollout.data.source import PromptSource
from saccade.config.run_config import RunConfig
from vlm.adapter import MultimodalAdapter


def overlooked_media(key: str, source: PromptSource, adapter: MultimodalAdapter) -> list[str]:
    """Report images, videos and sounds that would be left out although the model takes them."""
    return [
        f"{key}: the column {column!r} holds {kind}s, but no role uses it: set "
        f"data.columns: {{{kind}: {column}}}, or {{{kind}: null}} to leave them out"
        for column, kind in source.overlooked().items()
        if kind in adapter.modalities
    ]


def blindness(key: str, source: PromptSource, adapter: MultimodalAdapter, config: RunConfig) -> list[str]:
    """Warn if a model that takes media gets text only, and the configuration does not say that this is intended."""
    if not adapter.modalities or source.columns.media or any(k in config.data.columns for k in adapter.modalities):
        return []
    kind = next(iter(adapter.modalities))
    return [
        f"WARNING: {key} has no column of {kind}s, although the model takes them: its prompts are text only. Name the "
        f"column with data.columns: {{{kind}: ...}}, or confirm that this is intended with {{{kind}: null}}"
    ]

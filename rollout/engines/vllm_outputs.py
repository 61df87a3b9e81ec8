"""Convert the results of vLLM to this project's types."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rollout.types import Completion, Segment

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

T = TypeVar("T")


def completion_of(output: CompletionOutput, text: str, seed: int, version: int) -> Completion:
    """Convert one completion of vLLM. Every token has exactly one log-probability and one version."""
    token_ids = np.asarray(output.token_ids, np.int32)
    flat: Any = output.logprobs
    if flat.token_ids != list(output.token_ids):
        raise RuntimeError("vLLM's log-probabilities are not those of the tokens it sampled")
    versions = np.full(len(token_ids), version, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    segment = Segment(token_ids, np.asarray(flat.logprobs, np.float32), versions)
    reason = output.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise RuntimeError(f"vLLM ended a completion with {reason!r}")
    return Completion((segment,), text, reason, seed)


async def all_or_none(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Await all. If one fails, cancel the others, which aborts their requests, and raise the error."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise

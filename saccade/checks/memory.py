"""Checks that micro-batches limited in bytes can hold the samples of a run; and the device that a plan assumes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from learner.plan.predict import predict
from saccade.config.demands import Device
from saccade.config.options import learner_options
from saccade.config.run_config import RunConfig
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind
from vlm.media_cost import patches_per_token

GIB = 2**30


def planned_device(config: RunConfig) -> Device:
    """Return the configured device. This machine decides `auto`, since no cluster is asked."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_problems(config: RunConfig, adapter: MultimodalAdapter, kinds: Sequence[MediaKind]) -> list[str]:
    """Why micro-batches limited in bytes (learner.micro_batch: 12 GiB) cannot be made for a run."""
    if config.learner.micro_batch_bytes is None:
        return []
    try:
        options = predict(learner_options(config, planned_device(config), kinds), adapter).options
    except ValueError as error:
        return [f"learner.micro_batch: {error}"]
    tokens, longest = config.data.max_prompt_length, config.rollout.max_completion_length
    patches = math.ceil(tokens * max((patches_per_token(adapter, kind) for kind in adapter.towers()), default=0.0))
    needed = options.size(tokens + longest, patches, longest).bytes + options.unit_bytes[3]
    if options.learner.micro_batch_bytes is None or needed <= options.learner.micro_batch_bytes:
        return []
    return [
        f"learner.micro_batch={config.learner.micro_batch} cannot hold one sample of up to "
        f"data.max_prompt_length + rollout.max_completion_length = {tokens + longest} tokens, which takes "
        f"{needed / GIB:.2f} GiB"
    ]

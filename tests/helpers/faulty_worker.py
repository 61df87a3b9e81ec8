"""vLLM's worker with faults of a weight transfer that a test can switch on, one at a time. Without one it is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from weight_sync import vllm_worker

EXTENSION = f"{__name__}.FaultyWorker"
CORRUPTED = "model.norm.weight"
"""The end of the name of the tensor in which "corrupted" flips a bit."""

received_buckets = vllm_worker.received_buckets


def corrupted_buckets(*arguments: Any) -> Iterator[list[tuple[str, Tensor]]]:
    for bucket in received_buckets(*arguments):
        for name, tensor in bucket:
            if name.endswith(CORRUPTED):
                tensor.view(torch.uint8).view(-1)[3] ^= 1
        yield bucket


def keep_old_copies(model: nn.Module) -> None:
    """In place of `refresh_output_heads`."""


FAULTS = {
    "corrupted": ("received_buckets", corrupted_buckets),
    "stale head": ("refresh_output_heads", keep_old_copies),
}


class FaultyWorker(vllm_worker.PolicyWorker):
    fault: str | None = None

    def inject(self, fault: str | None) -> None:
        """Let the following transfers have this fault, a key of FAULTS."""
        self.fault = fault

    def receive_policy(self, update_info: dict[str, Any]) -> dict[str, Any]:
        with ExitStack() as stack:
            if self.fault is not None:
                stack.enter_context(mock.patch.object(vllm_worker, *FAULTS[self.fault]))
            return super().receive_policy(update_info)

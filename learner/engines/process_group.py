"""Joins the ranks of a learner in torch's default process group, with a limit on every wait."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from learner.types import LearnerOptions


def open_store(host: str, timeout: float) -> tuple[dist.TCPStore, int]:
    """Open rank 0's store, where the ranks meet. The system chooses its port, so that no two learners can collide."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    return store, store.port


def join(options: LearnerOptions, rank: int, host: str, port: int, store: Any = None) -> None:
    """Form the default group: NCCL between GPUs, gloo between CPUs. `store`: rank 0's own.

    Raises torch's DistStoreError or DistNetworkError if the others do not join within `options.timeout` seconds."""
    limit = timedelta(seconds=options.timeout)
    if store is None:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    if options.device == "cuda":
        torch.cuda.set_device(0)
        backend = "nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=options.learner.ranks, timeout=limit)


def all_reduce(values: Sequence[float], op: Any, device: str) -> list[float]:
    """Reduce element by element over the default group, in float64."""
    if not values:
        return []
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()

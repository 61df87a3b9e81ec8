"""A machine without GPUs for vLLM's NCCL weight transfer: a communicator over gloo, streams that do nothing.

Python imports this at its start in every process that has this folder on PYTHONPATH: the learner's ranks, the engines
and their workers. All else of vLLM's trainer and worker side, and of ours, is what runs on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any


class Communicator:
    """The part of vLLM's PyNcclCommunicator that weight transfer uses."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: Any) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        store = TCPStore(host, port, world_size, rank == 0, timedelta(seconds=60))
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timedelta(seconds=60))

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        self._group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self._group.abort()


def _common(module: Any) -> None:
    import torch

    module.stateless_init_process_group = Communicator
    torch.accelerator.current_device_index = lambda: 0


def _packed(module: Any) -> None:
    import torch

    stream = SimpleNamespace(synchronize=lambda: None)
    module._get_streams = lambda device, count: (stream,) * count
    torch.cuda.stream = nullcontext  # type: ignore[assignment,misc]


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "vllm.distributed.weight_transfer.nccl_common": _common,
    "vllm.distributed.weight_transfer.packed_tensor": _packed,
}


class Patcher(MetaPathFinder, Loader):
    """Imports the modules of PATCHES as Python would, and patches each right after."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Patcher())

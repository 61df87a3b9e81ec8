"""The weight transfer on one device: digests, packing by bucket size, order of streams, CUDA IPC between processes.

vLLM's own packed sender and receiver run against each other in two threads. Their communicator copies on the device,
since NCCL needs two GPUs, so everything except the wire is measured. Without vLLM, only the digests and IPC are tested.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from bench.gpu_parts.common import Setting
from weight_sync.sender import DigestingSource
from weight_sync.source import PolicySource
from weight_sync.verify import tensor_digest

TIMEOUT = 60.0


def run(setting: Setting) -> dict[str, Any]:
    model = _model(setting)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    on_cpu = {name: tensor_digest(p.detach().cpu()) for name, p in _some(model)}
    on_device = {name: tensor_digest(p.detach()) for name, p in _some(model)}
    hashed = setting.seconds(lambda: [tensor_digest(p.detach()) for p in model.parameters()], 2)
    found: dict[str, Any] = {"bytes": nbytes, "hash_bytes_per_second": nbytes / hashed}
    checks = {"digests of the device are the CPU's": on_cpu == on_device}
    if find_spec("vllm") is not None:
        rates, same = {}, True
        for mib in (8, 64, 256):
            seconds, arrived, sent = _transfer(setting, model, mib * 2**20)
            rates[f"{mib} MiB"] = nbytes / seconds
            same = same and arrived == sent
        found["packed_bytes_per_second"] = rates
        checks["every tensor arrives with the digest it was sent with"] = same
        checks["weights written just before by a busy stream arrive"] = _after_busy_stream(setting, model)
    else:
        found["packed"] = {"reason": "not installed: vllm"}
    found["between_processes"], checks["another process reads the same bytes"] = _between_processes(setting)
    return {**found, "checks": checks}


def _model(setting: Setting) -> nn.Module:
    """Make 3.5 billion bfloat16 numbers in matrices as in the 3B model, including its head; or, if small, very few."""
    width, layers, vocabulary = (64, 4, 1000) if setting.small else (2048, 42, 151_936)
    layer = {"qkv": (width + width // 4, width), "o": (width, width), "up": (11 * width, width), "norm": (width,)}
    shapes = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {f"layers.{i}.down": (width, 5 * width) for i in range(layers)} | {"head": (vocabulary, width)}
    model = nn.Module()
    for name, shape in shapes.items():
        values = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
        model.register_parameter(name.replace(".", "_"), nn.Parameter(values, requires_grad=False))
    return model


def _some(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Choose a few tensors of all shapes, since hashing on a CPU is slow."""
    yield from itertools.islice(model.named_parameters(), 6)


class _Wire:
    """Broadcasts from one thread to another on the same device, in the order of the calling streams."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._sent: queue.Queue[tuple[Tensor, Any]] = queue.Queue(maxsize=2)
        self._taken: queue.Queue[Any] = queue.Queue()

    def broadcast(self, tensor: Tensor, src: int) -> None:
        if threading.current_thread().name == "receiver":
            given, ready = self._sent.get(timeout=TIMEOUT)
            self._wait(ready)
            tensor.copy_(given)
            self._taken.put(self._mark())
        else:
            self._sent.put((tensor, self._mark()), timeout=TIMEOUT)
            self._wait(self._taken.get(timeout=TIMEOUT))

    def _mark(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._setting.cuda else None

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class _NoStream:
    def synchronize(self) -> None:
        return None


def _no_stream(stream: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _transfer(
    setting: Setting, model: nn.Module, bucket: int, before: Callable[[], None] = lambda: None
) -> tuple[float, dict[str, str], dict[str, str]]:
    """Return the seconds, and the digests that arrived and that were sent, by name. `before` runs right before the
    sending."""
    from vllm.distributed.weight_transfer import packed_tensor

    source, wire = DigestingSource(PolicySource(model, bucket_bytes=bucket), enabled=True), _Wire(setting)
    metas = [(meta.name, (list(meta.shape), meta.dtype)) for meta in source.metadata()]
    arrived: dict[str, str] = {}
    failures: list[Exception] = []

    def receive() -> None:
        try:
            packed_tensor.packed_nccl_broadcast_consumer(
                iter(metas),
                wire,
                0,
                lambda tensors: arrived.update((name, tensor_digest(tensor)) for name, tensor in tensors),
                buffer_size_bytes=bucket,
                device=setting.device,
            )
        except Exception as error:
            failures.append(error)

    with ExitStack() as stack:
        if not setting.cuda:
            stack.enter_context(patch.object(packed_tensor, "_get_streams", lambda device, n: (_NoStream(),) * n))
            stack.enter_context(patch.object(torch.accelerator, "current_device_index", lambda: 0))
            stack.enter_context(patch.object(torch.cuda, "stream", _no_stream))
        receiver = threading.Thread(target=receive, name="receiver", daemon=True)
        before()
        start = time.perf_counter()
        receiver.start()
        packed_tensor.packed_nccl_broadcast_producer(
            iter(source), wire, 0, lambda item: item[1], buffer_size_bytes=bucket
        )
        receiver.join(TIMEOUT)
        setting.wait()
        seconds = time.perf_counter() - start
    if failures or receiver.is_alive():
        raise failures[0] if failures else TimeoutError(f"the receiver was not done after {TIMEOUT:g} s")
    return seconds, arrived, source.digests()


def _after_busy_stream(setting: Setting, model: nn.Module) -> bool:
    """Send as after an optimizer step: the main stream still computes the weights while the host continues. The learner
    reads its loss before it sends, and so waits; here `setting.wait()` does that."""
    size = 8192 if setting.cuda else 64
    a = torch.randn(size, size, device=setting.device)

    def compute() -> None:
        busy = a
        for _ in range(50):
            busy = (busy @ a).clamp(-1, 1)
        for parameter in model.parameters():
            parameter.add_(busy[0, 0].to(parameter.dtype))
        setting.wait()

    _, arrived, _ = _transfer(setting, model, 64 * 2**20, compute)
    return all(arrived[name] == tensor_digest(parameter.detach()) for name, parameter in _some(model))


def _between_processes(setting: Setting) -> tuple[dict[str, Any], bool]:
    """Pass a tensor by reference (CUDA IPC, or shared memory on a CPU) to a process that copies and digests it."""
    tensor = torch.randn(2**18 if setting.small else 2**29, device=setting.device).to(torch.bfloat16)
    context = processes.get_context("spawn")
    given, answers = context.Queue(), context.Queue()
    child = context.Process(target=_read, args=(given, answers), daemon=True)
    child.start()
    try:
        given.put(tensor)
        digest, seconds = answers.get(timeout=TIMEOUT)
    finally:
        given.put(None)
        child.join(10)
        child.kill()
    nbytes = tensor.numel() * tensor.element_size()
    return {"bytes": nbytes, "copy_bytes_per_second": nbytes / seconds}, digest == tensor_digest(tensor)


def _read(given: Any, answers: Any) -> None:
    tensor = given.get(timeout=TIMEOUT)
    copy = tensor.clone()  # unmeasured: the first touch maps the memory
    _settle(tensor)
    start = time.perf_counter()
    copy.copy_(tensor)
    _settle(tensor)
    answers.put((tensor_digest(copy), time.perf_counter() - start))
    del tensor
    given.get(timeout=TIMEOUT)


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()

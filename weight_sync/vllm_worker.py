"""The engine's side of weight synchronisation, inside vLLM's worker processes.

vLLM imports this module in every worker through `worker_extension_cls`; importing it registers the gloo
transport with vLLM's factories. `PolicyWorker.receive_policy` wraps vLLM's own update, whatever the transport is, and
reports what arrived and whether it reached every layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from weight_sync.gloo import GlooInitInfo, join_group, received_buckets
from weight_sync.protocols import ParamMeta
from weight_sync.verify import digest_text, hash_words

# ---------------------------------------------------------------------------------------------------- transport


@dataclass
class GlooWorkerInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """The fields of `gloo.GlooInitInfo`, as the type that vLLM parses."""

    host: str
    port: int
    prefix: str
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Describes the tensors of the next transfer, in order. The fields are those of vLLM's NCCL backend."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def metadata(self) -> list[ParamMeta]:
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]


class GlooWeightTransferEngine(WeightTransferEngine[GlooWorkerInitInfo, GlooUpdateInfo]):  # type: ignore[misc]
    """Receives what `gloo.GlooTrainer` broadcasts, into host memory."""

    init_info_cls = GlooWorkerInitInfo
    update_info_cls = GlooUpdateInfo
    group: torch.distributed.ProcessGroupGloo | None = None
    bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooWorkerInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.bucket_bytes = init_info.bucket_bytes
        self.group = join_group(GlooInitInfo(**vars(init_info)), rank)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        group = self.group
        if group is None:
            raise RuntimeError("this engine has not joined a weight-transfer group")
        for bucket in received_buckets(group, update_info.metadata(), self.bucket_bytes):
            self.model.load_weights(bucket)  # the layerwise reload keeps views of its buffer until a layer is complete

    def shutdown(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.abort()


def register() -> None:
    """Make "gloo" known to vLLM's factories, once per process."""
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
        WeightTransferTrainerFactory.register_engine("gloo", "weight_sync.gloo", "GlooTrainer")


register()


# ---------------------------------------------------------------------------------------------------- verification


class PolicyWorker:
    """Mixed into vLLM's worker class; called on every worker of an engine through `collective_rpc`."""

    policy_names: tuple[str, ...] = ()
    """Wire names whose consumption was checked already."""

    def receive_policy(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Receive one full set of weights and load it. Returns the fields of a `verify.WeightReport`.

        After an error the model's structure is whole again, but its values are not: nothing may be generated before
        a later call succeeds."""
        worker: Any = self
        transfer = worker.weight_transfer_engine
        model = transfer.model
        names = tuple(update_info["names"])
        with recorded_loads(model, one_by_one=names != self.policy_names) as record:
            worker.start_weight_update()
            try:
                worker.update_weights(update_info)
            except BaseException:
                # Layers keep what they were given so far. Without this a second attempt would count it twice, and take
                # a layer that mixes both for complete.
                transfer.finish_weight_update()
                raise
            with record.verifying():
                wrong = uncovered_modules(model)
            with record.loading():
                worker.finish_weight_update()
                refresh_output_heads(model)
        with record.verifying():
            wrong += stale_output_heads(model)
            digests = {name: digest_text(dtype, shape, words) for name, (dtype, shape, words) in record.hashes.items()}
        self.policy_names = () if record.unconsumed else names
        return {
            "digests": digests,
            "unconsumed": record.unconsumed,
            "uncovered": wrong,
            "load_seconds": record.load_seconds,
            "verify_seconds": record.verify_seconds,
        }


class LoadRecord:
    """One transfer as the model got it, and the seconds of this process for loading and for checking it."""

    def __init__(self) -> None:
        self.hashes: dict[str, tuple[torch.dtype, torch.Size, Tensor]] = {}
        self.unconsumed: list[str] = []
        self.load_seconds = self.verify_seconds = 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.load_seconds += time.perf_counter() - begin

    @contextmanager
    def verifying(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.verify_seconds += time.perf_counter() - begin


@contextmanager
def recorded_loads(model: nn.Module, one_by_one: bool) -> Iterator[LoadRecord]:
    """Hash everything that `model.load_weights` gets. With `one_by_one`, each tensor is loaded in a call of its own,
    which shows the names that no parameter took. Whether a name is taken does not depend on the values, so the first
    transfer of a list of names does this for all later ones."""
    record = LoadRecord()
    load: Callable[[Iterable[tuple[str, Tensor]]], set[str] | None] = model.load_weights  # type: ignore[assignment]

    def load_one(name: str, tensor: Tensor) -> set[str]:
        try:
            loaded = load([(name, tensor)])
        except (LookupError, ValueError, AttributeError, AssertionError) as error:
            # The name or the shape is unknown to the model, as it would be to any other engine's: the rest is received,
            # so that nobody waits, and the report says it.
            reason = str(error).partition(". ")[0][:200]  # vLLM goes on to list all that it has
            record.unconsumed.append(f"{name} ({type(error).__name__}: {reason})")
            return set()
        if loaded is None:
            raise TypeError(f"{type(model).__name__}.load_weights does not say what it loaded")
        if not loaded:
            record.unconsumed.append(name)
        return loaded

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        batch = list(weights)
        with record.verifying():
            record.hashes |= {name: (tensor.dtype, tensor.shape, hash_words(tensor)) for name, tensor in batch}
        with record.loading():
            if not one_by_one:
                return load(batch)
            return {taken for name, tensor in batch for taken in load_one(name, tensor)}

    model.load_weights = load_weights  # type: ignore[assignment]
    try:
        yield record
    finally:
        del model.load_weights


def uncovered_modules(model: nn.Module) -> list[str]:
    """Find modules of which some weight elements were not written, while a layerwise reload is open.

    Attention modules have no weights in a checkpoint; a tied output head is covered by the module whose storage it
    shares."""
    missing: dict[str, tuple[list[int], str]] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        tensors = info.kernel_tensors[0] if info.kernel_tensors is not None else module._parameters
        addresses = [tensor.data_ptr() for tensor in tensors.values() if tensor is not None and tensor.numel()]
        expected = sum(_checkpoint_elements(module, key) for key in module._parameters)
        if not info.can_load() or info.load_numel >= expected:  # a layer that has everything is closed at once
            covered.update(addresses)
        elif not is_deferred_attention_layer(module):
            missing[name] = addresses, f"{name} ({info.load_numel} of {expected} elements)"
    return [text for addresses, text in missing.values() if not addresses or not covered.issuperset(addresses)]


def _checkpoint_elements(module: nn.Module, key: str) -> int:
    """Count the elements of a parameter that a checkpoint fills: all, except for padding rows of vocabularies."""
    parameter = module._parameters[key]
    if parameter is None:
        return 0
    if isinstance(module, VocabParallelEmbedding) and parameter.ndim:
        rows = module.shard_indices.num_org_elements + module.shard_indices.num_added_elements
        return int(rows) * (parameter.numel() // parameter.shape[0])
    return int(getattr(parameter, "weight_loader_numel", parameter.numel()))


def refresh_output_heads(model: nn.Module) -> None:
    """On CPU an output head computes with a repacked copy of its weight. A tied head is not reloaded itself, so without
    this its copy would still hold the former weights."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)


def stale_output_heads(model: nn.Module) -> list[str]:
    """Find output heads that compute with other weights than they hold, as far as `refresh_output_heads` is for them.

    A product with a unit vector is a column of the weight, exactly; three columns of a copy that is still the former
    one cannot all be equal after an update of the head."""
    stale = []
    for name, module in model.named_modules():
        if not isinstance(module, ParallelLMHead) or module.weight.device.type != "cpu":
            continue
        weight = module.weight
        columns = [0, weight.shape[1] // 2, weight.shape[1] - 1]
        units = torch.zeros(len(columns), weight.shape[1], dtype=weight.dtype)
        units[range(len(columns)), columns] = 1
        if not torch.equal(module.quant_method.apply(module, units), weight[:, columns].T):
            stale.append(f"{name} (it computes with a former copy of its weight)")
    return stale

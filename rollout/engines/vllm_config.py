"""Make the configuration of a vLLM engine, and check the installed build of vLLM."""

from __future__ import annotations

from typing import Any

from rollout.engines.protocol import EngineOptions
from vlm.adapter import MultimodalAdapter

WORKER_EXTENSION = "weight_sync.vllm_worker.PolicyWorker"
"""A class that every worker process of vLLM imports. It registers our transports and receives weights."""
CPU_BATCH_TOKENS = 16384  # tokens of one forward pass: a whole batch of short prompts at once


def engine_arguments(options: EngineOptions, adapter: MultimodalAdapter) -> dict[str, Any]:
    """Return the keyword arguments of `AsyncEngineArgs`. `rollout.engine_options` overrides all others."""
    model, rollout = options.model, options.rollout
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "seed": options.seed,
        "trust_remote_code": model.trust_remote_code,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # `SamplingParams` alone decides the sampling, not the files of the model
    }
    if adapter.modalities:
        # vLLM leaves out a tower of which nothing is to come, whose weights would then find no place. Videos share that
        # of images.
        least = {kind: 0 if kind == "video" else 1 for kind in ("image", "video", *adapter.modalities)}
        arguments["limit_mm_per_prompt"] = {**least, **options.max_media_per_prompt}
        # vLLM would normalise inside the model, videos with the statistics of images; the learner's processor does not.
        arguments["mm_device_do_normalize"] = False
        arguments["mm_processor_kwargs"] = dict(adapter.engine_processor) or None
    if rollout.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
    if rollout.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"  # inside a Ray actor vLLM would ask Ray for more actors
    if options.weight_transfer_backend is not None:
        from vllm.config import WeightTransferConfig

        arguments["weight_transfer_config"] = WeightTransferConfig(backend=options.weight_transfer_backend)
        arguments["worker_extension_cls"] = WORKER_EXTENSION
    if options.device == "cuda":
        # Needed also with kv_cache_memory_bytes: vLLM refuses to start if less than this share of the GPU is free.
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
    if options.device == "cpu":
        arguments.setdefault("kv_cache_memory_bytes", 2**30)
        arguments |= {
            "enforce_eager": True,
            # A seeded request whose prompt is cut into chunks ends the engine on CPU ("CPU Generator does not use
            # offset"), so prompts are prefilled whole.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, options.max_model_len),
            "skip_mm_profiling": True,
        }
    return {**arguments, **rollout.engine_options}


def engine_config(options: EngineOptions, adapter: MultimodalAdapter) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    # The usage decides max_num_batched_tokens on GPUs: offline 8192 or 16384 by the card, without any 2048, which cuts
    # the prompts of a few images into many small passes.
    config = AsyncEngineArgs(**engine_arguments(options, adapter)).create_engine_config(UsageContext.LLM_CLASS)
    if options.weight_transfer_backend is not None and adapter.has_vision and not config.use_v2_model_runner:
        # vLLM's first model runner (all CPUs, some GPU models) forgets the pixels of a request whose image it found in
        # the prefix cache. Once an update has emptied the caches under a running request it needs them again, and ends
        # the engine. The second runner gets them again.
        config.cache_config.enable_prefix_caching = False
    return config


def check_build(options: EngineOptions) -> None:
    from vllm.platforms import current_platform

    if (options.device == "cpu") != current_platform.is_cpu():
        raise RuntimeError(
            f"the rollout engine was asked for device {options.device!r}, but the installed vLLM is built for "
            f"{current_platform.device_type!r}; install the extra '{'cpu' if options.device == 'cpu' else 'gpu'}'"
        )

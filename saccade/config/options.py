"""From the run's configuration to the options of each room. Rooms do not know the configuration, nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from learner.types import LearnerOptions, WeightTransferOptions
from rewards.functions.format import Trace
from rewards.registry import answers_are_programs, columns_read
from rollout.data.options import DataOptions
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.types import MEDIA_PER_PROMPT
from saccade.config.demands import Device
from saccade.config.run_config import RunConfig
from saccade.config.sections import ActorRole
from saccade.errors import RunError
from vlm.adapter import MultimodalAdapter
from vlm.errors import AdapterError
from vlm.families.registry import load_adapter
from vlm.media.types import MediaKind
from vlm.user_code import short


def config_adapter(config: RunConfig) -> MultimodalAdapter:
    """The adapter of the configured model. Raises AdapterError."""
    model = config.model
    return load_adapter(
        model.path,
        model.adapter,
        trust_remote_code=model.trust_remote_code,
        max_image_tokens=model.max_image_tokens,
    )


def model_problem(error: AdapterError) -> str:
    """Say what is wrong with the configured model, and name the knob: the one in the error, or else the path."""
    text = str(error)
    return text if text.startswith("model.") else f"model.path: {text}"


def trace_shown(config: RunConfig) -> Trace:
    """Return the form of the <think> trace that `format` asks for. Reports show completions accordingly."""
    return next((f.options.get("trace", "visible") for f in config.reward.functions if f.name == "format"), "visible")


def data_options(config: RunConfig, files: Sequence[str], *, train: bool = True) -> DataOptions:
    """Return the options of a source of `files`, which hold training prompts or held-out ones."""
    needed, known = columns_read(config.reward.functions)
    return DataOptions(
        config.data,
        tuple(files),
        extra_columns=tuple(dict.fromkeys(filter(None, (*needed, config.data.columns.get("group"))))),
        optional_columns=known,
        answers_as_written=answers_are_programs(config.reward.functions),
        shuffle=config.data.shuffle or not train,
        seed=config.seed,
    )


def sampling_params(config: RunConfig, adapter: MultimodalAdapter) -> SamplingParams:
    """Return how training samples: with a temperature and banned placeholders only."""
    return SamplingParams(
        n=config.rollout.num_generations,
        max_tokens=config.rollout.max_completion_length,
        temperature=config.rollout.temperature,
        stop_token_ids=adapter.stop_token_ids,
        banned_token_ids=adapter.banned_token_ids,
    )


def evaluation_sampling(config: RunConfig, adapter: MultimodalAdapter) -> SamplingParams:
    """Return how evaluation samples: as training, but one completion per prompt, greedily by default."""
    return replace(sampling_params(config, adapter), n=1, temperature=config.evaluation.temperature)


BUCKET_MIB = {"nccl": 256, "gloo": 8}
"""MiB that are gathered and sent at once: NCCL is fast with large pieces, gloo is fastest with small ones."""


def transfer_backend(config: RunConfig, device: Device) -> str:
    """NCCL between GPUs, but gloo where an engine and a rank may share one: NCCL refuses two ranks on one device."""
    shared = {"rollout", "learner"} & config.cluster.gpu_shares.keys()
    return "nccl" if device == "cuda" and not shared else "gloo"


def require_trainable(config: RunConfig, adapter: MultimodalAdapter, device: Device) -> None:
    """Raises RunError for a model that cannot be trained on `device`."""
    if device in adapter.untrainable_on:
        raise RunError(
            f"{config.model.path} ({type(adapter).__name__}) is not trained on {device}: "
            f"{adapter.untrainable_on[device]} (saccade eval works; model.adapter can name an adapter of yours)"
        )


def weight_transfer_options(config: RunConfig, device: Device) -> WeightTransferOptions:
    """How the learner sends its weights."""
    backend = transfer_backend(config, device)
    bucket = BUCKET_MIB[backend] * 2**20
    return WeightTransferOptions(backend=backend, bucket_bytes=bucket, timeout=config.cluster.sync_timeout)


def threads_of(config: RunConfig, role: ActorRole) -> int:
    """Compute threads of one engine or rank: as many as it has CPUs. Beside a GPU they prepare images, and step an
    offloaded optimizer."""
    return max(1, int(config.cluster.resources[role]["CPU"]))


def learner_environment(config: RunConfig, device: Device) -> dict[str, str]:
    """Variables of a rank's process. Segments of GPU memory may grow, since rows of many lengths would leave holes in
    fixed ones."""
    variables = {"OMP_NUM_THREADS": str(threads_of(config, "learner"))}
    return variables if device == "cpu" else {**variables, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def engine_options(
    config: RunConfig, device: Device, media_kinds: Sequence[MediaKind], *, weights_change: bool = True
) -> EngineOptions:
    """Return the options of every engine. `weights_change=False` is for evaluating a model as it is on disk."""
    return EngineOptions(
        config.model,
        config.rollout,
        max_model_len=config.data.max_prompt_length + config.rollout.max_completion_length,
        device=device,
        threads=threads_of(config, "rollout"),
        max_media_per_prompt={kind: MEDIA_PER_PROMPT[kind] for kind in media_kinds},
        weight_transfer_backend=transfer_backend(config, device) if weights_change else None,
        seed=config.seed,
        start_timeout=config.cluster.start_timeout,
        control_timeout=config.cluster.sync_timeout,
    )


def learner_options(config: RunConfig, device: Device, media_kinds: Sequence[MediaKind]) -> LearnerOptions:
    algorithm = replace(config.algorithm, off_policy=config.off_policy)
    by_reward = algorithm.advantage == "gdpo"
    return LearnerOptions(
        config.model,
        total_steps=config.steps * algorithm.optimizer_steps,
        device=device,
        algorithm=algorithm,
        learner=config.learner,
        rollout=config.rollout,
        media_kinds=tuple(media_kinds),
        part_weights={short(f.name): f.weight for f in config.reward.functions if f.weight} if by_reward else {},
        threads=threads_of(config, "learner"),
        timeout=config.cluster.timeout,
        seed=config.seed,
    )

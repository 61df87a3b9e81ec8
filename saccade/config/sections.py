"""The knobs of a run by section, each with its unit and its default; run_config.py puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from learner.types import Offload
from rollout.data.columns import Role
from saccade.config.section import ListOfOne, Section
from vlm.roles import DEFAULT_LORA_TARGETS, LoraRole, Part

ActorRole = Literal["rollout", "learner", "reward"]
DEFAULT_CPUS: dict[ActorRole, float] = {"rollout": 1.0, "learner": 1.0, "reward": 0.5}


class ModelConfig(Section):
    path: str = Field(..., min_length=1)
    """Model to train: a directory in Hugging Face format, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of engine and learner. bfloat16 keeps float32 master weights and a float32 loss."""
    adapter: str | None = None
    """Adapter of a model family of your own, as package.module:Class (file.py:Class); by model_type otherwise."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    lora_rank: int = Field(0, ge=0)
    """Rank of a LoRA adapter to train instead of the full weights; 0 trains everything. The adapter switched off is
    the reference policy, so that no second copy of the model is held."""
    lora_alpha: float = Field(32.0, gt=0)
    """LoRA scale: updates count alpha / rank."""
    lora_targets: Annotated[tuple[LoraRole, ...], ListOfOne] = DEFAULT_LORA_TARGETS
    """Parts of the model whose linear layers get a LoRA adapter: language.attention, language.mlp, projector, vision,
    audio. The family's adapter knows the layers."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: QLoRA. The base weights of the linear layers are held in 4 bits, and adapters trained over them; the engines
    sample with the same rounded weights. Needs model.lora_rank and the package bitsandbytes."""
    max_image_tokens: int | None = Field(None, ge=1)
    """Tokens that an image may take: the processors of engine and learner shrink larger ones, or cut them into fewer
    tiles. null: as the model's own processor has it. docs/data.md says which families can."""
    freeze: Annotated[tuple[Part, ...], ListOfOne] = ()
    """Parts that stay as they are when the full weights are trained: vision, projector, audio, language."""

    @field_validator("path")
    @classmethod
    def _at_home(cls, path: str) -> str:
        return str(Path(path).expanduser()) if path.startswith("~") else path


class DataConfig(Section):
    train: Annotated[tuple[str, ...], ListOfOne]
    """Parquet, JSONL or JSON files (or glob patterns) of training prompts."""
    eval: Annotated[tuple[str, ...], ListOfOne] = ()
    """Files of held-out prompts; empty: no evaluation."""
    columns: dict[Role, str | None] = Field(default_factory=dict)
    """Which column is the prompt, image, video, audio and answer. A role that is not named goes to a column whose name
    tells (docs/data.md lists them), null to none. The prompt's own column as answer: its last turn is the answer."""
    extra_columns: Annotated[tuple[str, ...], ListOfOne] = ()
    """Further columns handed to rewards."""
    system_prompt: str | None = None
    """System message put before every prompt that has none; the word 'think_answer' stands for the shipped one."""
    prompt_template: str | None = None
    """What the last user message becomes, {prompt} standing for the row's text; markers <image>, <video>, <audio> in it
    are places for media."""
    shuffle: bool = True
    """Shuffle each epoch with the run's seed."""
    max_prompt_length: int = Field(4096, ge=1)
    """Longest prompt in tokens, images expanded."""
    overlong_prompts: Literal["refuse", "truncate"] = "refuse"
    """What becomes of longer ones. truncate: the user's text loses its beginning; media, system message and the chat
    template's tokens stay."""
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    """Largest encoded image, video or sound in bytes."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Largest image or frame, width x height."""
    max_video_frames: int = Field(8, ge=1)
    """Frames that a model is shown of a video, evenly spaced."""
    root: str | None = None
    """Folder in which paths of media start and must stay; default: the folder of the data file."""
    allow_urls: bool = False
    """Fetch media that are given as http or https URLs, each time their row comes up."""
    max_refused_share: float = Field(0.01, ge=0, le=1)
    """Share of rows that may be refused (unreadable image, no answer, too long) before the run stops."""


class RolloutConfig(Section):
    engines: int = Field(1, ge=1)
    """Number of rollout actors, each with an engine of its own."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine."""
    num_generations: int = Field(8, ge=1)
    """K, completions per prompt."""
    max_completion_length: int = Field(512, ge=1)
    """Maximum new tokens per completion."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the learner divides its logits by it too."""
    max_staleness: int = Field(1, ge=0)
    """Policy versions that a token may lag behind the weights it trains; 0 is strictly on-policy, 1 overlaps generation
    of the next batch with training of this one."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences an engine runs at once."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """KV cache in GiB; default: by gpu_memory_utilization, on CPU 1 GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that must be free when an engine starts, and that it takes without kv_cache_gib."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of vLLM's AsyncEngineArgs, as they are."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds an engine may take to start."""
    group_timeout: float = Field(600.0, gt=0)
    """Seconds one group may take to generate."""
    max_attempts: int = Field(3, ge=1)
    """Attempts at one group before it is given up and entered in the ledger with its reason."""


class RewardSpec(Section):
    name: str
    """`format`, `accuracy`, another shipped reward, or package.module:function (file.py:function)."""
    weight: float = 1.0
    """Its factor in the sum; 0: it is only recorded."""
    combine: Literal["sum", "product", "minimum"] = "sum"
    """How it enters the whole: in the sum, as a factor of the sum (a gate), or as its upper bound."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


class RewardConfig(Section):
    functions: Annotated[tuple[RewardSpec, ...], ListOfOne] = (
        RewardSpec(name="format", weight=0.5),
        RewardSpec(name="accuracy"),
    )
    """Rewards, summed by weight, or combined as each one's `combine` says."""
    trace: Literal["visible", "internal", "stripped"] = "visible"
    """The <think> trace: `visible`: asked for and shown; `internal`: asked for, and left out of what is shown;
    `stripped`: not asked for. `format` goes by it."""
    check_golds: bool = True
    """Score golds of a few hundred rows against themselves first, and do not start where they miss full marks."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Share of a batch's completions whose reward may fail (error or timeout) before the run stops."""
    actors: int = Field(1, ge=1)
    """Number of reward actors."""
    timeout: float = Field(30.0, gt=0)
    """Seconds one call on one group may take; then its worker is killed. See docs/rewards.md for what is lost."""


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1)
    """Learner processes, one GPU each."""
    prompts_per_step: int = Field(64, ge=1)
    """B, prompts (groups) of one optimizer step."""
    learning_rate: float = Field(1e-6, gt=0, validation_alias=AliasChoices("learning_rate", "lr"))
    """Peak learning rate (`lr` for short)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm to which gradients are clipped."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Language positions of one micro-batch; null: 8192, or what micro_batch_gib allows."""
    micro_batch_gib: float | None = Field(None, gt=0)
    """Memory of one micro-batch beside the model's states, as `saccade plan` predicts it; null: no such limit."""
    micro_batch_patches: int | None = Field(None, ge=1)
    """Vision patches (and frames of sound) of one micro-batch; null: as many as its tokens bring."""
    micro_batch_logits: int | None = Field(None, ge=1)
    """Positions with a loss of one micro-batch; null: as many as its tokens bring."""
    attention: Literal["auto", "blocks", "flex", "mask"] = "auto"
    """How packed groups attend; auto: blocks on CPU, flex_attention on GPUs; mask: sdpa with a mask written out."""
    feature_cache_gib: float = Field(1.0, ge=0)
    """Memory of a rank for what frozen towers make of media, so that they run once for each item; 4 times that in the
    object store; 0: no cache, and they run in every pass."""
    logprob_chunk_rows: int | None = Field(None, ge=1)
    """Rows of the vocabulary projection computed at once, which bounds the logits held; null: 64 MiB of them on CPUs,
    512 MiB on GPUs."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    offload: Offload = "none"
    """What a rank keeps in CPU memory beside its GPU: the optimizer's state, or that and the parameters (ZeRO-3)."""
    gradient_checkpointing: Annotated[tuple[Literal["language", "vision", "audio"], ...], ListOfOne] = (
        "language",
        "vision",
        "audio",
    )
    """Parts of the model whose activations are recomputed in the backward pass; [] keeps all."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds one learner call may take."""


class WeightSyncConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Transport; auto: nccl on GPUs, gloo on CPU."""
    bucket_mib: int | None = Field(None, ge=1)
    """MiB gathered and sent at once; None: 256 over nccl, 8 over gloo."""
    timeout: float = Field(300.0, gt=0)
    """Deadline of every call of one synchronisation, in seconds."""


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations on data.eval; 0: at the start and the end only."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of evaluation; 0 is greedy."""
    group_by: str | None = None
    """Column (one of data.extra_columns) whose values are reported apart."""
    max_prompts: int | None = Field(None, ge=1)
    """Held-out prompts used, drawn from all files with the run's seed; default all."""


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)
    """Steps between checkpoints: what a crash costs at most; 0: only at the end and on interruption."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""


class ClusterConfig(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where engines and learners run. auto: cuda if the cluster has GPUs."""
    resources: dict[ActorRole, dict[str, Annotated[float, Field(ge=0)]]] = Field(
        {role: {"CPU": cpus} for role, cpus in DEFAULT_CPUS.items()}
    )
    """Ray resources of one engine (`rollout`), one learner rank (`learner`) and one reward actor (`reward`): CPU,
    which is the number of its compute threads too, and custom ones that pin them to labelled nodes. GPUs follow from
    the device."""
    placement_timeout: float = Field(120.0, gt=0)
    """Seconds to wait until the cluster can place everything."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of the driver's own Prometheus endpoint; 0: none (Ray's node endpoints always have the metrics)."""

    @field_validator("resources")
    @classmethod
    def _with_cpus(cls, given: dict[ActorRole, dict[str, float]]) -> dict[ActorRole, dict[str, float]]:
        return {role: {"CPU": cpus, **given.get(role, {})} for role, cpus in DEFAULT_CPUS.items()}

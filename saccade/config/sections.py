"""The knobs of a run by section, each with its unit and its default; run_config.py puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from learner.types import DEFAULT_TOKENS, Offload
from rollout.data.columns import Role
from saccade.config.section import ListOfOne, MicroBatch, Section
from vlm.parameter_names import DEFAULT_LORA_TARGETS, LoraRole, Part

ActorRole = Literal["rollout", "learner", "reward"]
URLS = "urls"
"""The word in data.media_from that allows to fetch."""
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
    tells (docs/data.md lists them), null to none. The prompt's own column as answer: its last turn is the answer.
    group: the column whose values evaluation reports apart."""
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
    max_media_bytes: int = Field(20 * 2**20, ge=1)
    """Largest encoded image, video or sound in bytes. The largest image or frame in pixels is 2.4 times this number."""
    max_video_frames: int = Field(8, ge=1)
    """Frames that a model is shown of a video, evenly spaced."""
    media_from: Annotated[tuple[str, ...], ListOfOne] = ()
    """Where media may come from: the folder in which their paths start and must stay (without one: the data file's),
    and the word 'urls' to fetch http and https URLs, each time their row comes up."""
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
    kv_cache_gib: float | None = Field(None, gt=0)
    """KV cache in GiB; default: what is left of the engine's share of a GPU (engine_options.gpu_memory_utilization),
    on CPU 1 GiB."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of vLLM's AsyncEngineArgs, by vLLM's names: max_num_seqs (256 here), gpu_memory_utilization (0.85
    here: the share of a GPU that must be free when an engine starts, and that it takes), enforce_eager, ..."""


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
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
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
    micro_batch: MicroBatch = DEFAULT_TOKENS
    """What one micro-batch may hold: language positions (8192), or memory beside the model's states, as `saccade plan`
    predicts it (12 GiB)."""
    feature_cache_gib: float = Field(1.0, ge=0)
    """Memory of a rank in which features (or tower outputs) of frozen towers are cached, so that they run once for each
    item; 4 times that in the object store; 0: no cache, and they run in every pass."""
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

    @property
    def micro_batch_tokens(self) -> int | None:
        """The limit in language positions; None where it is one of memory."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    @property
    def micro_batch_bytes(self) -> int | None:
        """The limit in bytes; None where it is one of positions."""
        return None if isinstance(self.micro_batch, int) else round(float(self.micro_batch.split()[0]) * 2**30)


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations on data.eval; 0: at the start and the end only."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of evaluation; 0 is greedy."""
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
    timeout: float = Field(1800.0, gt=0)
    """Seconds in which a call on the learner must end. A third of it is the limit for everything to be placed, for
    actors to start, and for one group to be generated; a sixth for each call of a weight sync."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of the driver's own Prometheus endpoint; 0: none (Ray's node endpoints always have the metrics)."""

    @field_validator("resources")
    @classmethod
    def _with_cpus(cls, given: dict[ActorRole, dict[str, float]]) -> dict[ActorRole, dict[str, float]]:
        return {role: {"CPU": cpus, **given.get(role, {})} for role, cpus in DEFAULT_CPUS.items()}

    @property
    def gpu_shares(self) -> dict[ActorRole, float]:
        """The roles whose actors are given a part of a GPU, which another actor may share."""
        return {role: asked["GPU"] for role, asked in self.resources.items() if 0 < asked.get("GPU", 1) < 1}

    @property
    def start_timeout(self) -> float:
        """Seconds in which everything must be placed, and then started."""
        return self.timeout / 3

    @property
    def group_timeout(self) -> float:
        """Seconds in which the completions of one group must be generated."""
        return self.timeout / 3

    @property
    def sync_timeout(self) -> float:
        """Seconds in which each call of a weight sync must end."""
        return self.timeout / 6

"""Fields of TRL's GRPOConfig (1.16) as knobs.

A field is carried over by SAME, CHOICES or RULES; or it is one of HONOURED, since what it asks for is done anyway; or
it must be at TRL's default. Whatever else a user set is an error that names it, all at once.

What has no field: TRL samples each batch with the newest weights, so `rollout.max_staleness` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from saccade.trainer.fields import Fields, Knobs, RefusedError
from saccade.trainer.trl_loss import DEFAULT_MODE, correction, kl, loss

SAME = {
    "output_dir": "output_dir",
    "seed": "seed",
    "learning_rate": "learner.learning_rate",
    "weight_decay": "learner.weight_decay",
    "max_grad_norm": "learner.max_grad_norm",
    "num_generations": "rollout.num_generations",
    "max_completion_length": "rollout.max_completion_length",
    "temperature": "rollout.temperature",
    "shuffle_dataset": "data.shuffle",
    "trust_remote_code": "model.trust_remote_code",
}
"""Field -> the knob that takes its value."""

CHOICES: Mapping[str, Mapping[Any, Knobs]] = {
    "lr_scheduler_type": {
        "linear": {"learner.lr_schedule": "linear"},
        "cosine": {"learner.lr_schedule": "cosine"},
        "constant": {"learner.lr_schedule": "constant"},
        "constant_with_warmup": {"learner.lr_schedule": "constant"},
    },
    "mask_truncated_completions": {False: {}, True: {"algorithm.overlong": "mask"}},
    "gradient_checkpointing": {True: {}, False: {"learner.gradient_checkpointing": []}},
    "use_cpu": {False: {}, True: {"cluster.device": "cpu"}},
    "optim": {"adamw_torch": {}, "adamw_torch_fused": {}},
}
"""Field -> its values that can be had, with the knobs for each."""

HONOURED = frozenset(
    [
        *("logging_strategy", "logging_steps", "logging_first_step"),  # every step is written to metrics.jsonl
        *("disable_tqdm", "dataloader_pin_memory", "pad_to_multiple_of"),  # TRL itself sets them, by the device
        "use_vllm",  # engines are vLLM's
        *("per_device_eval_batch_size", "do_train", "do_eval"),  # engines batch by themselves; methods say what to do
        "eval_on_start",  # a run with held-out data evaluates at its start
        "gradient_checkpointing_kwargs",  # how activations are recomputed changes no result
    ]
)
"""Fields that may have any value."""

DEFAULTS = {
    "output_dir": "trainer_output",
    "seed": 42,
    "learning_rate": 1e-6,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "num_generations": 8,
    "max_completion_length": 512,
    "temperature": 1.0,
    "vllm_tensor_parallel_size": 1,
    "shuffle_dataset": True,
    "trust_remote_code": False,
    "beta": 0.0,
    "lr_scheduler_type": "linear",
    "mask_truncated_completions": False,
    "gradient_checkpointing": True,
    "use_cpu": False,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "use_bias_correction_kl": True,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": DEFAULT_MODE,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "bf16": None,
    "fp16": False,
    "model_init_kwargs": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "report_to": "none",
}
"""TRL's defaults of the fields that are carried over: an object with some of its fields has the others at these."""


def carry_over(args: Any, rows: int | None, ranks: int, vary: bool) -> tuple[Knobs, list[str], list[float] | None]:
    """The knobs by dotted name, what cannot be carried over, and the weights of the rewards if there are any.

    `rows`: of the training data, None if not known; `ranks`: learner ranks, TRL's processes; `vary`: `ratios_vary` of
    all settings."""
    fields = Fields(args, DEFAULTS | {"reward_weights": None}, "args")
    knobs: Knobs = {"rollout.max_staleness": 0, **{knob: fields[field] for field, knob in SAME.items()}}
    problems = []
    for field, choices in CHOICES.items():
        if (value := fields[field]) in choices:
            knobs |= choices[value]
        else:
            problems.append(f"args.{field}={value!r}: here it can be {', '.join(map(repr, choices))}")
    rules: tuple[Callable[[Fields], Knobs], ...] = (partial(loss, vary=vary), partial(kl, vary=vary), *RULES)
    for rule in rules:
        try:
            knobs |= rule(fields)
        except RefusedError as refusal:
            problems.append(f"args.{refusal}")
    for sized in (_prompts_per_step, _steps):
        try:
            knobs |= sized(fields, knobs, rows, ranks)
        except RefusedError as refusal:
            problems.append(f"args.{refusal}")
    weights = fields["reward_weights"]
    return knobs, [*problems, *fields.refused(HONOURED)], weights


def is_trl(args: Any) -> bool:
    """Whether an object has fields of a GRPOConfig."""
    return any(hasattr(args, field) for field in DEFAULTS)


# --- fields that say something together -------------------------------------------------------------------------------


def _prompts_per_step(fields: Fields, knobs: Knobs, rows: int | None, ranks: int) -> Knobs:
    """TRL counts completions for each process: of those of one optimizer step, K are of one prompt."""
    each, accumulated, siblings = (
        fields[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    generated, batch = fields["steps_per_generation"], fields["generation_batch_size"]
    reused = accumulated if generated is None else generated
    if reused != accumulated or (batch is not None and batch % (each * reused)):
        raise RefusedError(
            f"steps_per_generation={generated}, generation_batch_size={batch}: a batch of completions is one optimizer "
            "step here; several are learner.prompts_per_step and algorithm.optimizer_steps"
        )
    completions = each * accumulated * ranks
    if completions % siblings:
        raise RefusedError(
            f"per_device_train_batch_size={each} x gradient_accumulation_steps={accumulated} x {ranks} learner rank(s) "
            f"= {completions} completions, which num_generations={siblings} does not divide"
        )
    return {"learner.prompts_per_step": completions // siblings}


def _steps(fields: Fields, knobs: Knobs, rows: int | None, ranks: int) -> Knobs:
    steps, epochs, warmup = fields["max_steps"], fields["num_train_epochs"], fields["warmup_steps"]
    prompts = knobs.get("learner.prompts_per_step")
    if steps <= 0:
        if rows is None or prompts is None:
            raise RefusedError(f"num_train_epochs={epochs}: rows of files are not counted beforehand; give max_steps")
        steps = math.ceil(epochs * (rows // prompts))
    if steps <= 0:
        raise RefusedError(f"num_train_epochs={epochs}: {rows} rows are fewer than the {prompts} prompts of a step")
    return {"steps": steps, "learner.warmup_steps": math.ceil(warmup * steps) if 0 < warmup < 1 else int(warmup)}


def _advantage(fields: Fields) -> Knobs:
    scale, order = fields["scale_rewards"], fields["multi_objective_aggregation"]
    if order == "normalize_then_sum":
        return {"algorithm.advantage": "gdpo"}
    names = {"group": "grpo", True: "grpo", "none": "dr_grpo", False: "dr_grpo"}
    if scale not in names:
        raise RefusedError(f"scale_rewards={scale!r}: here it can be 'group' or 'none'")
    return {"algorithm.advantage": names[scale]}


def _optimizer(fields: Fields) -> Knobs:
    return {"learner.betas": [fields["adam_beta1"], fields["adam_beta2"]]}


def _precision(fields: Fields) -> Knobs:
    if fields["fp16"]:
        raise RefusedError("fp16=True: here a model is trained in bfloat16 or float32")
    init = dict(fields["model_init_kwargs"] or {})
    given = [init.pop(name) for name in ("dtype", "torch_dtype") if name in init]
    if init:
        raise RefusedError(f"model_init_kwargs={init!r}: of these only dtype has a counterpart here")
    named = str(given[0]).removeprefix("torch.") if given else "auto"
    if named not in ("auto", "bfloat16", "float32"):
        raise RefusedError(f"model_init_kwargs: dtype={named}: here it can be bfloat16 or float32")
    mixed = fields["bf16"] is None or fields["bf16"]
    return {"model.dtype": "bfloat16" if mixed or named == "bfloat16" else "float32"}


def _engine(fields: Fields) -> Knobs:
    """An engine has a GPU of its own here, so that TRL's default share of a GPU is none to carry over."""
    share, longest = fields["vllm_gpu_memory_utilization"], fields["vllm_max_model_length"]
    knobs: Knobs = {}
    if share != DEFAULTS["vllm_gpu_memory_utilization"]:
        knobs["rollout.engine_options.gpu_memory_utilization"] = share
    if fields["vllm_tensor_parallel_size"] > 1:
        knobs["rollout.engine_options.tensor_parallel_size"] = fields["vllm_tensor_parallel_size"]
    if longest is not None:
        knobs["data.max_prompt_length"] = longest - fields["max_completion_length"]
    return knobs


def _saving_and_evaluation(fields: Fields) -> Knobs:
    kept = fields["save_total_limit"]
    knobs: Knobs = {} if kept is None else {"checkpoint.keep": kept}
    for kind, knob in (("save", "checkpoint.every"), ("eval", "evaluation.every")):
        strategy, every = fields[f"{kind}_strategy"], fields[f"{kind}_steps"]
        if strategy == "no":
            knobs[knob] = 0
        elif strategy != "steps" or every is None or every < 1:
            raise RefusedError(
                f"{kind}_strategy={strategy!r}, {kind}_steps={every}: only 'steps' with a positive interval is "
                "supported"
            )
        else:
            knobs[knob] = int(every)
    return knobs


def _reports(fields: Fields) -> Knobs:
    if (wanted := fields["report_to"]) not in (None, "none", [], ["none"]):
        raise RefusedError(f"report_to={wanted!r}: figures go to metrics.jsonl and to Prometheus here; use 'none'")
    return {}


RULES: tuple[Callable[[Fields], Knobs], ...] = (
    *(_advantage, correction, _optimizer, _precision, _engine, _saving_and_evaluation, _reports),
)

"""Find sections that contradict each other, although each by itself is valid."""

from __future__ import annotations

from learner.types import precision_problems, quantization_problems
from saccade.config.algorithm_checks import algorithm_problems
from saccade.config.engine_checks import engine_option_problems
from saccade.config.idle_knobs import idle_problems
from saccade.config.run_fields import RunFields
from vlm.config import role_problems


def problems(config: RunFields) -> list[str]:
    """Violations that involve several fields; each names them and says what to do."""
    found = []
    model, rollout, learner = config.model, config.rollout, config.learner
    found += algorithm_problems(config)
    found += idle_problems(config)
    found += engine_option_problems(rollout.engine_options)
    found += [f"model.{text}" for text in role_problems(model)]
    found += [f"model.lora.{text}" for text in quantization_problems(model, learner)]
    found += [f"learner.{text}" for text in precision_problems(model, learner)]
    if learner.offload == "parameters" and learner.zero_stage != 3:
        found.append(f"learner.offload=parameters needs learner.zero_stage=3, not {learner.zero_stage}")
    if learner.offload == "optimizer" and learner.zero_stage == 0:
        found.append("learner.offload=optimizer needs learner.zero_stage of at least 1")
    longest = config.data.max_prompt_length + rollout.max_completion_length
    tokens = learner.micro_batch_tokens
    if tokens is not None and longest > tokens:
        found.append(
            f"learner.micro_batch={tokens} cannot hold one sample of up to "
            f"data.max_prompt_length + rollout.max_completion_length = {longest} tokens"
        )
    if learner.lr_schedule.name != "constant" and learner.warmup_steps >= config.steps:
        found.append(
            f"learner.warmup_steps={learner.warmup_steps} must be less than steps={config.steps}, or no step is left "
            "for the decay"
        )
    found += _shared_gpu_problems(config)
    if len(folders := config.data.folders) > 1:
        found.append(f"data.media_from={list(folders)}: name a single folder that contains all media")
    if "prompt" in config.data.columns and config.data.columns["prompt"] is None:
        found.append("data.columns.prompt=null: without prompts there is nothing to train on; name their column")
    template = config.data.prompt_template
    if template is not None and template.count("{prompt}") != 1:
        found.append(f"data.prompt_template={template!r}: {{prompt}} must appear in it once, for the row's text")
    if not config.data.train:
        found.append("data.train names no files: there is nothing to train on")
    if not config.reward.functions:
        found.append("reward.functions is empty: nothing would be learned")
    return found


def _shared_gpu_problems(config: RunFields) -> list[str]:
    """An engine and a learner rank with `GPU: 0.5` each may share one: what cannot work on a share."""
    rollout, found = config.rollout, []
    shares = config.cluster.gpu_shares
    where = ", ".join(f"cluster.resources.{role}.GPU={share:g}" for role, share in shares.items())
    if "learner" in shares and config.learner.ranks > 1:
        found.append(f"{where}: learner ranks may share a GPU, and NCCL refuses that; use learner.ranks=1")
    if "rollout" in shares and rollout.tensor_parallel_size > 1:
        found.append(f"{where}: an engine on a share of a GPU needs rollout.engine_options.tensor_parallel_size=1")
    taken = rollout.gpu_memory_utilization
    if taken > shares.get("rollout", 1.0):
        found.append(
            f"{where}: rollout.engine_options.gpu_memory_utilization={taken:g} is more than the engine's share; "
            "lower it to what the learner leaves free"
        )
    return found

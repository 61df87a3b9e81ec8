"""Knobs of former versions: what each is called now, and what its value becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from rollout.data.config import PIXELS_PER_BYTE


class Now(NamedTuple):
    """Where a former knob is now."""

    knob: str | None
    """None: there is no such knob any more."""
    value: Callable[[Any], Any] = lambda value: value
    """The former value -> the present one; None: it cannot be carried over."""
    remark: str = ""
    """A further remark for the user."""


def _nothing(value: Any) -> None:
    return None


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor if isinstance(value, int | float) else None


def _where(condition: Callable[[Any], bool], result: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: result(value) if condition(value) else None


RENAMED: Mapping[str, Now] = {
    "model.lora_rank": Now("model.lora.rank", lambda value: value or None, "model.lora=null trains all weights"),
    "model.lora_alpha": Now("model.lora.alpha"),
    "model.lora_targets": Now("model.lora.targets"),
    "model.quantize": Now("model.lora.quantize"),
    "data.extra_columns": Now(
        None,
        remark="columns that a reward's parameters (or its option `column`) name are read, and data.columns.group",
    ),
    "data.max_image_bytes": Now("data.max_media_bytes"),
    "data.max_image_pixels": Now("data.max_media_bytes", lambda pixels: round(pixels / PIXELS_PER_BYTE)),
    "data.root": Now("data.media_from"),
    "data.allow_urls": Now("data.media_from", _where(bool, lambda value: "urls")),
    "rollout.tensor_parallel_size": Now("rollout.engine_options.tensor_parallel_size"),
    "rollout.max_num_seqs": Now("rollout.engine_options.max_num_seqs"),
    "rollout.gpu_memory_utilization": Now("rollout.engine_options.gpu_memory_utilization"),
    "rollout.start_timeout": Now("cluster.timeout", _times(3), "a third of it is the limit for the start"),
    "rollout.group_timeout": Now("cluster.timeout", _times(3), "a third of it is the limit for one group"),
    "rollout.max_attempts": Now(None, remark="a group is tried three times"),
    "reward.trace": Now(
        "reward.functions",
        lambda value: [{"name": "format", "weight": 0.5, "options": {"trace": value}}, {"name": "accuracy"}],
        "it is an option of the reward `format`",
    ),
    "algorithm.normalize_parts": Now("algorithm.advantage", _where(bool, lambda value: "gdpo")),
    "algorithm.clip_eps_low": Now("algorithm.loss.low"),
    "algorithm.clip_eps_high": Now("algorithm.loss.high"),
    "algorithm.clip_dual": Now("algorithm.loss.dual"),
    "algorithm.beta": Now("algorithm.kl.weight", lambda value: value or None, "algorithm.kl=null loads no reference"),
    "algorithm.kl_estimator": Now("algorithm.kl.estimator"),
    "algorithm.kl_in": Now("algorithm.kl.where"),
    "algorithm.reference_every": Now("algorithm.kl.refresh"),
    "algorithm.old_policy": Now("algorithm.off_policy"),
    "algorithm.correction": Now("algorithm.off_policy", lambda value: "auto" if value == "none" else value),
    "algorithm.correction_range": Now("algorithm.off_policy.max", lambda pair: pair[1], "and .min for the smallest"),
    "algorithm.overlong_buffer": Now("algorithm.overlong", lambda value: value or "keep"),
    "algorithm.mask_truncated": Now("algorithm.overlong", lambda value: "mask" if value else "keep"),
    "learner.lr": Now("learner.learning_rate"),
    "learner.min_lr_ratio": Now("learner.lr_schedule.min_ratio"),
    "learner.micro_batch_tokens": Now("learner.micro_batch"),
    "learner.micro_batch_gib": Now("learner.micro_batch", lambda value: f"{value} GiB"),
    "learner.micro_batch_patches": Now("learner.micro_batch", _nothing, "a limit of memory counts patches too"),
    "learner.micro_batch_logits": Now("learner.micro_batch", _nothing, "a limit of memory counts logits too"),
    "learner.attention": Now(None, remark="it follows the device: blocks on CPUs, flex_attention on GPUs"),
    "learner.logprob_chunk_rows": Now(None, remark="64 MiB of logits are held on CPUs, 512 MiB on GPUs"),
    "learner.timeout": Now("cluster.timeout"),
    "weight_sync": Now(None, remark="its transport follows cluster.device; its deadline is a sixth of cluster.timeout"),
    "evaluation.group_by": Now("data.columns.group"),
    "cluster.placement_timeout": Now("cluster.timeout", _times(3), "a third of it is the limit for the placement"),
}
"""Former knob, or section -> where it is now."""


def renamed(where: str, value: Any) -> str | None:
    """Say what to write in place of a former knob, with its value if that can be carried over. None if there never was
    such a knob."""
    if (now := RENAMED.get(where)) is None:
        return None
    remark = f" ({now.remark})" if now.remark else ""
    if now.knob is None:
        return f"{where}: this knob no longer exists; leave it out{remark}"
    try:
        carried = now.value(value)
    except (TypeError, ValueError, IndexError):
        carried = None
    if carried is None:
        return f"{where}: this knob is now {now.knob}{remark}"
    text = yaml.safe_dump(carried, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    return f"{where}={json.dumps(value, default=str)}: this knob is now {now.knob}; write {now.knob}={text}{remark}"

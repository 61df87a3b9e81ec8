"""Knobs of former versions are refused with what to write instead."""

from __future__ import annotations

import re
from typing import Any

import pytest

from saccade.config.knobs import choices, knobs
from saccade.config.load import apply_overrides, parse_config
from saccade.config.messages import ConfigError
from saccade.config.renamed import RENAMED
from tests.unit.saccade.test_config import MINIMAL

FORMER: dict[str, tuple[Any, str]] = {
    "data.extra_columns": (["kind"], ""),
    "data.max_image_bytes": (2**20, "data.max_media_bytes=1048576"),
    "data.max_image_pixels": (50_000_000, "data.max_media_bytes=20971520"),
    "data.root": ("/images", "data.media_from=/images"),
    "data.allow_urls": (True, "data.media_from=urls"),
    "rollout.max_num_seqs": (512, "rollout.engine_options.max_num_seqs=512"),
    "rollout.tensor_parallel_size": (2, "rollout.engine_options.tensor_parallel_size=2"),
    "rollout.gpu_memory_utilization": (0.5, "rollout.engine_options.gpu_memory_utilization=0.5"),
    "rollout.start_timeout": (600, "cluster.timeout=1800"),
    "rollout.group_timeout": (900, "cluster.timeout=2700"),
    "rollout.max_attempts": (2, ""),
    "reward.trace": (
        "internal",
        "reward.functions=[{name: format, options: {trace: internal}, weight: 0.5}, {name: accuracy}]",
    ),
    "algorithm.normalize_parts": (True, "algorithm.advantage=gdpo"),
    "model.lora_rank": (8, "model.lora.rank=8"),
    "model.lora_alpha": (16.0, "model.lora.alpha=16.0"),
    "model.lora_targets": (["vision"], "model.lora.targets=[vision]"),
    "model.quantize": ("nf4", "model.lora.quantize=nf4"),
    "algorithm.clip_eps_low": (0.1, "algorithm.loss.low=0.1"),
    "algorithm.clip_eps_high": (0.28, "algorithm.loss.high=0.28"),
    "algorithm.clip_dual": (3.0, "algorithm.loss.dual=3.0"),
    "algorithm.beta": (0.1, "algorithm.kl.weight=0.1"),
    "algorithm.kl_estimator": ("k2", "algorithm.kl.estimator=k2"),
    "algorithm.kl_in": ("reward", "algorithm.kl.where=reward"),
    "algorithm.reference_every": (5, "algorithm.kl.refresh=5"),
    "algorithm.old_policy": ("behavior", "algorithm.off_policy=behavior"),
    "algorithm.correction": ("tis", "algorithm.off_policy=tis"),
    "algorithm.correction_range": ([0.1, 3.0], "algorithm.off_policy.max=3.0"),
    "learner.min_lr_ratio": (0.1, "learner.lr_schedule.min_ratio=0.1"),
    "algorithm.overlong_buffer": (0.2, "algorithm.overlong=0.2"),
    "algorithm.mask_truncated": (True, "algorithm.overlong=mask"),
    "learner.lr": (1e-6, "learner.learning_rate=1.0e-06"),
    "learner.micro_batch_tokens": (16384, "learner.micro_batch=16384"),
    "learner.micro_batch_gib": (12, "learner.micro_batch=12 GiB"),
    "learner.micro_batch_patches": (1024, ""),
    "learner.micro_batch_logits": (1024, ""),
    "learner.attention": ("flex", ""),
    "learner.logprob_chunk_rows": (64, ""),
    "learner.timeout": (60, "cluster.timeout=60"),
    "weight_sync": ({"timeout": 60}, ""),
    "evaluation.group_by": ("kind", "data.columns.group=kind"),
    "cluster.placement_timeout": (120, "cluster.timeout=360"),
}
"""Former knob -> a value of it, and what to write instead where that can be said."""


BESIDE = {
    "data.columns.group": "data.eval=[x.parquet]",
    "algorithm.kl.": "algorithm.kl=0.1",
    "algorithm.off_policy.max": "algorithm.off_policy=tis",
    "learner.lr_schedule.min_ratio": "learner.lr_schedule=linear",
}
"""What the knobs of a choice are written beside: the choice."""


def told(knob: str, value: Any) -> str:
    """What is said of the former knob."""
    section, _, name = knob.rpartition(".")
    own = {**MINIMAL.get(section, {}), name: value}
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **({section: own} if section else {name: value})})
    (problem,) = (p for p in caught.value.problems if p.startswith(knob))
    return problem


def test_every_former_knob_is_tried() -> None:
    assert set(FORMER) == set(RENAMED)


@pytest.mark.parametrize("knob", FORMER)
def test_a_former_knob_says_what_to_write_and_that_is_taken(knob: str) -> None:
    value, instead = FORMER[knob]
    problem = told(knob, value)
    names = set(knobs()) | set(choices())
    if (now := RENAMED[knob].knob) is None:
        assert "this knob no longer exists" in problem
        return
    assert any(now == name or now.startswith(f"{name}.") for name in names) and now in problem
    written = re.search(r"write (.*?)(?: \(|$)", problem)
    assert (written[1] if written else "") == instead
    if instead:
        beside = [part for start, part in BESIDE.items() if instead.startswith(start)]
        tree = {name: dict(v) if isinstance(v, dict) else v for name, v in MINIMAL.items()}
        assert apply_overrides(tree, [*beside, instead]) == []
        parse_config(tree)


def test_a_value_that_cannot_be_carried_over_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("rollout.start_timeout", "long").startswith("rollout.start_timeout: this knob is now cluster.timeout")
    assert "write" not in told("algorithm.normalize_parts", False)
    assert "(algorithm.kl=null loads no reference)" in (none := told("algorithm.beta", 0.0)) and "write" not in none

"""`saccade plan`: the memory of a learner rank and the operations of a step, predicted from a configuration alone.

configuration ──▶ adapter, LearnerOptions ──▶ ModelShape (meta device: no weights) ─┬─▶ MemoryPlan ─┬─▶ table, JSON
data files ──▶ lengths of prompts, patches of images (or the configuration's limits) ┴─▶ Flops ──────┘
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from learner.batching.packing import balance, fewest_bins, pack_padded, split_group
from learner.batching.rows import shares_prompts
from learner.durable import strict_json
from learner.plan.flops import Flops, GroupShape
from learner.plan.memory import Load, MemoryPlan
from learner.plan.model_shape import ModelShape
from learner.plan.predict import predict
from learner.types import LearnerOptions
from rollout.data.source import DataError
from saccade.checks.memory import GIB, planned_device
from saccade.checks.references import WHERE, load_model, open_set
from saccade.config.demands import Device
from saccade.config.messages import ConfigError
from saccade.config.options import learner_options
from saccade.config.run_config import RunConfig
from saccade.observe.screen import say, show
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind

LOOKED_AT = 256
"""How many rows of the training data are measured."""
TERA = 1e12


@dataclass(frozen=True)
class Plan:
    """Everything that the command prints."""

    device: Device
    options: LearnerOptions
    shape: ModelShape
    group: GroupShape
    load: Load
    memory: MemoryPlan
    flops: Flops
    """Operations of one step on all ranks."""
    assumed: str
    """The source of the lengths."""


def plan_run(config: RunConfig, console: Console, path: Path | None) -> None:
    """Print the plan and, if `path` is given, write it there as JSON. Raises ConfigError."""
    plan = make_plan(config)
    say(console, _head(plan))
    show(console, _memory_table(plan), _flops_table(plan))
    say(console, f"Assumed: {plan.assumed}.")
    say(console, advice(plan))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(strict_json(as_json(plan), 1) + "\n")


def make_plan(config: RunConfig) -> Plan:
    """Read the model's configuration and processor and the beginning of the data, and make the plan. Raises
    ConfigError."""
    device = planned_device(config)
    adapter = load_model(config)
    group, kinds, assumed = _typical_group(config, adapter)
    try:
        predicted = predict(learner_options(config, device, kinds), adapter)
    except ValueError as error:
        raise ConfigError([f"model: {error}"], WHERE) from error
    options, shape = predicted.options, predicted.shape
    if shape.vision is not None:
        group = GroupShape(group.prompt, group.completions, [round(n * shape.patches_per_token) for n in group.images])
    shared = shares_prompts(adapter)
    try:
        rows = rows_of(group, options, shared)
    except ValueError as error:
        raise ConfigError([f"learner.micro_batch: {error}"], WHERE) from error
    load = micro_batch(options, rows, shared)
    if not shared:  # siblings are adjacent, and their images are encoded once
        rows = [replace(row, images=row.images if i == 0 else ()) for i, row in enumerate(rows)]
    return Plan(
        device,
        options,
        shape,
        group,
        load,
        predicted.memory(load),
        predicted.flops(rows * config.learner.prompts_per_step),
        assumed,
    )


def _typical_group(config: RunConfig, adapter: MultimodalAdapter) -> tuple[GroupShape, tuple[MediaKind, ...], str]:
    """Return a typical group of the run (with the size of its images in tokens), the kinds of media in the data, and a
    text that says what both are based on.

    Completions have the largest allowed length, since the real length is not known."""
    completions = [config.rollout.max_completion_length] * config.rollout.num_generations
    told = f"completions of {completions[0]} tokens (the limit)"
    try:
        data = open_set(config, "data.train", adapter)
        prompts = [prompt for prompt in data.source.look(LOOKED_AT) if prompt is not None]
        if not prompts:
            raise DataError(f"none of the first {LOOKED_AT} rows can be used")
    except DataError as error:
        kinds: tuple[MediaKind, ...] = ("image",) if adapter.has_vision else ()
        longest = config.data.max_prompt_length
        reason = "; ".join(line.strip(" -") for line in str(error).splitlines())
        group = GroupShape(longest, completions, [longest] if kinds else [])
        return group, kinds, f"prompts of {longest} tokens, all of them an image's, because of {reason}; {told}"
    kinds = data.media_kinds(adapter)
    images = [adapter.media_lengths(prompt.media) for prompt in prompts]
    length = round(float(np.mean([prompt.expanded_length for prompt in prompts])))
    count = round(float(np.mean([len(own) for own in images])))
    each = round(float(np.mean([n for own in images for n in own] or [0])))
    basis = f"prompts of {length} tokens, {count} image(s) of {each} among them, the mean of {len(prompts)} rows"
    return GroupShape(length, completions, [each] * count), kinds, f"{basis}; {told}"


def rows_of(group: GroupShape, options: LearnerOptions, shared: bool) -> list[GroupShape]:
    """Split one group into rows: the whole group, its parts if it exceeds a micro-batch, or, with padding, each
    completion by itself. Raises ValueError if the prompt with one completion does not fit a micro-batch."""
    own = [options.size(n, 0, n) for n in group.completions]
    parts = split_group(options.size(group.prompt, sum(group.images), 0), own, options.micro_batch)
    members = parts if shared else [[i] for i in range(len(own))]
    return [GroupShape(group.prompt, [group.completions[i] for i in part], group.images) for part in members]


def micro_batch(options: LearnerOptions, rows: Sequence[GroupShape], shared: bool) -> Load:
    """Return the largest micro-batch of a rank, and how many micro-batches it has in a step, if all groups are laid out
    as `rows`."""
    groups = math.ceil(options.learner.prompts_per_step / options.learner.ranks / options.algorithm.optimizer_steps)
    laid = [row for _ in range(groups) for row in rows]
    sizes = np.array([options.size(row.tokens, sum(row.images), sum(row.completions)) for row in laid], np.int64)
    limits = options.micro_batch
    bins = fewest_bins(sizes, limits) if shared else pack_padded(sizes, limits)
    bins = balance(bins, sizes, limits, [row.tokens for row in laid], len(bins), additive=shared)

    def load(members: Sequence[int]) -> Load:
        tokens, patches, trained, _ = sizes[list(members)].sum(0).tolist()
        if not shared:  # padded to the longest; the images of siblings in one micro-batch are encoded once
            tokens = len(members) * int(sizes[list(members), 0].max())
            patches = sum(laid[0].images) * len({i // len(rows) for i in members})
        return Load(tokens, trained, patches, len(bins))

    return max(map(load, bins), key=lambda each: (each.tokens, each.patches))


def _head(plan: Plan) -> str:
    model, learner, shape = plan.options.model, plan.options.learner, plan.shape
    by_role = ", ".join(f"{role} {count / 1e6:,.1f}M" for role, count in shape.parameters.items())
    checkpointed = " and ".join(learner.gradient_checkpointing) or "off"
    return (
        f"{model.path}: {shape.total / 1e6:,.1f}M parameters ({by_role}), {shape.total_trained / 1e6:,.1f}M "
        f"trained; {model.dtype} on {plan.device}, {learner.ranks} rank(s), ZeRO-{learner.zero_stage}, checkpointing "
        f"{checkpointed}"
    )


def _memory_table(plan: Plan) -> Table:
    memory, load = plan.memory, plan.load
    table = Table(
        title=f"memory of a rank, GiB: {load.micro_batches} micro-batch(es) a step of {load.tokens} tokens, "
        f"{load.rows} of them trained, {load.patches} patches"
    )
    table.add_column("kind")
    table.add_column("device", justify="right")
    table.add_column("host", justify="right")
    for kind, count in memory.device.items():
        table.add_row(kind, _gib(count), _gib(memory.host.get(kind, 0.0)))
    table.add_section()
    table.add_row(f"at the peak, {memory.phase}", _gib(memory.peak), _gib(memory.host_total))
    return table


def _flops_table(plan: Plan) -> Table:
    table = Table(title="operations of a step on all ranks, TFLOP")
    parts = asdict(plan.flops)
    for name in (*parts, "total"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{value / TERA:,.4g}" for value in (*parts.values(), plan.flops.total)))
    return table


def _gib(count: float) -> str:
    return f"{count / GIB:,.3f}" if count else ""


def advice(plan: Plan) -> str:
    """Say in one sentence what takes most of the memory at the peak, and which knob lowers it."""
    memory = plan.memory
    # Not everything is in memory at the peak: the memory of the step comes after the activations are freed.
    later = memory.phase in ("optimizer step", "reduction of gradients")
    absent = ("activations", "logits chunk", "vision") if later else ("workspace",)
    there = {kind: count for kind, count in memory.device.items() if kind not in absent}
    kind = max(there, key=lambda name: there[name])
    return f"Most of the peak ({memory.phase}) is {kind}, {_gib(there[kind])} GiB: {_remedy(kind, plan)}."


def _remedy(kind: str, plan: Plan) -> str:
    learner = plan.options.learner
    smaller = f"lower learner.micro_batch ({plan.memory.units.token / 2**20:.2f} MiB a token)"
    if kind == "activations":
        on = "language" in learner.gradient_checkpointing
        return smaller if on else f"learner.gradient_checkpointing=[language], or {smaller}"
    if kind == "vision":
        first = "" if "vision" in learner.gradient_checkpointing else "learner.gradient_checkpointing=[vision], "
        return f"{first}model.freeze=[vision], a lower model.max_image_tokens, or {smaller}"
    if kind == "logits chunk":
        head = 4 * plan.shape.vocabulary * plan.shape.hidden if plan.shape.head_trained else 0
        return f"a fixed amount (the head's own gradient is {_gib(head) or 0} GiB of it), so the batch may grow"
    if kind == "inputs":
        return "a lower model.max_image_tokens, or more learner.ranks"
    if kind == "parameters":
        divided = learner.ranks > 1 and learner.zero_stage == 3
        return smaller if divided else "learner.zero_stage=3 with more learner.ranks"
    knobs = [] if plan.options.model.lora else ["model.lora"]
    if plan.device == "cuda" and learner.offload == "none" and learner.zero_stage:
        knobs.append("learner.offload=optimizer")
    return f"{', '.join([*knobs, 'more learner.ranks'])} (each ZeRO stage divides it further)"


def as_json(plan: Plan) -> Mapping[str, Any]:
    """Return bytes and operations as numbers."""
    memory = plan.memory
    return {
        "model": plan.options.model.path,
        "on": plan.device,
        "parameters": dict(plan.shape.parameters),
        "trained": dict(plan.shape.trained),
        "assumed": plan.assumed,
        "micro_batch": asdict(plan.load),
        "device": dict(memory.device),
        "host": dict(memory.host),
        "phases": dict(memory.phases),
        "peak": memory.peak,
        "units": asdict(memory.units),
        "flops": {**asdict(plan.flops), "total": plan.flops.total},
    }

"""`resolve(config)` finds everything that can be known to fail before an actor starts, and reports it together.

`saccade.config` has validated the configuration itself. Here its references are followed, each once:

model, data files ──▶ loaded, opened, first rows tried ──▶ checks ──▶ checks of what the learner would do ──▶ Resolved
                                                  └──────────────────┴──▶ all problems at once, as ConfigError

A check looks at one thing and returns its problems. The order of the checks in a list only orders the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from learner.batching.rows import layout
from learner.features.frozen_towers import describe_caching
from rewards.registry import COMPARING, check_rewards
from rollout.data.source import DataError
from saccade import checkpoints
from saccade.checks.gold_check import gold_problems
from saccade.checks.machine import metrics_port, missing_weights, output_folder, quantization
from saccade.checks.media_use import blindness, overlooked_media
from saccade.checks.memory import memory_problems, planned_device
from saccade.checks.references import WHERE, DataSet, file_problems, load_model, open_set, set_files
from saccade.config.idle_knobs import Facts, data_idle_problems
from saccade.config.messages import ConfigError
from saccade.config.options import learner_options
from saccade.config.run_config import RunConfig
from saccade.observe.metrics import read_metrics
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind

ROWS_TRIED = 100
"""So many rows of each data set are turned into prompts before anything starts."""


@dataclass(frozen=True)
class Resolved:
    """The model and the data that a configuration refers to. The rest of a run asks this, and opens nothing again."""

    adapter: MultimodalAdapter
    media_kinds: tuple[MediaKind, ...]
    """The kinds of media that prompts may hold, in training and in evaluation."""
    lines: tuple[str, ...]
    """The user is told these: the columns of each data set, and how the learner handles prompts and their media."""


@dataclass(frozen=True)
class References:
    """The checks look at this: the model, and the data sets, whose first rows were tried."""

    config: RunConfig
    adapter: MultimodalAdapter
    sets: tuple[DataSet, ...]
    unusable: tuple[str, ...]
    """These problems say why a set cannot be opened, or why its rows cannot be used."""

    @property
    def media_kinds(self) -> tuple[MediaKind, ...]:
        return tuple(dict.fromkeys(kind for data in self.sets for kind in data.media_kinds(self.adapter)))

    @cached_property
    def caching(self) -> list[str]:
        """The user is told these: what is cached of frozen towers."""
        options = learner_options(self.config, planned_device(self.config), self.media_kinds)
        return describe_caching(self.adapter, options)


def resolve(config: RunConfig, *, resume: bool = False) -> Resolved:
    """Follow the references of `config`. Raises ConfigError listing all that would stop the run."""
    alone = [problem for check in CONFIG_CHECKS for problem in check(config)]
    alone += [] if resume else earlier_run(config)
    try:
        adapter = load_model(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *file_problems(config), *alone], WHERE) from error
    references = _open(config, adapter)
    problems = [problem for check in CHECKS for problem in check(references)]
    problems = problems or [problem for check in LEARNER_CHECKS for problem in check(references)]
    if problems or alone:
        raise ConfigError([*problems, *alone], WHERE)
    return Resolved(adapter, references.media_kinds, tuple(_lines(references)))


def _open(config: RunConfig, adapter: MultimodalAdapter) -> References:
    sets: list[DataSet] = []
    unusable: list[str] = []
    for key in set_files(config):
        try:
            data = open_set(config, key, adapter)
        except DataError as error:
            unusable.append(f"{key}: {error}")
        else:
            sets.append(data)
            unusable += overlooked_media(key, data.source, adapter) or _first_rows(data)
    return References(config, adapter, tuple(sets), tuple(unusable))


def _first_rows(data: DataSet) -> list[str]:
    """Find rows that would stop the run at its first step (too long, unreadable) before engines are started."""
    try:
        if not data.source.options.data.allow_urls:  # fetching takes a while
            data.source.try_rows(ROWS_TRIED)
    except DataError as error:
        return [f"{data.key}: {error}"]
    return []


def _lines(found: References) -> list[str]:
    lines = [f"learner: {layout(found.adapter)}", *idle_ranks(found.config)]
    for data in found.sets:
        lines.append(f"{data.key}: {len(data.source)} rows; {data.source.columns}")
        lines += blindness(data.key, data.source, found.adapter, found.config)
    return lines + [f"learner: {line}" for line in found.caching]


def idle_ranks(config: RunConfig) -> list[str]:
    """One line if some ranks have no work, because one rank trains a whole group."""
    learner, steps = config.learner, config.algorithm.optimizer_steps
    groups = learner.prompts_per_step // steps
    if learner.ranks <= groups:
        return []
    divided = f" / algorithm.optimizer_steps={steps}" if steps > 1 else ""
    return [
        f"learner: {learner.ranks - groups} of learner.ranks={learner.ranks} have nothing to train: an optimizer step "
        f"has {groups} prompts (learner.prompts_per_step={learner.prompts_per_step}{divided}), and one rank trains each"
    ]


# --- checks of the model and the data ---------------------------------------------------------------------------------


def _context_length(found: References) -> list[str]:
    config = found.config
    longest = getattr(found.adapter.model_config.get_text_config(), "max_position_embeddings", None)
    needed = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest is None or needed <= longest:
        return []
    return [
        f"data.max_prompt_length + rollout.max_completion_length = {needed} tokens, but the model at "
        f"{config.model.path} takes at most {longest}; lower one of them"
    ]


def _unusable(found: References) -> list[str]:
    return list(found.unusable)


def _answers(found: References) -> list[str]:
    comparing = [f.name for f in found.config.reward.functions if f.name in COMPARING]
    return [
        f"{data.key}: the reward {comparing[0]!r} compares with answers, but no column is known to hold them: set "
        f"data.columns.answer. Unused columns: {', '.join(data.source.unused) or 'none'}"
        for data in found.sets
        if comparing and data.source.columns.answer is None
    ]


def _golds(found: References) -> list[str]:
    return [problem for data in found.sets for problem in gold_problems(found.config, data.key, data.source)]


def _enough_rows(found: References) -> list[str]:
    needed = found.config.learner.prompts_per_step
    return [
        f"data.train has {len(data.source)} rows, fewer than learner.prompts_per_step={needed}: a batch would hold a "
        "prompt twice"
        for data in found.sets
        if data.key == "data.train" and len(data.source) < needed
    ]


def _parts(found: References) -> list[str]:
    model = found.config.model
    # If the data cannot be used, their media are not known.
    reached = tuple(found.adapter.modalities) if found.unusable else found.media_kinds
    targets = model.lora.targets if model.lora else ()
    return [f"model.{text}" for text in found.adapter.part_problems(model.freeze, targets, reached)]


# --- checks of what the learner would do with them --------------------------------------------------------------------


def _idle_knobs(found: References) -> list[str]:
    rows = sum(len(data.source) for data in found.sets if data.key == "data.train")
    facts = Facts(rows, found.media_kinds, bool(found.caching))
    return data_idle_problems(found.config, facts)


def _memory(found: References) -> list[str]:
    return memory_problems(found.config, found.adapter, found.media_kinds)


# --- checks of the configuration alone --------------------------------------------------------------------------------


def _rewards(config: RunConfig) -> list[str]:
    return [f"reward.functions: {problem}" for problem in check_rewards(config.reward.functions)]


def earlier_run(config: RunConfig) -> list[str]:
    """A new run in this folder would overwrite these."""
    directory = Path(config.output_dir)
    if checkpoints.found(directory / "checkpoints"):
        return [
            f"output_dir: {directory} holds an earlier run; continue it with --resume, or choose another folder "
            "(output_dir=...)"
        ]
    if read_metrics(directory):
        return [
            f"output_dir: {directory} holds the metrics of an earlier run without a checkpoint; start it again with "
            "--resume, or choose another folder (output_dir=...)"
        ]
    return []


Check = Callable[[References], list[str]]
CHECKS: tuple[Check, ...] = (_context_length, _unusable, _answers, _golds, _enough_rows, _parts)
"""These checks look at the model and the data."""
LEARNER_CHECKS: tuple[Check, ...] = (_idle_knobs, _memory)
"""These run only if the others found nothing: no learner can be described whose parts the model does not have."""
CONFIG_CHECKS: tuple[Callable[[RunConfig], list[str]], ...] = (
    *(missing_weights, quantization, _rewards, output_folder, metrics_port),
)

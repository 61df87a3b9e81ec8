"""Everything that can be known to fail is found before an actor starts, and reported together.

The configuration itself was validated by `saccade.config`; here its references are followed: model, adapter, data
files, rewards, precision, output folder.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from learner.batching.samples import layout, shares_prompts
from learner.features.frozen_towers import once_per_run
from rewards.registry import COMPARING, check_rewards
from rollout.data.elsewhere import address_problem
from rollout.data.source import DataError, PromptSource, open_data
from saccade import checkpoints
from saccade.checks.gold_check import gold_problems
from saccade.checks.media_use import blindness, overlooked_media
from saccade.checks.planning import memory_problems, planned_device
from saccade.config.idle_knobs import Facts, data_idle_problems
from saccade.config.options import config_adapter, data_options, learner_options, model_problem, reward_specs
from saccade.config.run_config import ConfigError, RunConfig
from saccade.observe.metrics import read_metrics
from saccade.observe.screen import say
from vlm.adapter import AdapterError
from vlm.media.types import MediaKind
from vlm.media_cost import patches_per_token

ROWS_TRIED = 100
"""Rows of each set of files that are made prompts of before anything starts."""


@dataclass
class Choices:
    """What the files decide, and the configuration leaves open."""

    lines: list[str] = field(default_factory=list)
    """For the user: the columns of each set of files, and what the learner does with prompts and their media."""
    media_kinds: tuple[MediaKind, ...] = ()
    """What prompts may hold, training and held-out ones together."""


def preflight(config: RunConfig, *, resume: bool = False) -> Choices:
    """Raises ConfigError listing all that would stop the run."""
    choices = Choices()
    problems = [*_model_and_data(config, choices), *_quantization(config), *_rewards(config), *_output(config, resume)]
    problems += _metrics_port(config.cluster.metrics_port)
    if problems:
        raise ConfigError(problems, "what the configuration refers to")
    return choices


def _model_and_data(config: RunConfig, choices: Choices) -> list[str]:
    try:
        adapter = config_adapter(config)
    except AdapterError as error:
        return [model_problem(error), *_data_alone(config)]
    problems = missing_weights(config.model.path)
    longest = getattr(adapter.model_config.get_text_config(), "max_position_embeddings", None)
    needed = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest is not None and needed > longest:
        problems.append(
            f"data.max_prompt_length + rollout.max_completion_length = {needed} tokens, but the model at "
            f"{config.model.path} takes at most {longest}; lower one of them"
        )
    choices.lines += [f"learner: {layout(adapter)}", *idle_ranks(config)]
    limit = config.learner.micro_batch_patches
    most = max((patches_per_token(adapter, kind) for kind in adapter.towers()), default=0.0)
    if limit is not None and limit < config.data.max_prompt_length * most:
        problems.append(
            f"learner.micro_batch_patches={limit} may not hold one prompt: data.max_prompt_length="
            f"{config.data.max_prompt_length} tokens of images are {config.data.max_prompt_length * most:g} patches; "
            "raise it, or lower data.max_prompt_length"
        )
    rows = 0
    for files, key in ((config.data.train, "data.train"), (config.data.eval, "data.eval")):
        if not files:
            continue
        try:
            source = PromptSource(data_options(config, files), adapter)
        except DataError as error:
            problems.append(f"{key}: {error}")
            continue
        choices.lines += [f"{key}: {len(source)} rows; {source.columns}", *blindness(key, source, adapter, config)]
        problems += overlooked_media(key, source, adapter) or _first_rows(key, source)
        comparing = [f.name for f in config.reward.functions if f.name in COMPARING]
        if source.columns.answer is None and comparing:
            problems.append(
                f"{key}: the reward {comparing[0]!r} compares with answers, and no column is known to hold them; name "
                f"it: data.columns.answer. Not used are: {', '.join(source.unused) or 'none'}"
            )
        problems += gold_problems(config, key, source)
        kinds = [kind for kind, _ in source.columns.media if kind in adapter.modalities]
        choices.media_kinds = tuple(dict.fromkeys((*choices.media_kinds, *kinds)))
        if key == "data.train" and len(source) < config.learner.prompts_per_step:
            problems.append(
                f"data.train has {len(source)} rows, fewer than learner.prompts_per_step="
                f"{config.learner.prompts_per_step}: a batch would hold a prompt twice"
            )
        if key == "data.train":
            rows = len(source)
    targets = config.model.lora_targets if config.model.lora_rank else ()
    # Where files could not be read, what media they hold is not known.
    reached = tuple(adapter.modalities) if problems else choices.media_kinds
    problems += [f"model.{text}" for text in adapter.part_problems(config.model.freeze, targets, reached)]
    if not problems:
        options = learner_options(config, planned_device(config), choices.media_kinds)
        once = once_per_run(adapter, options)
        choices.lines += [f"learner: {line}" for line in once]
        facts = Facts(rows, choices.media_kinds, bool(once), shares_prompts(adapter))
        problems += data_idle_problems(config, facts)
    if config.learner.micro_batch_gib is not None and not problems:
        problems = memory_problems(config, adapter, choices.media_kinds)
    return problems


def idle_ranks(config: RunConfig) -> list[str]:
    """A line where ranks stay without work, as a group is trained by one of them."""
    learner, steps = config.learner, config.algorithm.optimizer_steps
    groups = learner.prompts_per_step // steps
    if learner.ranks <= groups:
        return []
    divided = f" / algorithm.optimizer_steps={steps}" if steps > 1 else ""
    return [
        f"learner: {learner.ranks - groups} of learner.ranks={learner.ranks} have nothing to train: an optimizer step "
        f"has {groups} prompts (learner.prompts_per_step={learner.prompts_per_step}{divided}), each for one rank"
    ]


def _data_alone(config: RunConfig) -> list[str]:
    """What is wrong with the data files whatever the model is."""
    problems = []
    for files, key in ((config.data.train, "data.train"), (config.data.eval, "data.eval")):
        try:
            if files:
                open_data(data_options(config, files))
        except DataError as error:
            problems.append(f"{key}: {error}")
    return problems


def _first_rows(key: str, source: PromptSource) -> list[str]:
    """Rows that would stop the run at its first step, prompts too long among them: known before engines are started."""
    try:
        if not source.options.allow_urls:  # fetching takes a while
            source.try_rows(ROWS_TRIED)
    except DataError as error:
        return [f"{key}: {error}"]
    return []


def missing_weights(path: str) -> list[str]:
    """What a local model folder lacks of its weights; a hub's model is fetched whole."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)):
        return []
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        try:
            shards = set(json.loads((folder / name).read_text())["weight_map"].values())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return [f"model.path: {folder / name} cannot be read: {error}"]
        missing = sorted(shard for shard in shards if not (folder / str(shard)).is_file())
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return [f"model.path: {path} lacks {len(missing)} of {len(shards)} files of weights: {few}"] if missing else []
    return [f"model.path: {path} holds no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"]


def _metrics_port(port: int) -> list[str]:
    if not port:
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = f"cannot be served on this machine ({error.strerror}), maybe for another run"
            return [f"cluster.metrics_port={port} {reason}; name another, or 0: Ray serves the figures too"]
    return []


def _quantization(config: RunConfig) -> list[str]:
    if config.model.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return [f"model.quantize={config.model.quantize} needs bitsandbytes: pip install -e '.[qlora]'"]
    return []


def _rewards(config: RunConfig) -> list[str]:
    columns = set(config.data.extra_columns)
    return [f"reward.functions: {problem}" for problem in check_rewards(reward_specs(config), columns)]


def _output(config: RunConfig, resume: bool) -> list[str]:
    directory = Path(config.output_dir)
    if problem := address_problem(config.output_dir):  # as a path, it would be made in the working directory
        return [f"output_dir={config.output_dir}: {problem}"]
    if directory.exists() and not directory.is_dir():
        return [f"output_dir: {directory} exists and is not a folder"]
    if file := next((p for p in directory.parents if p.exists() and not p.is_dir()), None):
        return [f"output_dir: {directory} cannot be made: {file} is a file"]
    if resume:
        return []
    if checkpoints.found(directory / "checkpoints"):
        return [
            f"output_dir: {directory} holds an earlier run; continue it with --resume, or name another folder "
            "(output_dir=...)"
        ]
    if read_metrics(directory):
        return [
            f"output_dir: {directory} holds the figures of an earlier run that left no checkpoint; delete it, or name "
            "another folder (output_dir=...)"
        ]
    return []


def check_data(config: RunConfig, rows: int | None, console: Console) -> bool:
    """Read the data files as a run would and print what is refused; True if a run would accept them."""
    try:
        adapter = config_adapter(config)
    except AdapterError as error:
        raise ConfigError([model_problem(error), *_data_alone(config)]) from error
    accepted = True
    for key, files in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if not files:
            continue
        try:
            source = PromptSource(data_options(config, files, train=False), adapter)
        except DataError as error:
            say(console, f"{key}: {error}")
            accepted = False
            continue
        say(console, f"{key}: {len(source)} rows; {source.columns}")
        lengths = [prompt.expanded_length for prompt in source.look(rows or len(source)) if prompt is not None]
        say(console, f"  longest prompt {max(lengths, default=0)} tokens; {source.report()}")
        for line in (*source.report().first_refusals, *blindness(key, source, adapter, config)):
            say(console, f"  {line}")
        verdicts = [source.excess() or ("" if lengths else "no row is usable"), *overlooked_media(key, source, adapter)]
        verdicts += gold_problems(config, key, source)
        for verdict in filter(None, verdicts):
            say(console, f"  a run would stop: {verdict.removeprefix(f'{key}: ')}")
            accepted = False
    return accepted

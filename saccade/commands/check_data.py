"""`saccade data check`: reads the data files as a run would, and prints the rows that it would refuse."""

from __future__ import annotations

from rich.console import Console

from rollout.data.source import DataError
from saccade.checks.gold_check import gold_problems
from saccade.checks.media_use import blindness, overlooked_media
from saccade.checks.references import WHERE, DataSet, file_problems, load_model, open_set, set_files
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
from saccade.observe.screen import say
from vlm.adapter import MultimodalAdapter


def check_data(config: RunConfig, rows: int | None, console: Console) -> bool:
    """Print the refused rows of data.train and data.eval. Return True if a run would accept the data. Raises
    ConfigError."""
    try:
        adapter = load_model(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *file_problems(config)], WHERE) from error
    accepted = True
    for key in set_files(config):
        try:
            data = open_set(config, key, adapter, shuffled=True)
        except DataError as error:
            say(console, f"{key}: {error}")
            accepted = False
            continue
        accepted &= _accepted(config, data, adapter, rows, console)
    return accepted


def _accepted(config: RunConfig, data: DataSet, adapter: MultimodalAdapter, rows: int | None, console: Console) -> bool:
    """Print a summary of one set, and the reason why a run would stop at it."""
    key, source = data.key, data.source
    say(console, f"{key}: {len(source)} rows; {source.columns}")
    lengths = [prompt.expanded_length for prompt in source.look(rows or len(source)) if prompt is not None]
    say(console, f"  longest prompt {max(lengths, default=0)} tokens; {source.report()}")
    for line in (*source.report().first_refusals, *blindness(key, source, adapter, config)):
        say(console, f"  {line}")
    verdicts = [source.excess() or ("" if lengths else "no row can be used"), *overlooked_media(key, source, adapter)]
    verdicts = [verdict for verdict in [*verdicts, *gold_problems(config, key, source)] if verdict]
    for verdict in verdicts:
        say(console, f"  a run would stop: {verdict.removeprefix(f'{key}: ')}")
    return not verdicts

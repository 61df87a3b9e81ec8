"""`saccade rewards score` and `saccade rewards check`: try rewards without a run.

score   rows of a file ──▶ RewardWorker ──▶ a verdict a line
check   rows of a run's data ──▶ saccade/commands/reward_check.py ──▶ table, findings
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from rewards.answers.golds import GoldError, gold_text, is_number
from rewards.base import ScoringRequest, as_completion
from rewards.config import RewardSpec
from rewards.functions.user import RewardSetupError
from rewards.process.worker import RewardWorker
from rewards.registry import answers_are_programs, check_rewards
from rollout.data.conversation import Conversation
from rollout.data.rows import RowRefusedError
from rollout.types import FinishReason, Verdict
from saccade.commands.help import App, ConfigFile, Overrides
from saccade.config.load import apply_overrides, load_config
from saccade.config.messages import ConfigError
from saccade.observe.screen import say
from vlm.user_code import short

ENDS: tuple[FinishReason, ...] = get_args(FinishReason)

app = App(help="Score a file with one reward, or probe all rewards of a run.")


@app.command()
def score(
    name: Annotated[
        str,
        typer.Argument(
            help="A shipped reward, or your own: package.module:function or file.py:function.", metavar="REWARD"
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            help="JSONL file with the columns `completion`, `answer`, and any other that the reward reads.",
            metavar="FILE",
        ),
    ],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the reward.", metavar="[option=value]...")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Time limit for one completion, in seconds.", min=0.001)] = 30.0,
) -> None:
    """Score the completions in a file, one per line, and print one verdict per line as JSON.

    Example:  saccade rewards score accuracy completions.jsonl tolerance=0.05 > verdicts.jsonl
    """
    given: dict[str, Any] = {}
    problems = apply_overrides(given, options or [])
    spec = RewardSpec(name, options=given)
    problems += check_rewards([spec])
    if not file.is_file():
        problems.append(f"{file}: no such file")
    if problems:
        raise ConfigError(problems, "the command line")
    statuses: Counter[str] = Counter()
    for verdict in score_file(spec, file, timeout):
        statuses[verdict.status] += 1
        line = {"status": verdict.status, "score": verdict.score, "reason": verdict.reason}
        typer.echo(json.dumps(line, allow_nan=False))
    counted = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    say(Console(stderr=True), counted or "no rows")


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows of data.train to probe with.", min=1)] = 20,
    token_ms: Annotated[
        float,
        typer.Option(
            help="Milliseconds of one decoding step of an engine, to compare the rewards' time with.", min=0.01
        ),
    ] = 10.0,
) -> None:
    """Probe the rewards of a run with right, empty, junk, very long and adversarial completions, built from the run's
    own data.

    Reports each reward that gives the gold answer less than full marks, gives junk or an empty completion more than its
    minimum, depends on the order of calls, or takes longer than generation. The exit status is 1 if it reports
    anything.

    Example:  saccade rewards check mine.yaml --rows 100
    """
    settings = load_config(config, overrides or [])
    from saccade.commands.reward_check import probe_rewards

    if probe_rewards(settings, rows, token_ms, Console()):
        raise typer.Exit(1)


def score_file(spec: RewardSpec, path: Path, timeout: float) -> Iterator[Verdict]:
    """Yield a verdict for each line of a JSONL file, in order. Blank lines are skipped; a line that cannot be read is
    an `error`.

    Raises ConfigError if the reward cannot be loaded."""
    worker = RewardWorker([spec], timeout)
    try:
        worker.start()
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    request = _request(line, answers_are_programs([spec]))
                except ValueError as error:
                    yield Verdict("error", reason=f"line {number}: {error}")
                    continue
                yield _without_name(short(spec.name), worker.score(request).verdicts[0])
    except RewardSetupError as error:
        raise ConfigError([str(error)], f"reward {spec.name}") from error
    finally:
        worker.close()


def _request(line: bytes, as_written: bool = False) -> ScoringRequest:
    """Read one line. Raises ValueError if it holds no completion. Bytes that are not UTF-8 become lone surrogates, as
    they do when a tokenizer decodes them."""
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, found a {type(row).__name__}")
    if not isinstance(row.get("completion"), str):
        raise ValueError("the column `completion` is missing or not a text")
    columns = {name: value for name, value in row.items() if name not in ("completion", "answer", "prompt")}
    prompt = row.get("prompt")
    text = prompt if isinstance(prompt, str) else "" if prompt is None else json.dumps(prompt)
    completion = row["completion"]
    raw = as_completion(completion, next((end for end in ENDS if end == row.get("finish_reason")), "stop"))
    answer = row.get("answer")
    return ScoringRequest(
        text,
        (completion,),
        _gold(answer, as_written),
        columns,
        raw=(raw,),
        user_text=_user_text(prompt),
        numeric_answer=is_number(answer),
    )


def _user_text(prompt: Any) -> str:
    """Return the user's words of a text or of chat messages; empty if the data reader would refuse them."""
    try:
        return Conversation.read(prompt).words
    except RowRefusedError:
        return ""


def _gold(value: Any, as_written: bool) -> str | None:
    """Read the gold answer as a run does; None if there is none. Raises ValueError if a run would refuse it."""
    try:
        return gold_text(value, as_written=as_written)
    except GoldError as error:
        if error.kind == "no answer":
            return None
        raise


def _without_name(name: str, verdict: Verdict) -> Verdict:
    """Drop the reward's name from the reason: with a single reward it says nothing."""
    return Verdict(verdict.status, verdict.score, verdict.reason.removeprefix(f"{name}: "))

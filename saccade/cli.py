"""The command line: `saccade demo | train | eval | plan | config | data | rewards | parity | merge`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from saccade import __version__
from saccade.commands.data import app as data
from saccade.commands.help import QUIET, App, ConfigFile, Overrides, knob_text
from saccade.commands.merge_source import check_source
from saccade.commands.rewards import app as rewards
from saccade.config.demands import asked_for
from saccade.config.run_config import (
    ConfigError,
    RunConfig,
    dump_config,
    iter_knobs,
    load_config,
    require_evaluation,
)
from saccade.errors import RunStopped
from saccade.observe.screen import say
from vlm.errors import UserError

app = App(
    name="saccade",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for vision-language models, on one CPU or on a Ray cluster.\n\n"
    "Start with [bold]saccade demo[/bold]: it makes its own data and model and learns to see in minutes.",
)
errors = Console(stderr=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join: host:port or 'auto'. Default: the one that RAY_ADDRESS names, as in a submitted "
        "job; otherwise a local Ray is started for this run."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saccade {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Configurations are read before anything heavy is imported, so that a mistake in one is told at once."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in output_dir from its newest checkpoint.")] = False,
    address: Address = None,
) -> None:
    """Train a model by the configuration file.

    Example:  saccade train examples/shapes.yaml learner.lr=1e-3 rollout.num_generations=4

    Ctrl-C finishes nothing half: the current state is saved as a checkpoint, every process ends, and --resume goes on.
    """
    settings = load_config(config, overrides or [])
    from saccade.loop import train as run
    from saccade.observe.display import TerminalDisplay

    result = run(settings, resume=resume, address=address, display=TerminalDisplay(Console()))
    if result.interrupted:
        joined = f" --address {address}" if address else ""
        path = result.output_dir / "config.yaml"  # with the overrides
        again = f"stopped after step {result.steps}; continue with: saccade train {path} --resume{joined}"
        say(errors, again)
        raise typer.Exit(130)
    say(Console(), f"trained {result.steps} steps; model saved in {result.model_dir}")


@app.command("eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Model to evaluate in place of model.path.")] = None,
    address: Address = None,
) -> None:
    """Evaluate a model on data.eval: mean of every reward per file, and per value of evaluation.group_by.

    Example:  saccade eval examples/shapes.yaml --model runs/shapes/model
    """
    settings = load_config(config, list(overrides or []) + ([f"model.path={model}"] if model else []))
    require_evaluation(settings)
    from learner.durable import strict_json
    from saccade.loop import evaluate as run
    from saccade.observe.display import TerminalDisplay

    typer.echo(strict_json(run(settings, address=address, display=TerminalDisplay(errors)), 2))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Predict a learner rank's memory by kind and a step's operations, without loading weights.

    Takes full micro-batches, prompts as long as those of data.train on average (or data.max_prompt_length, where the
    files cannot be read), and completions at their limit. Says what takes most, and which knob lowers it.

    Example:  saccade plan mine.yaml learner.zero_stage=3 learner.ranks=8 cluster.device=cuda
    """
    settings = load_config(config, overrides or [])
    from saccade.commands.plan import plan_run

    plan_run(settings, Console(), json_file)


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML file to resolve.", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    knobs: Annotated[bool, typer.Option(help="List every knob with its default and meaning instead.")] = False,
) -> None:
    """Print a configuration with every default filled in, or list all knobs.

    Examples:  saccade config examples/shapes.yaml learner.lr=1e-3      saccade config --knobs
    """
    if knobs or config is None:
        for name, info in iter_knobs():
            typer.echo(knob_text(name, info))
        return
    settings = load_config(config, overrides or [])
    typer.echo(dump_config(settings), nl=False)
    for line in asked_for(settings):
        typer.echo(f"# {line}")


app.add_typer(rewards, name="rewards")
app.add_typer(data, name="data")


@app.command()
def parity(
    model: Annotated[str | None, typer.Argument(help="Path or hub name of a model.", metavar="[MODEL]")] = None,
    tiny: Annotated[
        str | None, typer.Option(help="Instead of MODEL: the tiny random model of this family, or `all`.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of the case with several.", min=2)] = 3,
    video: Annotated[bool, typer.Option(help="Videos too, where the model takes them.")] = True,
    adapter: Annotated[
        str | None, typer.Option(help="An adapter of your own, package.module:Class (file.py:Class).")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
    max_image_tokens: Annotated[
        int | None, typer.Option(help="Tokens that an image may take, as in the knob model.max_image_tokens.", min=1)
    ] = None,
    device: Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: cuda where there is a GPU.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of both.")] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Difference of a log-probability that agrees; float32: largest, 3e-5; bfloat16: mean, 0.05."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Check that vLLM and the learner agree on a model: expanded prompts, pixels, positions, log-probabilities.

    Loads the model in both, one after the other; has vLLM sample for text, one image, several, images between text,
    and videos and sounds where the model takes them; compares expanded prompts, pixels, and the log-probability of
    every sampled token. Other pixels must move them, or an agreement proves nothing. Exit status 1 on disagreement.

    Example:  saccade parity Qwen/Qwen2.5-VL-3B-Instruct      saccade parity --tiny all
    """
    if (model is None) == (tiny is None):
        raise ConfigError(["give either a model or --tiny FAMILY (or --tiny all)"], "the command line")
    from saccade.commands.parity import run_parity

    agreed = run_parity(
        model,
        tiny=tiny,
        images=images,
        video=video,
        tolerance=tolerance,
        path=json_file,
        console=Console(),
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        max_image_tokens=max_image_tokens,
        device=device,
        dtype=dtype,
    )
    if not agreed:
        raise typer.Exit(1)


@app.command()
def merge(
    adapter: Annotated[
        Path,
        typer.Argument(help="A saved adapter, a model saved with one, or a checkpoint folder.", metavar="ADAPTER"),
    ],
    output: Annotated[Path, typer.Argument(help="New folder for the model.", metavar="OUTPUT")],
    model: Annotated[str | None, typer.Option(help="The base model, if it is no longer where it was.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model, or a checkpoint's weights: a folder that transformers and vLLM load.

    Examples:  saccade merge runs/mine/model/adapter merged
               saccade merge runs/mine/checkpoints/step-000200 merged
    """
    check_source(adapter, output)
    from saccade.commands.merge import merge as run

    if remark := run(adapter, output, model=model, trust_remote_code=trust_remote_code):
        say(Console(), remark)
    say(Console(), f"model saved in {output}")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of data, model and training.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: the recipe's.")] = None,
) -> None:
    """Train a tiny vision-language model to see, end to end, on this machine's CPU, with nothing downloaded.

    Makes the shapes data and a 0.7M-parameter Qwen2.5-VL, teaches it the answer format, then trains it with GRPO
    through the full system: vLLM rollout, reward actors, a DeepSpeed learner, weight sync. Shows accuracy before and
    after.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found nothing else
    from saccade.demo.demo import run_demo

    run_demo(seed=seed, output_dir=output_dir, steps=steps, console=Console())


def main() -> None:
    """Entry point: errors that are for the user are printed as such, without a traceback."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _complain(error)
        sys.exit(2)
    except RunStopped:
        say(errors, "stopped; there was nothing to save yet")
        sys.exit(130)
    except UserError as error:
        _complain(error)
        sys.exit(1)


def _complain(error: Exception) -> None:
    say(errors, "saccade:", style="bold red", end=" ")
    say(errors, str(error))


__all__ = ["RunConfig", "main"]

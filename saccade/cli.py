"""The command line: `saccade demo | train | eval | why-stuck | scale | plan | data | rewards | ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from saccade import __version__
from saccade.commands.data import app as data
from saccade.commands.desk import scale, why_stuck
from saccade.commands.help import QUIET, App, ConfigFile, Overrides, knob_text
from saccade.commands.merge_source import check_source
from saccade.commands.rewards import app as rewards
from saccade.config.demands import asked_for
from saccade.config.knobs import knobs
from saccade.config.load import dump_config, load_config, require_evaluation
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
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
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Every command reads its configuration before it imports anything heavy, so that mistakes are reported at once."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in output_dir from its newest checkpoint.")] = False,
    address: Address = None,
) -> None:
    """Train a model as the configuration file says.

    Example:  saccade train examples/shapes.yaml learner.learning_rate=1e-3 rollout.num_generations=4

    Ctrl-C saves a checkpoint and stops every process; continue with --resume.
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
    """Evaluate a model on data.eval: print the mean of every reward per file, and value of data.columns.group.

    Example:  saccade eval examples/shapes.yaml --model runs/shapes/model
    """
    settings = load_config(config, list(overrides or []) + ([f"model.path={model}"] if model else []))
    require_evaluation(settings)
    from learner.durable import strict_json
    from saccade.loop import evaluate as run
    from saccade.observe.display import TerminalDisplay

    typer.echo(strict_json(run(settings, address=address, display=TerminalDisplay(errors)), 2))


app.command("why-stuck")(why_stuck)
app.command()(scale)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Predict the memory of a learner rank and the operations of a step, without loading weights.

    Assumes full micro-batches, prompts of the average length in data.train (or of data.max_prompt_length, if the files
    cannot be read), and completions of the maximum length. Names what takes most memory, and the knob that lowers it.

    Example:  saccade plan mine.yaml learner.zero_stage=3 learner.ranks=8 cluster.device=cuda
    """
    settings = load_config(config, overrides or [])
    from saccade.commands.plan import plan_run

    plan_run(settings, Console(), json_file)


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML file.", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    list_all: Annotated[
        bool, typer.Option("--knobs", help="List every knob with its default and meaning instead.")
    ] = False,
) -> None:
    """Print a configuration with every default filled in, or list all knobs.

    Examples:  saccade config examples/shapes.yaml learner.learning_rate=1e-3      saccade config --knobs
    """
    if list_all or config is None:
        for knob in knobs().values():
            typer.echo(knob_text(knob))
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
    images: Annotated[int, typer.Option(help="Number of images in the case with several.", min=2)] = 3,
    video: Annotated[bool, typer.Option(help="Test videos too, if the model takes them.")] = True,
    adapter: Annotated[
        str | None, typer.Option(help="Your own adapter: package.module:Class or file.py:Class.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
    max_image_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an image, as the knob model.max_image_tokens.", min=1)
    ] = None,
    device: Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: cuda if there is a GPU.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of the engine and the learner.")
    ] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Allowed difference of log-probabilities. float32: the largest, 3e-5; bfloat16: the mean, 0.05."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Check that vLLM and the learner agree on a model: expanded prompts, pixels, positions, log-probabilities.

    Loads the model in vLLM and then in the learner. vLLM samples for text, one image, several images, images between
    text, and for videos and sounds if the model takes them. Compares the expanded prompts, the pixels, and the
    log-probability of every sampled token. Other pixels must change these, or agreement would prove nothing. The exit
    status is 1 on disagreement.

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
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
) -> None:
    """Merge a LoRA adapter or a checkpoint into its base model: a folder that transformers and vLLM load.

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
    output_dir: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
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
    """Run the command line. Errors that are for the user are printed without a traceback."""
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

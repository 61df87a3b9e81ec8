"""`saccade data check`, `inspect` and `shapes`: look at data files before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saccade.commands.help import App, ConfigFile, Overrides
from saccade.config.load import data_config, load_config

app = App(help="Look at a data set, check it, or make the shapes data set.")


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[
        int | None, typer.Option(help="Read only this many rows of data.train and of data.eval. Default: all.")
    ] = None,
) -> None:
    """Read data.train and data.eval as a run would, and list the rows that it would refuse, with the reasons.

    Example:  saccade data check mine.yaml --rows 1000
    """
    settings = load_config(config, overrides or [])
    from saccade.commands.check_data import check_data

    if not check_data(settings, rows, Console()):
        raise typer.Exit(1)


@app.command()
def inspect(
    files: Annotated[
        list[str],
        typer.Argument(help="Data files or glob patterns, and knobs.", metavar="FILE... [section.name=value]..."),
    ],
    model: Annotated[str | None, typer.Option(help="Count tokens with this model: a path or a hub name.")] = None,
    rows: Annotated[int, typer.Option(help="How many rows to read, drawn at random.", min=1)] = 1000,
) -> None:
    """Show how a run would read data files: columns, sizes, lengths, refused rows, and three rendered prompts.

    Examples:  saccade data inspect train.parquet --model Qwen/Qwen2.5-VL-3B-Instruct
               saccade data inspect train.json data.columns.prompt=caption data.media_from=/images
    """
    settings = data_config(files, model)
    from saccade.commands.inspect_data import inspect_data

    inspect_data(settings, model, rows, Console())


@app.command()
def shapes(
    directory: Annotated[Path, typer.Argument(help="Folder for the Parquet files.", metavar="FOLDER")],
    seed: Annotated[int, typer.Option(help="Random seed of the drawings.")] = 0,
) -> None:
    """Make the shapes data set as Parquet files: images of coloured shapes with questions about colour, shape and
    count.

    Example:  saccade data shapes runs/shapes-data --seed 1
    """
    from saccade.demo.shapes import make_shapes

    make_shapes(directory, seed=seed)
    for path in sorted(directory.glob("*.parquet")):
        typer.echo(str(path))

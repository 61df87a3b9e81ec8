"""`saccade data check`, `inspect` and `shapes`: data files before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saccade.commands.help import App, ConfigFile, Overrides
from saccade.config.run_config import data_config, load_config

app = App(help="Look at a data set, check it, or make the shapes one.")


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(help="Stop after so many rows of each file set; default all.")] = None,
) -> None:
    """Read data.train and data.eval as a run would, and list the rows it would refuse, with the reason.

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
    model: Annotated[str | None, typer.Option(help="Count the tokens of this model: a path or a hub name.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to look at, drawn from all of them.", min=1)] = 1000,
) -> None:
    """Show what a run would make of data files: columns, sizes, lengths, refused rows, three prompts as rendered.

    Examples:  saccade data inspect train.parquet --model Qwen/Qwen2.5-VL-3B-Instruct
               saccade data inspect train.json data.columns.prompt=caption data.media_from=/images
    """
    settings = data_config(files, model)
    from saccade.commands.inspect_data import inspect_data

    inspect_data(settings, model, rows, Console())


@app.command()
def shapes(
    directory: Annotated[Path, typer.Argument(help="Folder to write the Parquet files to.", metavar="FOLDER")],
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Make the shapes data set: images of coloured shapes with questions on colour, shape and count, as Parquet.

    Example:  saccade data shapes runs/shapes-data --seed 1
    """
    from saccade.demo.shapes import make_shapes

    make_shapes(directory, seed=seed)
    for path in sorted(directory.glob("*.parquet")):
        typer.echo(str(path))

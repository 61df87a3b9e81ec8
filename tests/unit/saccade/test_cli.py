"""The command line: mistakes are told at once, texts are shown as they are, help that can be read."""

from __future__ import annotations

import ast
import importlib
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import saccade
from saccade import cli
from saccade.commands.help import unwrapped
from saccade.observe.display import TerminalDisplay
from saccade.observe.screen import show

HEAVY = ["deepspeed", "ray", "torch", "transformers", "vllm"]
WRONG = "learner.rankz=1"
MISTAKES = {
    f"train CONFIG {WRONG}": "did you mean learner.ranks?",
    f"eval CONFIG {WRONG}": "did you mean learner.ranks?",
    "eval CONFIG data.eval=[]": "data.eval names no files",
    f"plan CONFIG {WRONG}": "did you mean learner.ranks?",
    f"config CONFIG {WRONG}": "did you mean learner.ranks?",
    f"data check CONFIG {WRONG}": "did you mean learner.ranks?",
    "data inspect x.parquet data.shufle=y": "did you mean data.shuffle?",
    f"rewards check CONFIG {WRONG}": "did you mean learner.ranks?",
    "rewards score acuracy CONFIG": "did you mean 'accuracy'?",
    "parity": "either a model or --tiny",
    "merge nofolder out": "no such folder",
}
CHILD = """
import contextlib, io, json, sys
from saccade.cli import main
heavy, commands = json.loads(sys.argv[1])
for command in commands:
    sys.argv = ["saccade", *command]
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    print(json.dumps([status, [name for name in heavy if name in sys.modules]]))
"""


def test_a_mistake_is_told_before_anything_heavy_is_imported(repository: Path, tmp_path: Path) -> None:
    config = str(repository / "examples" / "shapes.yaml")
    commands = [[config if word == "CONFIG" else word for word in mistake.split()] for mistake in MISTAKES]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([HEAVY, commands])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=repository,
        env={"PATH": "", "HOME": str(tmp_path), "COLUMNS": "500"},
        check=True,
    )
    assert [json.loads(line) for line in child.stdout.splitlines()] == [
        [1 if mistake.startswith("merge") else 2, []] for mistake in MISTAKES
    ]
    told = child.stderr.split("saccade: ")[1:]
    for mistake, text in zip(MISTAKES, told, strict=True):
        assert MISTAKES[mistake] in text, mistake


def test_the_version_is_told(repository: Path) -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"saccade {saccade.__version__}\n")
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "saccade.__version__"}


def test_train_is_completed_by_tab() -> None:
    assert {"train", "RunConfig"} <= set(dir(saccade))


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("train", "[OPTIONS] CONFIG [section.name=value]..."),
        ("data inspect", "[OPTIONS] FILE... [section.name=value]..."),
        ("rewards score", "[OPTIONS] REWARD FILE [option=value]..."),
        ("merge", "[OPTIONS] ADAPTER OUTPUT"),
        ("parity", "[OPTIONS] [MODEL]"),
        ("demo", "[OPTIONS]"),
    ],
)
def test_usage_lines_name_what_is_typed(command: str, usage: str) -> None:
    result = CliRunner().invoke(cli.app, [*command.split(), "-h"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    assert f"{command} {usage}" in " ".join(result.output.split())
    assert "{" not in result.output


def test_help_is_wrapped_by_the_terminal_alone() -> None:
    text = """First
    line.

    A paragraph of
    two lines.

    Examples:  saccade a
               saccade b
    """
    assert unwrapped(text) == "First line.\n\nA paragraph of two lines.\n\nExamples:  saccade a\n           saccade b"


def test_nothing_in_a_text_is_taken_for_markup() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    TerminalDisplay(console).phase("learner.gradient_checkpointing=[language], or data/[a].parquet")
    table = Table("[kind]")
    table.add_row("[vision]")
    show(console, table)
    assert "checkpointing=[language], or data/[a].parquet\n" in out.getvalue()
    assert "[kind]" in out.getvalue() and "[vision]" in out.getvalue()


def test_everything_is_printed_in_one_way(repository: Path) -> None:
    """Elsewhere a `.print` of rich would read [words] of a text as markup, and break lines through paths."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in (repository / "saccade").rglob("*.py")
        if path.name != "screen.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "print"
    ]
    assert found == []


USER_ERRORS = {
    "saccade.errors": ("RunError", "MismatchError"),
    "saccade.checkpoints": ("DamagedError",),
    "saccade.fleet.head": ("HeadLostError",),
    "saccade.fleet.deaths": ("DeathError",),
    "saccade.fleet.placement": ("PlacementError",),
    "saccade.commands.merge_source": ("MergeError",),
    "learner.durable": ("StorageError",),
    "learner.types": ("LearnerError", "LearnerTimeoutError", "NothingToLearnError", "NotFiniteError", "RewardError"),
    "rollout.data.formats": ("DataError",),
    "rewards.functions.user": ("RewardSetupError",),
    "vlm.errors": ("AdapterError",),
    "vlm.user_code": ("UserCodeError",),
    "weight_sync.verify": ("WeightSyncError",),
}
"""Errors that a run may end with."""


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in USER_ERRORS.items() for name in names])
def test_an_error_for_the_user_is_shown_without_a_traceback(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(importlib.import_module(module), name)
    said = {"__init__": lambda self: None, "__str__": lambda self: "the disk is full; free some"}
    error = type(name, (kind,), said)()

    def broken(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and "saccade: the disk is full; free some" in capsys.readouterr().err


CAUGHT = {
    *("RowRefusedError", "ElementError", "GoldError", "MediaError", "MediaTooLargeError"),  # a row is refused
    *("TransientError", "ServiceError", "SandboxError", "LinkEndedError", "UnsupportedError"),  # a verdict says so
    *("_UnjudgeableError", "NotJSONError", "_SlowPatternError"),
    *("EngineDeadError", "PromptRefusedError", "BroadcastError"),  # named by the driver, or by the sync
    "RefusedError",  # the trainer lists it with the others
}
"""Errors that are caught where they arise, and become something else."""
DEFECTS = {"LedgerError", "StalenessError"}


def test_every_error_is_for_the_user_or_caught_or_a_defect(repository: Path) -> None:
    bases: dict[str, set[str]] = {}
    for room in ("saccade", "learner", "rewards", "rollout", "weight_sync", "vlm"):
        for path in (repository / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                    bases[node.name] = {ast.unparse(base) for base in node.bases}

    def for_users(name: str) -> bool:
        return name == "UserError" or any(map(for_users, bases.get(name, ())))

    assert {name for name in bases if not for_users(name)} == CAUGHT | DEFECTS


def test_a_defect_is_shown_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ValueError, match="ours"):
        cli.main()

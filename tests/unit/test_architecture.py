"""The rules of docs/architecture.md, checked from the syntax trees: who may import whom, and how big things may get.

The checker itself is tried on small synthetic violations first.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from saccade.config.knobs import knobs

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("rollout", "learner", "rewards", "weight_sync", "vlm", "saccade", "deploy")
OURS = (*ROOMS, "bench", "tests", "examples")

# What of ours each room may import beyond itself. `bench` and `tests` may import everything.
MAY_IMPORT = {
    "rollout": ("rollout.types", "rewards.answers.golds", "vlm", "weight_sync"),
    "learner": ("rollout.types", "rollout.config", "vlm", "weight_sync"),
    "rewards": (
        *("rollout.types", "vlm.section", "vlm.user_code", "vlm.import_path", "vlm.control_tokens", "vlm.errors"),
        "vlm.media.types",
    ),
    "vlm": (),
    "weight_sync": ("rollout.types", "vlm.errors"),
    "saccade": ("rollout", "learner", "rewards", "weight_sync", "vlm"),
    "deploy": (),
    "examples": ("rollout.types", "rewards", "saccade"),
}
# Where each heavy library may be imported, as glob patterns; elsewhere it would make a pure part slow and untestable.
HEAVY = {
    "ray": (
        *("*/*actor.py", "rollout/handle.py", "learner/worker.py", "learner/group.py"),
        *(
            "saccade/fleet/*.py",
            "saccade/observe/gauges.py",
        ),
    ),
    "vllm": ("rollout/engines/vllm_*.py", "weight_sync/*.py"),
    "deepspeed": ("learner/engines/deepspeed_*.py", "weight_sync/source.py"),
}
# What stands in a room, the uppermost first: each imports only what stands further down, also within functions and for
# types alone. `__init__` of `saccade` names what users import.
ORDERS = {
    "saccade": (
        *(
            "__main__",
            "cli",
            "__init__",
            "commands",
            "demo",
            "trainer",
            "loop",
            "watchdog",
            "opening",
            "run",
            "finished",
            "preflight",
            "checks",
        ),
        *("checkpoints", "pipeline", "fleet", "observe", "config", "errors"),
    ),
    "learner": (
        *("plan", "group", "worker", "update", "refusal", "features", "engines", "model", "batching", "algorithm"),
        *("deaths", "durable", "types", "config", "__init__"),
    ),
    "rewards": (
        *("actor", "model_actor", "process", "registry", "config", "functions", "compose", "sandbox", "answers"),
        *("base", "__init__"),
    ),
    "rollout": ("handle", "actor", "joint_start", "data", "engines", "config", "types", "__init__"),
    "weight_sync": ("sync", "vllm_worker", "sender", "gloo", "client", "source", "protocols", "verify", "__init__"),
    "vlm": (
        *("tiny", "families", "publish", "media_cost", "adapter", "media_tokens", "tower_outputs", "tower_end"),
        *(
            "config",
            "section",
            "parameter_names",
            "batch",
            "encoding",
            "media",
            "end_tokens",
            "control_tokens",
            "user_code",
        ),
        *("import_path", "errors", "__init__"),
    ),
}
SHELLS = (
    *("__main__", "__init__", "cli", "demo", "loop", "opening", "watchdog", "run", "finished", "preflight"),
    *("fleet", "observe"),
)
"""Of `saccade`, what may have Ray loaded."""
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_KNOBS = 80


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    typing_only: bool
    """Under `if TYPE_CHECKING:`, never executed."""


def find_imports(path: PurePosixPath, source: str) -> Iterator[Import]:
    """Every import in a file, wherever it stands: in functions, relative, and by name through importlib."""
    tree = ast.parse(source, str(path))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        for module in _modules(node, path):
            yield Import(module, node.lineno, id(node) in typing_only)  # type: ignore[attr-defined]


def _modules(node: ast.AST, path: PurePosixPath) -> list[str]:
    """The modules that one node imports. `from rollout import types` counts as rollout.types, in sub-packages too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = list(path.parts[: -node.level]) if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        package = (ROOT / module.replace(".", "/")).is_dir()
        return [f"{module}.{alias.name}" for alias in node.names] if package else [module]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module",
        "import_module",
        "__import__",
    ):
        named = node.args[0] if node.args else None
        return [named.value] if isinstance(named, ast.Constant) and isinstance(named.value, str) else []
    return []


def violations(path: PurePosixPath, source: str) -> list[str]:
    """What a file of ours imports against the rules, one line each."""
    room = path.parts[0]
    if room in ("tests", "bench"):
        return []
    found = []
    for item in find_imports(path, source):
        top = item.module.split(".")[0]
        where = f"{path}:{item.line}"
        if top in OURS and not _allowed(path, room, item.module):
            found.append(f"{where} imports {item.module}; {_permitted(path, room)}")
        if top in HEAVY and not item.typing_only and not any(path.match(p) for p in HEAVY[top]):
            found.append(f"{where} imports {top}, which belongs only in {', '.join(HEAVY[top])}")
    return found


def _allowed(path: PurePosixPath, room: str, module: str) -> bool:
    if path == PurePosixPath("rollout/types.py"):
        return module == "vlm.media.types"
    return any(module == name or module.startswith(f"{name}.") for name in (room, *MAY_IMPORT[room]))


def _permitted(path: PurePosixPath, room: str) -> str:
    if path == PurePosixPath("rollout/types.py"):
        return "rollout/types.py imports of ours only vlm.media.types"
    return f"{room} may import only {', '.join((room, *MAY_IMPORT[room]))}"


def long_functions(source: str) -> list[tuple[str, int]]:
    """Functions over the limit, with their length in lines."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = ((f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions)
    return [(name, lines) for name, lines in lengths if lines > MAX_FUNCTION_LINES]


def source_files() -> list[tuple[PurePosixPath, str]]:
    paths = sorted(p for folder in OURS for p in (ROOT / folder).rglob("*.py"))
    return [(PurePosixPath(p.relative_to(ROOT)), p.read_text()) for p in paths]


def uphill(path: PurePosixPath, source: str) -> list[str]:
    """What a file imports of its own room that stands above it in ORDERS, one line each."""
    room, own = path.with_suffix("").parts[:2]
    order = ORDERS[room]
    found = []
    for item in find_imports(path, source):
        top, *rest = item.module.split(".")
        other = rest[0] if rest and rest[0] in order else "__init__"
        if top == room and order.index(other) < order.index(own):
            found.append(f"{path}:{item.line} imports {item.module}, which stands above {own}")
    return found


def imported(files: list[tuple[PurePosixPath, str]]) -> dict[str, set[str]]:
    """Map each module to those of the others that it imports, also within functions and for types alone."""
    named = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): (path, text) for path, text in files}

    def module_of(name: str) -> str:
        return name if name in named or not name else module_of(name.rpartition(".")[0])

    return {name: {module_of(i.module) for i in find_imports(*file)} - {"", name} for name, file in named.items()}


def circles(files: list[tuple[PurePosixPath, str]]) -> list[str]:
    """Return the modules that import each other in a circle, or lie between two circles."""
    needs = imported(files)
    left = set(needs)
    while free := {name for name in left if not needs[name] & left or not any(name in needs[n] for n in left)}:
        left -= free
    return sorted(left)


# --- the checker, on violations made for it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("rollout/types.py", "from vlm.batch import MultimodalBatch", "imports of ours only vlm.media.types"),
        ("rollout/types.py", "from rollout import engine", "imports of ours only vlm.media.types"),
        ("rollout/actor.py", "from learner.group import LearnerGroup", "rollout may import only"),
        ("rollout/actor.py", "def f():\n    import rewards.base", "rollout/actor.py:2 imports rewards.base"),
        ("learner/batching/packing.py", "import rollout", "imports rollout;"),
        ("learner/batching/packing.py", "from rollout import prompts", "imports rollout.prompts"),
        ("learner/batching/packing.py", "from rollout.typesetting import x", "imports rollout.typesetting"),
        (
            "learner/batching/packing.py",
            "import importlib\nimportlib.import_module('saccade.loop')",
            ":2 imports saccade.loop",
        ),
        ("learner/sub/deep.py", "from ...rewards import base", "imports rewards.base"),
        ("rewards/functions/format.py", "from vlm import media", "rewards may import only"),
        ("vlm/families/qwen_vl.py", "from weight_sync.sync import sync_weights", "vlm may import only"),
        ("weight_sync/sync.py", "from learner.engines.protocol import TrainEngine", "weight_sync may import only"),
        ("saccade/loop.py", "from bench.timing import measure", "saccade may import only"),
        ("saccade/loop.py", "from tests.conftest import local_ray", "saccade may import only"),
        ("deploy/torchvision_cpu.py", "import saccade", "deploy may import only"),
        (
            "vlm/adapter.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from saccade.config.run_config import RunConfig",
            "vlm/adapter.py:3 imports saccade.config.run_config",
        ),
        ("rollout/data/source.py", "import ray", "imports ray, which belongs only in"),
        ("rollout/engines/simulated_engine.py", "async def f():\n    from ray.util import metrics", ":2 imports ray"),
        ("rollout/engines/protocol.py", "from vllm import AsyncLLM", "imports vllm, which belongs only in"),
        ("saccade/loop.py", "import vllm", "imports vllm, which belongs only in"),
        ("saccade/loop.py", "__import__('deepspeed')", "imports deepspeed, which belongs only in"),
        ("learner/engines/torch_engine.py", "import deepspeed", "imports deepspeed, which belongs only in"),
        ("weight_sync/client.py", "import deepspeed", "imports deepspeed, which belongs only in"),
        ("examples/my_reward.py", "from learner import losses", "examples may import only"),
    ],
)
def test_the_checker_sees_a_violation(path: str, source: str, expected: str) -> None:
    found = violations(PurePosixPath(path), source)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rollout/types.py", "import numpy as np\nfrom vlm.media.types import Media"),
        (
            "rollout/actor.py",
            "import ray\nfrom rollout.types import Prompt\nfrom vlm.batch import x\nimport weight_sync.gloo",
        ),
        ("rollout/engines/vllm_engine.py", "from vllm import AsyncLLM\nfrom . import engine"),
        ("rewards/actor.py", "import ray\nfrom rollout import types\nfrom .base import ScoringRequest"),
        ("learner/group.py", "import ray\nfrom learner.engines.protocol import TrainEngine"),
        ("learner/engines/deepspeed_engine.py", "def f():\n    import deepspeed"),
        ("weight_sync/source.py", "import vllm, deepspeed"),
        ("saccade/fleet/placement.py", "import ray\nfrom learner.group import LearnerGroup"),
        (
            "learner/model/policy.py",
            "import rayon\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deepspeed",
        ),
        ("bench/learner.py", "import ray, vllm, deepspeed, saccade.loop"),
        ("tests/test_x.py", "import ray, vllm, deepspeed, saccade.loop"),
    ],
)
def test_the_checker_accepts_what_is_allowed(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []


def test_the_checker_measures_functions() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(MAX_FUNCTION_LINES - 1))
    assert long_functions(f"def fits():\n{body}") == []
    assert long_functions(f"class C:\n  async def long(self):\n{body}\n    y = 0") == [("long", MAX_FUNCTION_LINES + 1)]


# --- the project ------------------------------------------------------------------------------------------------------


def test_imports_follow_the_rules() -> None:
    found = [line for path, source in source_files() for line in violations(path, source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("saccade/config/options.py", "from saccade.fleet.placement import Placement", "stands above config"),
        ("saccade/fleet/actors.py", "def f():\n    from saccade.pipeline import groups", ":2 imports saccade.pipeline"),
        ("learner/types.py", "from learner.batching.packing import shard", "stands above types"),
        ("saccade/run.py", "from saccade import train", "imports saccade.train, which stands above run"),
    ],
)
def test_the_checker_sees_an_arrow_uphill(path: str, source: str, expected: str) -> None:
    (line,) = uphill(PurePosixPath(path), source)
    assert expected in line


@pytest.mark.parametrize("room", ORDERS)
def test_no_arrow_leads_uphill(room: str) -> None:
    files = [(path, source) for path, source in source_files() if path.parts[0] == room]
    assert {path.with_suffix("").parts[1] for path, _ in files} == set(ORDERS[room])
    found = [line for path, source in files for line in uphill(path, source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "import vlm.b", "b": "import vlm.c", "c": "import os"}, []),
        ({"a": "import vlm.b", "b": "def f():\n    from vlm.c import x", "c": "from vlm import b"}, ["vlm.b", "vlm.c"]),
        (
            {"a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x", "b": "import vlm.a"},
            ["vlm.a", "vlm.b"],
        ),
        ({"media/a": "from vlm.media import b", "media/b": "from vlm.media import a"}, ["vlm.media.a", "vlm.media.b"]),
    ],
)
def test_the_checker_sees_a_circle(sources: dict[str, str], expected: list[str]) -> None:
    assert circles([(PurePosixPath(f"vlm/{name}.py"), source) for name, source in sources.items()]) == expected


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    found = circles([(path, source) for path, source in source_files() if path.parts[0] in ROOMS])
    assert not found, f"a circle within {found}"


def test_files_and_functions_stay_readable() -> None:
    found = []
    for path, source in source_files():
        if path.parts[0] == "tests":
            continue
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path} has {lines} lines, the limit is {MAX_FILE_LINES}: split it by what it does")
        found += [
            f"{path}: {name}() has {n} lines, the limit is {MAX_FUNCTION_LINES}" for name, n in long_functions(source)
        ]
    assert not found, "\n" + "\n".join(found)


def test_the_path_of_one_prompt_names_at_most_30_files_and_all_are_there() -> None:
    section = (ROOT / "docs/architecture.md").read_text().split("### File by file")[1].split("\n## ")[0]
    rows = [line.split("|")[1:5] for line in section.splitlines() if re.match(r"\| \d", line)]
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1)) and 20 <= len(rows) <= 30
    sources = [str(path) for path, _ in source_files()]
    for _, file, _, beside in rows:
        (path,) = re.findall(r"`(.+?)`", file)
        assert (ROOT / path).is_file(), path
        for name in re.findall(r"`(.+?)`", beside):
            assert any(f"/{name}" in f"/{source}" for source in sources), name


def test_what_crosses_processes_needs_only_numpy() -> None:
    for name in ("rollout/types.py", "vlm/media/types.py"):
        path = PurePosixPath(name)
        modules = {i.module for i in find_imports(path, (ROOT / path).read_text())} - {"vlm.media.types"}
        assert {module.split(".")[0] for module in modules} <= {*sys.stdlib_module_names, "numpy"}


def test_rooms_are_plain_packages() -> None:
    """Importing one module of a room must not drag in its neighbours through `__init__.py`."""
    for room in set(ROOMS) - {"saccade"}:
        init = ROOT / room / "__init__.py"
        assert init.is_file(), f"{room} is no package"
        assert not list(find_imports(PurePosixPath(room, "__init__.py"), init.read_text())), f"{init} imports"


PROBE = """
import importlib, json, sys
heavy, names = json.loads(sys.argv[1])
found = {}
for name in names:
    importlib.import_module(name)
    fresh = [h for h in heavy if h in sys.modules and h not in sum(found.values(), [])]
    if fresh:
        found[name] = fresh
print(json.dumps(found))
"""


def brought_in(names: list[str], heavy: list[str]) -> dict[str, list[str]]:
    """Import modules in a process of their own; returns which of them was the first to load a heavy library."""
    command = [sys.executable, "-c", PROBE, json.dumps([heavy, names])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_pure_modules_load_without_ray_vllm_deepspeed() -> None:
    """Not even through a third library: what is pure is tested in milliseconds and works where those are missing."""
    pure = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path, _ in source_files()
        if path.parts[0] in ROOMS
        and not any(path.match(p) for patterns in HEAVY.values() for p in patterns)
        and path.parts[0] != "deploy"  # scripts for the environment, not part of the program
        and not (path.parts[0] == "saccade" and path.with_suffix("").parts[1] in SHELLS)
    ]
    assert "rollout.types" in pure
    assert brought_in(pure, list(HEAVY)) == {}


def test_configuration_loads_without_torch() -> None:
    """A wrong configuration is reported at once, not after torch, transformers or Ray have been imported."""
    names = ["rollout.types", "rewards.base", "saccade", "saccade.config.run_config"]
    assert brought_in(names, ["torch", "transformers", *HEAVY]) == {}


def test_knobs_are_few_and_documented() -> None:
    assert len(knobs()) <= MAX_KNOBS, f"{len(knobs())} knobs, the limit is {MAX_KNOBS}"
    bare = [knob.name for knob in knobs().values() if not knob.text]
    assert not bare, f"knobs without a docstring: {bare}"

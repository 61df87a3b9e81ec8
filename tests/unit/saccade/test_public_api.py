"""`import saccade`: which names it has, with which signatures, and that it is light."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import saccade

SIGNATURES = {
    "evaluate": "(config: 'RunConfig', *, address: 'str | None' = None, display: 'Display | None' = None) -> 'Results'",
    "load_config": "(path: 'str | Path', overrides: 'Sequence[str]' = ()) -> 'RunConfig'",
    "parse_config": "(tree: 'Mapping[str, Any]', source: 'str' = 'the configuration', found: 'Sequence[str]' = ()) "
    "-> 'RunConfig'",
    "train": "(config: 'RunConfig', *, resume: 'bool' = False, address: 'str | None' = None, display: "
    "'Display | None' = None) -> 'RunResult'",
    "ConfigError": "(problems: 'Sequence[str]', source: 'str' = 'the configuration') -> 'None'",
    "RunResult": "(output_dir: 'Path', model_dir: 'Path | None', steps: 'int', evaluations: 'Mapping[int, "
    "Results]', interrupted: 'bool' = False) -> None",
    "ScoringRequest": "(prompt: 'str', completions: 'tuple[str, ...]', answer: 'str | None' = None, columns: "
    "'Mapping[str, Any]' = <factory>, media: 'tuple[Media, ...]' = (), raw: 'tuple[Completion, ...]'"
    " = (), lengths: 'tuple[int, ...]' = (), user_text: 'str' = '', *, numeric_answer: 'bool' = "
    "False) -> None",
    "Trainer": "(model: 'str | Path | None' = None, reward_funcs: 'Any' = None, args: 'Any' = None, "
    "train_dataset: 'Any' = None, eval_dataset: 'Any' = None, *, adapter: 'str | "
    "type[MultimodalAdapter] | None' = None, peft_config: 'Any' = None) -> 'None'",
    "Verdict": "(status: 'VerdictStatus', score: 'float | None' = None, reason: 'str' = '', parts: "
    "'Mapping[str, float]' = <factory>, note: 'str' = '') -> None",
}
"""Public functions and classes that users call."""
ERRORS = ("ConfigError", "RunError", "TransientError", "UserError")
TYPES = ("MultimodalAdapter", "RewardFunction", "RunConfig", "RunResult", "ScoringRequest", "Verdict")
HEAVY = ("torch", "vllm", "ray", "transformers", "deepspeed", "pydantic", "numpy")


def loaded_after(code: str) -> list[str]:
    """Which heavy packages a fresh process has loaded."""
    probe = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    found: list[str] = json.loads(result.stdout)
    return found


def test_the_public_names_are_these() -> None:
    assert sorted(saccade.__all__) == sorted({*SIGNATURES, *ERRORS, *TYPES})
    assert set(saccade.__all__) <= set(dir(saccade))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name: str) -> None:
    assert str(inspect.signature(getattr(saccade, name))) == SIGNATURES[name]


def test_errors_for_the_user_have_one_base() -> None:
    assert all(issubclass(getattr(saccade, name), saccade.UserError) for name in ("ConfigError", "RunError"))


def test_type_checkers_see_the_names_that_there_are() -> None:
    """What is imported for type checkers, what is looked up on first use and `__all__` are the same."""
    tree = ast.parse(Path(saccade.__file__).read_text())
    (typing,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [n for n in typing.body if isinstance(n, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == saccade._MODULE_OF
    assert set(saccade._MODULE_OF) == set(saccade.__all__)
    for name, module in saccade._MODULE_OF.items():
        assert getattr(saccade, name).__module__ == module, "named where it is defined"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = saccade.trian  # type: ignore[attr-defined]


def test_importing_it_loads_nothing_heavy() -> None:
    assert loaded_after("import saccade; saccade.__version__; dir(saccade)") == []


def test_rewards_and_configurations_need_no_torch_and_no_ray() -> None:
    names = "RunConfig, load_config, parse_config, Verdict, ScoringRequest, UserError, ConfigError, RunError"
    assert set(loaded_after(f"from saccade import {names}")) <= {"pydantic", "numpy"}


@pytest.mark.parametrize("package", ["rollout", "learner", "rewards", "weight_sync", "vlm", "saccade"])
def test_packages_are_typed(package: str, repository: Path) -> None:
    assert (repository / package / "py.typed").is_file()

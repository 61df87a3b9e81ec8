"""Reward functions as they are given -> rewards of a configuration, and a file in the run's folder where one is needed.

    a shipped reward's name, file.py:function       stays
    a function that a module or file has             goes by its name
    any other, or one that wants what TRL hands out  a function in given/rewards.py, pickled where it has no module

Rewards run in processes of their own, on any node: what is given must be found there again.
"""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

from learner.durable import atomic_file
from saccade.trainer.rows import Rows

HEADER = '"""Written by saccade.Trainer: the reward functions that it was given."""\n\nfrom {module} import {names}\n'
MODULE = "rewards.functions.given"


@dataclass
class GivenRewards:
    """Rewards as a configuration has them, and what has to be written for them."""

    specs: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    """Functions of the file, with the expression that makes each."""
    pickles: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def only_functions(self) -> bool:
        """Nothing that is shipped or named, so that no answer has to be known of."""
        return all(spec.get("function", False) for spec in self.specs)

    def configured(self, folder: Path) -> list[dict[str, Any]]:
        """`folder`: where `write` puts the file."""
        found = []
        for spec in self.specs:
            name = f"{folder / 'rewards.py'}:{spec['name']}" if spec["name"] in self.sources else spec["name"]
            found.append({key: value for key, value in spec.items() if key != "function"} | {"name": name})
        return found

    def write(self, folder: Path) -> None:
        if not self.sources:
            return
        for name, pickled in self.pickles.items():
            atomic_file(folder / f"{name}.pkl", pickled)
        lines = [f"{name} = {expression}\n" for name, expression in self.sources.items()]
        atomic_file(folder / "rewards.py", HEADER.format(module=MODULE, names="find, given, stored") + "".join(lines))


def given_rewards(functions: Any, weights: Sequence[float] | None, rows: Rows | None) -> GivenRewards:
    """`functions`: one or several names, functions, or mappings of a reward's keys; `rows`: of the training data, where
    they are not files."""
    one = isinstance(functions, str | Mapping) or callable(functions)
    listed = [functions] if one else list(functions)
    made = GivenRewards()
    for n, function in enumerate(listed):
        keys = dict(function) if isinstance(function, Mapping) else {"name": function}
        target = keys.pop("name", None)
        if isinstance(target, str):
            made.specs.append({"name": target, **keys})
        elif problem := _problem(target):
            made.problems.append(f"reward_funcs[{n}]: {problem}")
        else:
            made.specs.append({"name": _add(made, target, n, rows), **keys, "function": True})
    if weights is not None and len(weights) != len(listed):
        made.problems.append(f"args.reward_weights has {len(weights)} weights for {len(listed)} reward functions")
    elif weights is not None and not made.problems:
        for spec, weight in zip(made.specs, weights, strict=True):
            spec["weight"] = weight
    return made


def _problem(target: Any) -> str:
    if hasattr(target, "forward"):
        return "a model: name the shipped reward `reward_model`, with the model's path among its options"
    if inspect.isclass(target) or not callable(target):
        return f"{target!r:.60} is not a function, a reward's name, or file.py:function"
    return ""


def _add(made: GivenRewards, function: Callable[..., Any], n: int, rows: Rows | None) -> str:
    """The name under which a run finds the function."""
    name = importable_name(function)
    parameters = list(inspect.signature(function).parameters.values())
    takes_request = bool(parameters) and parameters[0].name == "request"
    names = {p.name for p in parameters}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    columns: list[str] = []
    conversations = None
    if rows is not None and not takes_request:
        columns = [column for column in rows.columns if takes_all or column in names]
        conversations = rows.conversations
    as_it_is = takes_request or (conversations is None and not (takes_all and columns) and "answer" not in columns)
    if name is not None and as_it_is:
        return name
    own = _identifier(function, n, made.sources)
    if name is None:
        try:
            made.pickles[own] = cloudpickle.dumps(function)
        except Exception as error:  # foreign objects say in many ways that they cannot be pickled
            made.problems.append(
                f"reward_funcs[{n}]: it cannot be sent to the processes of rewards ({type(error).__name__}: {error}); "
                "put it in a file, and what it holds too"
            )
    source = f"find({name!r})" if name is not None else f"stored(__file__, {own!r})"
    wrapped = f"given({source}, columns={tuple(columns)!r}, conversations={conversations!r})"
    made.sources[own] = source if as_it_is else wrapped
    return own


def importable_name(function: Callable[..., Any]) -> str | None:
    """The name under which every process finds the function; None for one that is of the script or notebook itself, of
    another function, or no function."""
    module, name = sys.modules.get(str(getattr(function, "__module__", None))), getattr(function, "__qualname__", "")
    if module is None or module.__name__ == "__main__" or getattr(module, name, None) is not function:
        return None
    file = getattr(module, "__file__", None)
    if "." not in module.__name__ and file is not None and file.endswith(".py"):
        return f"{file}:{name}"
    return f"{module.__name__}:{name}"


def _identifier(function: Callable[..., Any], n: int, taken: Mapping[str, str]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    fits = name.isidentifier() and not keyword.iskeyword(name) and name not in (*taken, "find", "given", "stored")
    return name if fits else f"reward_{n}"

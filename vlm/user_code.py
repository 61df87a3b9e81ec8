"""Find the user's code by name: `package.module:name` or `path/file.py:name`. Rewards and adapters are found in the
same way.

A module is also searched in the working directory, where an installed command, unlike `python -m`, does not look. A
relative path is searched there and then along the import path, since a worker on another node has the project in
another directory.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.import_path import ours_first


class UserCodeError(UserError, ValueError):
    """Nothing can be found under the name; the message says why."""


def find(name: str) -> Any:
    """Return the user's object `name`. Raises UserCodeError."""
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UserCodeError(f"{name!r} must have the form package.module:name or path/file.py:name")
    if (here := _working_directory()) and here not in sys.path:
        sys.path.append(here)
    ours_first()
    try:
        module = _import_file(source) if source.endswith(".py") else importlib.import_module(source)
    except UserCodeError:
        raise
    except (Exception, SystemExit) as error:  # the user's code runs at import
        raise UserCodeError(f"{name}: importing {source} failed: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        public = [n for n in own if not n.startswith("_")]
        raise UserCodeError(f"{name}: {source} has no {attribute!r}; it has: {', '.join(public) or 'none'}") from None


def _working_directory() -> str:
    """Return the working directory, or nothing if it was removed: Ray nodes that share a machine unpack a job's folder
    anew, one after the other, under the job's feet. What was found in it before is on the path already."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return ""


def located(name: str) -> str:
    """Return a name that finds the same code from any folder. A file, or a module that is one file in the working
    directory, gets its absolute path. Modules of packages keep their name, since they must be on the import path."""
    source, colon, attribute = name.rpartition(":")
    file = Path(source if source.endswith(".py") else f"{source}.py")
    if not colon or not file.is_file() or ("." in source and not source.endswith(".py")):
        return name
    return f"{file.absolute()}:{attribute}"


def short(name: str) -> str:
    """Return the name without folders, the same for a file and for its module. Metrics use it."""
    source, colon, attribute = name.rpartition(":")
    return f"{Path(source).stem}:{attribute}" if colon and source.endswith(".py") else name


def name_of(thing: Any) -> str:
    """Return a name under which `find` finds a class or function again."""
    module = sys.modules[thing.__module__]
    source = module.__file__ if module.__name__.startswith(_FILE) else module.__name__
    return located(f"{source}:{thing.__qualname__}")


_FILE = "user_file_"


def _import_file(source: str) -> Any:
    """Import a file once. Its folder is appended to `sys.path`."""
    places = [Path(source)] if Path(source).is_absolute() else [Path(p or ".") / source for p in ("", *sys.path)]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        raise UserCodeError(
            f"no file {source} in {_working_directory() or 'a folder that is gone'} or on the import path"
        )
    module_name = f"{_FILE}{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserCodeError(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
        ours_first()
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before the module runs, since dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module

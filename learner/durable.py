"""The one writer of files that must be whole or absent and survive a power failure; they are checked before reading.

    atomic_directory: room enough? ─▶ written beside its place ─▶ digests.json ─▶ fsync ─▶ renamed
    atomic_file:                      the same for one file
    remove_directory: renamed ─▶ removed, so that no part of it stands under its name
    damage(directory): the first file that is missing, cut or changed, in words

A disk that is full or read-only raises StorageError, which says which file, what was needed and what is free.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm.errors import UserError

DIGESTS = "digests.json"
"""In every sealed directory: file -> its size and SHA-256. A sealed directory inside counts by its own digests."""
MARGIN = 1.05
"""Free space asked for, as a multiple of what will be written."""
PLACE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ESTALE,  # this and the following: a network's file system that is away
    errno.ENOTCONN,
    errno.ETIMEDOUT,
)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot sync a folder (some network and FUSE mounts), or let it be written but not read.
Its files are synced all the same; whether their names survive is then left to the file system."""


class StorageError(UserError, RuntimeError):
    """A place cannot be written to. Says which file, why, and what to do; nothing half-written is left."""


@contextmanager
def atomic_directory(directory: Path, *, needed: int = 0, sealed: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `directory` to write into; it takes that place, durably, if the block succeeds.

    `needed` bytes must be free before anything is written; `sealed` writes DIGESTS. After an error the former content
    stands where it was. After a crash either the former content or the new one is there. A crash between the two
    renames leaves the former content under a hidden name, and `clear_leftovers` puts it back. Raises StorageError."""
    mark = uuid.uuid4().hex[:8]
    partial, former = (directory.parent / f".{directory.name}.{kind}-{mark}" for kind in ("partial", "former"))
    with storage_errors(directory):
        make_folder(directory.parent)
        check_room(directory, needed)
        try:
            partial.mkdir()
            yield partial
            if sealed:
                seal(partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            if directory.exists():
                directory.rename(former)
            partial.rename(directory)
            _sync(directory.parent)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                if former.exists() and not directory.exists():
                    former.rename(directory)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if os.path.exists(directory):  # else `former` is all there is
                shutil.rmtree(former, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Remove `directory` as far as possible. It is renamed first: if the removal is cut short, no part of it stands
    under its name, and `clear_leftovers` removes the rest."""
    with suppress(OSError):
        shutil.rmtree(directory.rename(directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex[:8]}"))


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null. Python would write `NaN`, which is not
    JSON."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def atomic_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` as a whole, or leave what was there. Raises StorageError."""
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    with storage_errors(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink()


def append(path: Path, content: str) -> None:
    """Add `content` as a whole to the end of `path`, or nothing. Raises StorageError.

    A power failure may lose what was appended since the last `sync_file`."""
    with storage_errors(path), path.open("ab", buffering=0) as file:
        size, rest = file.tell(), content.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # the first error is the one to report
                file.truncate(size)
            raise


def make_folder(directory: Path) -> None:
    """Make `directory` and its parents. Those that are new survive a power failure."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync(path.parent)


def sync_file(path: Path) -> None:
    """Make a file and its name survive a power failure. Raises StorageError."""
    with storage_errors(path):
        _sync(path)
        _sync(path.parent)


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed writer left half-written in `directory`, as far as possible, and put back what it had moved
    aside. Nobody else may be writing there."""
    for path in directory.glob(".*.*-*") if directory.is_dir() else ():
        match = re.fullmatch(r"\.(.+)\.(partial|former)-[0-9a-f]{8}", path.name)
        if match is None:
            continue
        if match[2] == "former" and not (directory / match[1]).exists():
            path.rename(directory / match[1])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def seal(directory: Path) -> None:
    """Record size and digest of every file under `directory`."""
    names = _to_digest(directory)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: _measure(directory / name), names))
    (directory / DIGESTS).write_text(json.dumps(dict(zip(names, found, strict=True)), indent=1))


def damage(directory: Path) -> str | None:
    """Say which file of a sealed directory is not as it was written, the first one found; None if all are intact."""
    path = directory / DIGESTS
    try:
        recorded = json.loads(path.read_text())
        expected: Mapping[str, tuple[int, str]] = {name: (int(n), str(d)) for name, (n, d) in recorded.items()}
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path} is unreadable ({error})"
    for name, (size, _) in expected.items():
        if not (directory / name).is_file():
            return f"{directory / name} is missing"
        if (has := (directory / name).stat().st_size) != size:
            return f"{directory / name} has {has} of {size} bytes"
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(expected, pool.map(lambda n: _measure(directory / n), expected), strict=True):
            if tuple(found) != expected[name]:
                return f"{directory / name} has changed since it was written"
    inner = (directory / name for name in expected if name.endswith(f"/{DIGESTS}"))
    return next((text for path in inner if (text := damage(path.parent))), None)


def size_of(directory: Path) -> int:
    """Bytes of all files under `directory`."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if directory.is_dir() else 0


def check_room(path: Path, needed: int) -> None:
    """Raises StorageError if less than `needed` bytes plus a margin are free where `path` will be written."""
    free = _free(path)
    if free is not None and needed * MARGIN > free:
        raise StorageError(
            f"{path} needs {_gib(needed)}, and {_gib(free)} are free there; free some space, or name another output_dir"
        )


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the storage that `path` is written to, raised by Python or by safetensors, into StorageError."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number not in PLACE_ERRORS:
            raise
        at = getattr(error, "filename", None) or path
        free = _free(path)
        room = f" ({_gib(free)} free)" if free is not None else ""
        raise StorageError(
            f"{at} cannot be written: {os.strerror(number)}{room}; free some space, make the folder writable, or name "
            "another output_dir"
        ) from error


def _number(error: BaseException) -> int | None:
    """The error's errno. Safetensors has it only in the text of its error."""
    if isinstance(error, OSError):
        return error.errno
    found = (
        re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(error))
        if type(error).__name__ == "SafetensorError"
        else None
    )
    return int(found[1] or found[2]) if found else None


def _to_digest(directory: Path) -> list[str]:
    """Relative names of the files under `directory`. A sealed directory inside it is represented by its digests."""
    names = []
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            inner = [DIGESTS] if (path / DIGESTS).exists() else _to_digest(path)
            names += [f"{path.name}/{name}" for name in inner]
        elif path.name != DIGESTS:
            names.append(path.name)
    return names


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _free(path: Path) -> int | None:
    """Bytes that are free where `path` is or will be; None if that cannot be known."""
    for place in (path, *path.parents):
        if os.path.exists(place):  # False where nobody may look
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _sync(path: Path) -> None:
    """Make a file's or folder's content survive a power failure."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise

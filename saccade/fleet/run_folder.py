"""The lock of a run's folder: one run at a time writes into it, and clears what a killed one left half-written.

The lock is the kernel's, on `run.lock`: it ends with the process that holds it, however that ends, also on another
machine that shares the folder. The file says who; a file that nobody holds means nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from learner.durable import clear_leftovers, make_folder, storage_errors
from saccade.config.messages import ConfigError

LOCK = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""File systems that cannot lock answer with these, such as Lustre when it is mounted without `flock`."""


@contextmanager
def held(directory: Path) -> Iterator[str | None]:
    """Hold `directory` for the length of a run, and make it if needed. Yields a remark for the user, or None.

    Raises ConfigError naming the run that holds it, StorageError where nothing can be written."""
    path = directory / LOCK
    made = not os.path.exists(directory)  # also where nobody may look
    with storage_errors(directory):
        make_folder(directory)
        descriptor, remark = _open_locked(path)
    try:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        note = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, note.encode(), 0)
            for folder in (directory, directory / "checkpoints"):
                clear_leftovers(folder)
        yield remark
    finally:
        with suppress(OSError):  # the folder is gone, or another's by now: no reason to hide how the run ended
            if _same(descriptor, path):
                path.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # something is in it
                directory.rmdir()


def in_use(directory: Path) -> str | None:
    """Say who holds `directory`; None if nobody does."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refusal(directory / LOCK)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return None


def _open_locked(path: Path) -> tuple[int, str | None]:
    """Return a locked descriptor of the file that stands at `path`, as a run that ends removes its own; and a remark if
    the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(descriptor, path):
                return descriptor, None
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError([_refusal(path)], "what the configuration refers to") from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return (
                    descriptor,
                    f"output_dir: {path.parent} does not support file locks; make sure that no second run writes there",
                )
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path) -> str:
    try:
        note = json.loads(path.read_text())
        who = f"process {note['pid']} on {note['host']}, since {note['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "a process that is just starting"
    return f"output_dir: {path.parent} is in use by another run ({who}); wait for it, or choose another output_dir"

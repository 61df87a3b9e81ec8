"""Ends what is left of a local Ray when its driver is gone: a small process of its own, started before Ray is.

driver ── pipe ──▶ reaper    every second: which processes descend from Ray's, which are the driver's children?
       a byte, end of file, or another parent: the run or the driver ended ─▶ those that still live are killed

Whoever is forked from the driver holds the pipe too: an end of file may never come, hence the byte and the parent. A
driver that is process 1 of a container has no other parent after it, and needs none: the kernel ends all with it. While
it lives, whatever lost its parent is its child: what is older than the reaper is not of this Ray.

Ray's own processes mostly notice a dead driver; its agents on the node do not, and what an actor started may not.
Linux only: it reads /proc. Standard library only: it starts in milliseconds and holds almost no memory.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LOOK_SECONDS = 1.0
END_SECONDS = 10.0
"""Seconds in which everything ends that can be ended."""


class Process(NamedTuple):
    parent: int
    started: int
    """In ticks since boot: tells a process from a later one with the same number."""


def start(ray_folder: Path) -> subprocess.Popen[bytes] | None:
    """A reaper for the Ray that this process is about to start, whose programs lie in `ray_folder`.

    It looks when this returns. None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(ray_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C on the terminal is not for it
    )
    assert reaper.stdout is not None
    with reaper.stdout as looking:
        looking.readline()  # not to the end of file: somebody may have forked just now
    return reaper


def finish(reaper: subprocess.Popen[bytes]) -> None:
    """Have the reaper end what Ray left, and wait until it has."""
    assert reaper.stdin is not None
    with suppress(BrokenPipeError), reaper.stdin as pipe:
        pipe.write(b"\n")
    with suppress(subprocess.TimeoutExpired):  # something hangs in the kernel; the reaper ends by itself
        reaper.wait(END_SECONDS + LOOK_SECONDS)


def processes() -> dict[int, Process]:
    """Return all processes that live, zombies left out."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                found[int(name)] = Process(int(fields[1]), int(fields[19]))
    return found


def with_descendants(roots: Mapping[int, Process], alive: Mapping[int, Process]) -> dict[int, Process]:
    """Return those of `roots` that are still alive, and everything that descends from them."""
    found = {pid: alive[pid] for pid, known in roots.items() if pid in alive and alive[pid].started == known.started}
    size = -1
    while size != len(found):
        size = len(found)
        found |= {pid: process for pid, process in alive.items() if process.parent in found}
    return found


def children_since(parent: int, started: int, alive: Mapping[int, Process]) -> dict[int, Process]:
    """The children of `parent` that are no older than `started`."""
    return {pid: process for pid, process in alive.items() if process.parent == parent and process.started >= started}


def _of_ray(driver: int, ray_folder: str, alive: Mapping[int, Process]) -> dict[int, Process]:
    """The driver's children that run a program of Ray's, and are no older than this process."""
    found = {}
    for pid, process in children_since(driver, alive[os.getpid()].started, alive).items():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f"{ray_folder}/".encode() in command:
            found[pid] = process
    return found


def watch(driver: int, ray_folder: str) -> None:
    """Return when the driver is gone and nothing of its Ray is left."""
    known: dict[int, Process] = {}
    told = False
    while True:
        alive = processes()
        known = with_descendants(known | _of_ray(driver, ray_folder, alive), alive)
        known.pop(os.getpid(), None)
        if not told:
            with suppress(BrokenPipeError):
                os.write(1, b"\n")  # says that it looks
            os.close(1)
            told = True
        ready, _, _ = select.select([0], [], [], LOOK_SECONDS)
        if ready or os.getppid() != driver:
            break
    deadline = time.monotonic() + END_SECONDS
    while (known := with_descendants(known, processes())) and time.monotonic() < deadline:
        for pid in known:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # it ended, or is another user's
        time.sleep(0.02)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])

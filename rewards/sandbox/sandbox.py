"""Run Python programs that nobody has read: on Linux, isolated from the machine, or not at all.

run(files, stdin) ─▶ init.py ─▶ the program                     no network, no other process, no file of the machine but
                                                                its libraries; limits on time, memory, files, processes

It needs what containers need: namespaces, as root, or as any user if the kernel allows that. `isolation_problem` tests
each wall with a program that tries to break it. If one does not hold, no program may run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

_INIT = Path(__file__).with_name("init.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_START = 10.0
"""Seconds for building and leaving the sandbox, in addition to the program's own."""
_FIRST_USER = 2**30
MAX_OUTPUT = 2**20
"""The most bytes of a program's output that are read."""


class SandboxError(RuntimeError):
    """The sandbox could not be built, and the program was not run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one run of a program."""

    seconds: float = 5.0
    """Limit of the wall time, and of the CPU time of each process."""
    memory_bytes: int = 512 * 2**20
    """Limit of the address space of each process."""
    file_bytes: int = 16 * 2**20
    """Limit of one file, including the output. All files together may take four times that."""
    processes: int = 8
    """Limit of processes at once, including threads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    exit: int | None
    """Exit status, or the negative number of a signal, or None if it was killed for its wall time."""
    output: str
    errors: str


def run(files: Mapping[str, str], stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run `main.py` of `files` (name -> contents, in the working directory) with this Python and its standard library,
    without packages.

    Raises SandboxError."""
    with tempfile.TemporaryFile() as source:
        source.write(stdin.encode("utf-8", "surrogatepass"))
        source.seek(0)
        return _run(files, source, limits or Limits(), 0)


def run_linked(asking: Mapping[str, str], answering: Mapping[str, str], limits: Limits) -> tuple[Outcome, Outcome]:
    """Run two programs at once, each in its own sandbox. A socket joins them, which is the standard input of both; each
    loses its link when the other ends. Returns how each ended.

    Raises SandboxError."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:

        def answer() -> Outcome:
            with theirs:
                return _run(answering, theirs, limits, 1)

        other = pool.submit(answer)
        with ours:
            outcome = _run(asking, ours, limits, 0)
        return outcome, other.result()


def _run(files: Mapping[str, str], source: IO[bytes] | socket.socket, limits: Limits, number: int) -> Outcome:
    """Run one program. `number` is the number of this sandbox among those that run at the same time."""
    if sys.platform != "linux":
        raise SandboxError(f"programs need Linux namespaces for their isolation, and this machine runs {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        root = Path(folder, "root")
        root.mkdir()
        Path(folder, "root.json").write_text(json.dumps(_description(files, limits, number)))
        with Path(folder, "out").open("wb+") as out, Path(folder, "err").open("wb+") as err:
            status = _supervised(root, source, out, err, limits.seconds)
            return Outcome(status, _text(out), _text(err))


def _description(files: Mapping[str, str], limits: Limits, number: int) -> dict[str, object]:
    """Return the description that rewards/sandbox/init.py reads."""
    base = os.path.realpath(sys.base_prefix)
    read_only = [path for path in _SYSTEM if os.path.lexists(path)]
    if not any(base == path or base.startswith(f"{path}/") for path in _SYSTEM):
        read_only.append(base)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "files": dict(files),
        "command": [f"{base}/bin/{version}", "-I", "-S", "main.py"],
        "read_only": read_only,
        "disk_bytes": 4 * limits.file_bytes,
        "cpu_seconds": max(1, round(limits.seconds + 0.5)),
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
        # Processes are counted by user, so each sandbox has its own user.
        "user": _FIRST_USER + 2 * os.getpid() + number,
    }


def _supervised(
    root: Path, source: IO[bytes] | socket.socket, out: IO[bytes], err: IO[bytes], seconds: float
) -> int | None:
    """Wait for the program. Returns its exit status, or None if its wall time was over. None of its processes are left
    then.

    Raises SandboxError."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_INIT), str(root), str(writer)],
        stdin=source.fileno(),
        stdout=out,
        stderr=err,
        pass_fds=[writer],
        start_new_session=True,
        env={},
    )
    os.close(writer)
    with open(reader, "rb", buffering=0) as report:
        try:
            said = _line(report, _START)
            if said == {"started": True}:
                said = _line(report, seconds)
                if said is None:
                    return None
                process.wait(_START)  # until all processes that the program left behind are gone
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # process 1 of the sandbox dies with it, and so does everything in the sandbox
            process.wait()
    if said is None or "exit" not in said:
        raise SandboxError((said or {}).get("problem", "it ended without a message, or did not start in time"))
    return int(said["exit"])


def _line(report: IO[bytes], seconds: float) -> dict[str, Any] | None:
    """Return the next line of the report; None if none comes in time, or if there are no more."""
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([report], [], [], max(0.0, deadline - time.monotonic()))
        byte = report.read(1) if ready else b""
        if not byte:
            return None
        line += byte
    found: dict[str, Any] = json.loads(line)
    return found


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read(MAX_OUTPUT).decode("utf-8", "replace")


_PROBE = """
import json, os, signal, socket, sys
port, path, pid, file_bytes, memory, processes = json.loads(sys.stdin.read())
broken = []
def held(wall, attempt):
    try:
        attempt()
    except (OSError, MemoryError, RuntimeError):
        return
    broken.append(wall)
def write():
    with open("/tmp/large", "wb") as file:
        for _ in range(file_bytes // 65536 + 2):
            file.write(bytes(65536))
def breed():
    children = []
    try:
        for _ in range(processes + 2):
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)
held("the network", lambda: socket.create_connection(("127.0.0.1", port), 5).close())
held("files of the machine", lambda: open(path).close())
held("its own libraries", lambda: open(os.path.join(os.path.dirname(os.__file__), "os.py"), "a").close())
held("other processes", lambda: os.kill(pid, 0))
held("sizes of files", write)
held("memory", lambda: bytearray(memory))
held("numbers of processes", breed)
if os.getuid() == 0:
    broken.append("privileges")
print(json.dumps(broken))
"""


@cache
def isolation_problem() -> str:
    """Explain why programs cannot be isolated on this machine, or which walls a program got through; empty if all
    hold."""
    limits = Limits(seconds=20.0, memory_bytes=256 * 2**20, file_bytes=2**20, processes=6)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        against = [server.getsockname()[1], file.name, os.getpid()]
        given = json.dumps([*against, limits.file_bytes, limits.memory_bytes, limits.processes])
        try:
            outcome = run({"main.py": _PROBE}, given, limits)
        except SandboxError as error:
            return f"programs cannot be isolated here: {error}"
    if outcome.exit != 0:
        return f"the test program of the sandbox failed: exit status {outcome.exit}: {outcome.errors[-300:]}"
    broken = json.loads(outcome.output)
    return f"the sandbox does not isolate programs from: {', '.join(broken)}" if broken else ""

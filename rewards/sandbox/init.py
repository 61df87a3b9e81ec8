"""The first process of a sandbox: builds the sandbox around itself, then becomes the program.
rewards/sandbox/sandbox.py starts it as a separate script, which uses the standard library only.

unshare ─▶ a root of its own: read-only system, small writable /box ─▶ fork: process 1 of the sandbox
                                                             └▶ fork: limits, no privileges, exec program
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT_FLAGS = {8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
"""Flags of statvfs -> flags of mount: noexec, noatime, nodiratime, relatime. A user namespace may not clear them."""
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        shown = ", ".join(a.decode() if isinstance(a, bytes) else str(a) for a in arguments[:2])
        raise OSError(number, f"{name}({shown}): {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def leave_the_machine() -> bool:
    """Enter new namespaces for mounts, processes, network and the rest. Returns whether this took a user namespace."""
    apart = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NET
    if os.geteuid() == 0 and libc.unshare(apart) == 0:
        return False
    become_user(0, NEW_USER | apart)
    return True


def become_user(inside: int, flags: int = NEW_USER) -> None:
    """Enter a new user namespace, in which this process is user and group `inside`."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1"), ("gid_map", f"{inside} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(root: str, spec: Mapping[str, Any]) -> None:
    """Mount under `root`: the system read-only, three devices, and /box with the files of the program."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, f"size={spec['disk_bytes']},mode=755")
    for path in spec["read_only"]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        else:
            bind(path, target, READ_ONLY | NO_SUID | NO_DEV)
    os.makedirs(f"{root}/dev")
    for path in DEVICES:
        bind(path, root + path, NO_SUID)
    for folder in ("box", "tmp"):
        os.mkdir(f"{root}/{folder}")
        os.chmod(f"{root}/{folder}", 0o777)
    for name, text in spec["files"].items():
        os.makedirs(os.path.dirname(f"{root}/box/{name}"), exist_ok=True)
        with open(f"{root}/box/{name}", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)


def bind(path: str, target: str, flags: int) -> None:
    """Mount the file or folder `path` at `target`."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, BIND)
    found = os.statvfs(target).f_flag
    kept = sum(wanted for given, wanted in KEPT_FLAGS.items() if found & given) | (found & (READ_ONLY | NO_SUID))
    mount("none", target, None, BIND | REMOUNT | kept | flags | (found & NO_DEV))


def limit(spec: Mapping[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: spec["cpu_seconds"],
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: spec["file_bytes"],
        resource.RLIMIT_NPROC: spec["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def become_program(root: str, spec: Mapping[str, Any], nested: bool) -> None:
    """Give up every privilege and run the program. Returns only by an exception."""
    if nested:
        become_user(NOBODY)
    os.chroot(root)
    os.chdir("/box")
    if not nested:
        os.setgroups([])
        os.setresgid(spec["user"], spec["user"], spec["user"])
        os.setresuid(spec["user"], spec["user"], spec["user"])
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    limit(spec)
    os.execve(spec["command"][0], spec["command"], {"PATH": "/usr/bin:/bin", "HOME": "/box", "LANG": "C.UTF-8"})


def main() -> None:
    """Run `sandbox_init.py ROOT REPORT`. ROOT is a folder to mount on, and `ROOT.json` beside it describes the sandbox.
    REPORT is the descriptor to report to. Descriptors 0 to 2 belong to the program."""
    root, report = sys.argv[1], int(sys.argv[2])
    os.set_inheritable(report, False)
    with open(f"{root}.json", encoding="utf-8") as file:
        spec = json.load(file)
    try:
        nested = leave_the_machine()
        build_root(root, spec)
        first = os.fork()
        if first == 0:
            supervise(root, spec, nested, report)
        os.waitpid(first, 0)
    except OSError as error:
        say(report, problem=str(error))


def say(report: int, **what: Any) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def supervise(root: str, spec: Mapping[str, Any], nested: bool, report: int) -> None:
    """Run as process 1 of the sandbox: when it ends, everything in the sandbox ends. It is not the program itself,
    since process 1 ignores signals, including those of the limits."""
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    say(report, started=True)
    program = os.fork()
    if program == 0:
        try:
            become_program(root, spec, nested)
        except (OSError, ValueError) as error:
            say(report, problem=str(error))
        os._exit(127)
    while True:  # process 1 inherits orphans of the program
        pid, status = os.wait()
        if pid == program:
            say(report, exit=os.waitstatus_to_exitcode(status))
            os._exit(0)


if __name__ == "__main__":
    main()

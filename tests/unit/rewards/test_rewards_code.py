"""code_tests and its sandbox: programs that pass, fail and attack. The walls are tried with real programs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.functions import code_tests
from rewards.functions.code_tests import CodeTestsReward
from rewards.functions.user import RewardSetupError
from rewards.process.worker import RewardWorker
from rewards.sandbox import sandbox
from rewards.sandbox.sandbox import Limits, Outcome, SandboxError, isolation_problem, run

PATIENCE = 180.0

# Users, mounts, processes, network and the rest: asked of the kernel itself, lest a broken sandbox skip its own tests.
TRY = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x7C020000) != 0)"
CAN_ISOLATE = sys.platform == "linux" and subprocess.run([sys.executable, "-c", TRY], check=False).returncode == 0
isolating = pytest.mark.skipif(not CAN_ISOLATE, reason="this machine gives no namespaces")


@isolating
def test_every_wall_holds_here() -> None:
    assert isolation_problem() == ""


def test_without_isolation_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses: when it is loaded, and should it be called all the same."""
    monkeypatch.setattr(code_tests, "isolation_problem", lambda: "no namespaces here")
    monkeypatch.setattr(code_tests, "run", lambda *_: pytest.fail("a program was run"))
    with pytest.raises(RewardSetupError, match="no namespaces here"):
        CodeTestsReward().warm_up()
    with pytest.raises(RewardSetupError, match="It needs Linux namespaces"):
        CodeTestsReward()(ScoringRequest("", ("<answer>1</answer>",), columns={"tests": [{"code": "1"}]}))


def test_on_other_systems_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="this machine runs darwin"):
        run({"main.py": ""})


def test_a_wall_that_does_not_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe itself, run without a sandbox: every wall is missing."""

    def unprotected(files: Any, stdin: str, limits: Limits) -> Outcome:
        command = [sys.executable, "-c", files["main.py"]]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    monkeypatch.setattr(sandbox, "run", unprotected)
    problem = isolation_problem.__wrapped__()
    for wall in (
        "the network",
        "files of the machine",
        "other processes",
        "sizes of files",
        "memory",
        "numbers of pro",
    ):
        assert wall in problem


ATTACKS = {
    "network": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "secrets": "open({secret!r}).read()",
    "system": "open('/usr/evil', 'w')",
    "passwords": "open('/etc/passwd').read()",
    "kill": "import os; os.kill({pid}, 9)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "from threading import *\nfor _ in range(99): Thread(target=Event().wait, daemon=True).start()",
    "memory": "x = bytearray(10**10)",
    "disk": "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(2**20))",
    "output": "import sys\nwhile True: sys.stdout.write('x' * 2**20)",
    "privileges": "import os; os.setuid(0)",
    "namespaces": "import ctypes, sys\nsys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)",
    "escape": "import os; os.chroot('/tmp')",
}


@isolating
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_fail(attack: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = ATTACKS[attack].format(port=server.getsockname()[1], secret=str(secret), pid=os.getpid())
        outcome = run({"main.py": program}, limits=Limits(seconds=20.0, memory_bytes=256 * 2**20, file_bytes=2**20))
    assert outcome.exit != 0 and len(outcome.output) <= sandbox.MAX_OUTPUT
    assert outcome.exit is not None, "it was stopped by its wall, not by the clock"


@isolating
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(10_000)"])
def test_what_does_not_end_is_killed(program: str) -> None:
    assert run({"main.py": program}, limits=Limits(seconds=0.5)).exit is None


@isolating
def test_what_a_program_started_dies_with_it(tmp_path: Path) -> None:
    """Also what has left its session."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(10_000)\nprint('done')"
    outcome = run({"main.py": program})
    assert (outcome.exit, outcome.output) == (0, "done\n")
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"main.py" in _contents(p) and b"-S" in _contents(p)]
    assert not left


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = [{"input": "3 4", "output": "7\n"}, {"input": "1 1\n", "output": "2"}]


def judged(program: str, tests: Any, **options: Any) -> tuple[float | None, str]:
    request = ScoringRequest("", (f"<answer>{program}</answer>",), columns={"tests": tests})
    verdict = CodeTestsReward(**options)(request)[0]
    return verdict.score, verdict.reason


@isolating
def test_programs_are_judged_by_what_they_print() -> None:
    assert judged(ADD, SUMS) == (1.0, "")
    assert judged(f"Here:\n```python\n{ADD}\n```\nDone.", SUMS) == (1.0, "")
    assert judged("print(7)", SUMS) == (0.0, "test 2 of 2: printed '7\\n', not '2'")
    assert judged("print(7)", SUMS, partial=True)[0] == 0.5
    assert judged("print(7", SUMS)[1].startswith("test 1 of 2: exit status 1: SyntaxError")
    assert judged("while True: pass", SUMS, seconds=0.5) == (0.0, "test 1 of 2: longer than 0.5 s")
    assert judged("x" * 100_001, SUMS)[0] == 0.0
    assert judged("print('\ud800')", SUMS)[0] == 0.0


@isolating
def test_programs_are_judged_by_assertions_which_no_program_can_reach() -> None:
    tests = [{"code": "assert add(3, 4) == 7"}]
    assert judged("def add(a, b): return a + b", tests) == (1.0, "")
    assert judged(f"def add(a, b): return a + b\nif __name__ == '__main__':\n  {ADD.splitlines()[0]}", tests) == (
        1.0,
        "",
    )
    assert judged("def add(a, b): return a - b", tests)[1] == "test 1 of 1: AssertionError"
    assert judged("print(7", tests)[1].startswith("test 1 of 1: SyntaxError")
    assert judged("def add(a, b):\n  while True: pass", tests, seconds=1.0)[1] == "test 1 of 1: longer than 1 s"
    left = (0.0, "test 1 of 1: the program ended before the test did")
    for trick in ("import sys; sys.exit(0)", "import os; os._exit(0)", "def add(a, b):\n  import os; os._exit(0)"):
        assert judged(trick, tests) == left
    forgery = "import os, sys, __main__\nfor fd in range(9):\n  try: os.write(fd, b'x' * 99)\n  except OSError: pass\n"
    assert judged(f"{forgery}print(vars(__main__))\nos._exit(0)", tests)[0] == 0.0
    passes_objects = [{"code": "class Mine: pass\nf(Mine())"}]
    assert judged("def f(x): return x", passes_objects)[0] is None


@isolating
def test_rows_without_tests_cannot_be_scored() -> None:
    for tests in (None, [], "nonsense", "[]", [{"input": "1"}], [3], {"code": 3}):
        assert judged(ADD, tests)[0] is None
    request = ScoringRequest("", (f"<answer>{ADD}</answer>", "no tags"), answer='[{"input": "3 4", "output": "7"}]')
    assert [v.score for v in CodeTestsReward(column=None)(request)] == [1.0, 0.0]


@isolating
def test_programs_run_inside_of_the_reward_process_with_its_limits() -> None:
    worker = RewardWorker([RewardSpec("code_tests")], PATIENCE)
    request = ScoringRequest("", (f"<answer>{ADD}</answer>", "<answer>1</answer>"), columns={"tests": SUMS})
    assert [v.score for v in worker.score(request).verdicts] == [1.0, 0.0]
    worker.close()

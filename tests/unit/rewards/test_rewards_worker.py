"""RewardWorker against rewards that hang, crash and exit: each costs one group its verdicts, never the next one.

No test waits for time to pass: what must have died holds a named pipe open, and its end is the end of the pipe.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.base import ScoringRequest, TransientError
from rewards.config import RewardSpec
from rewards.functions.user import RewardSetupError
from rewards.process.child import Traits
from rewards.process.worker import RewardWorker

TIMEOUT = 3.0
PATIENCE = 180.0
"""Seconds within which something that must happen has happened, on however busy a machine."""

SOURCE = """
import ctypes, os, signal, subprocess, sys, time

def behave(completions, fifo=None, **columns):
    what = completions[0]
    if what == "sleep":
        time.sleep(10_000)
    if what == "spin":
        while True:
            pass
    if what == "spin in C":
        sum(range(10**15))
    if what == "exit":
        os._exit(3)
    if what == "sys.exit":
        sys.exit(3)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "allocate":
        hoard = [bytearray(2**20)]
        while True:
            hoard.append(bytearray(len(hoard[-1]) * 2))
    if what == "raise":
        raise ValueError("no idea")
    if what == "flood":
        print("x" * 1_000_000, file=sys.stderr)
    if what == "hold pipe and spin":
        pipe = open(fifo[0], "w")
        print("open", file=pipe, flush=True)
        while True:
            pass
    if what == "child holds pipe":
        subprocess.Popen(["sh", "-c", 'exec 3>"$0"; echo open >&3; sleep 10000', fifo[0]])
        time.sleep(10_000)
    return [float(len(text)) for text in completions]
"""


def ask(worker: RewardWorker, what: str, **columns: str) -> list[str]:
    """The statuses of a group of two of which the first says what to do."""
    verdicts = worker.score(ScoringRequest("", (what, "ab"), columns=columns)).verdicts
    return [verdict.status for verdict in verdicts]


def assert_scores_normally(worker: RewardWorker) -> None:
    verdicts = worker.score(ScoringRequest("", ("a", "abc"))).verdicts
    assert [verdict.score for verdict in verdicts] == [1.0, 3.0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "behaviour.py"
    path.write_text(SOURCE)
    return f"{path}:behave"


@pytest.fixture(scope="module")
def worker(source: str) -> Iterator[RewardWorker]:
    worker = RewardWorker([RewardSpec(source)], TIMEOUT)
    worker.start()
    yield worker
    worker.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Path of a named pipe, and its end for reading."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), reader
    os.close(reader)


def assert_opened(reader: int) -> None:
    assert select.select([reader], [], [], PATIENCE)[0], "nobody opened the pipe"
    assert os.read(reader, 100) == b"open\n"


def assert_all_holders_died(reader: int) -> None:
    assert select.select([reader], [], [], PATIENCE)[0], "somebody still holds the pipe open"
    assert os.read(reader, 100) == b""


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        ("sleep", "timeout", "longer than 3 s"),
        ("spin", "timeout", "longer than 3 s"),
        ("spin in C", "timeout", "longer than 3 s"),
        ("exit", "error", "exit status 3"),
        ("segfault", "error", "SIGSEGV"),
        ("killed", "error", "SIGKILL (possibly out of memory)"),
    ],
)
def test_a_group_that_ends_the_process(worker: RewardWorker, what: str, status: str, reason: str) -> None:
    pid = worker.pid
    verdicts = worker.score(ScoringRequest("", (what, "ab", "abc"))).verdicts
    assert [v.status for v in verdicts] == [status] * 3
    assert reason in verdicts[0].reason
    assert worker.pid != pid
    assert_scores_normally(worker)


@pytest.mark.parametrize(("what", "statuses"), [("raise", ["error"] * 2), ("sys.exit", ["error"] * 2)])
def test_a_group_that_only_raises_keeps_the_process(worker: RewardWorker, what: str, statuses: list[str]) -> None:
    pid = worker.pid
    assert ask(worker, what) == statuses
    assert_scores_normally(worker)
    assert worker.pid == pid


def test_output_and_large_groups_pass(worker: RewardWorker, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(worker, "flood") == ["scored"] * 2
    long = "\ud800 é" * 1_000_000  # a lone surrogate is no valid UTF-8
    assert [v.score for v in worker.score(ScoringRequest("", (long,) * 4)).verdicts] == [3_000_000.0] * 4


def test_a_process_that_reads_nothing_is_timed_out(worker: RewardWorker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    verdicts = worker.score(ScoringRequest("", ("x" * 10_000_000,))).verdicts  # more than the socket's buffers hold
    assert [v.status for v in verdicts] == ["timeout"]
    assert_scores_normally(worker)


def test_processes_that_a_reward_started_die_with_it(worker: RewardWorker, fifo: tuple[str, int]) -> None:
    path, reader = fifo
    assert ask(worker, "child holds pipe", fifo=path) == ["timeout"] * 2
    assert_opened(reader)
    assert_all_holders_died(reader)
    assert_scores_normally(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_a_group_whose_process_somebody_killed_is_scored_once_more(source: str, tmp_path: Path) -> None:
    """It kills itself at its first call; a reward that cannot score completions alone lost all of them."""
    path = tmp_path / "once.py"
    path.write_text(
        "import os, signal\n"
        "def once(prompts, completions, **columns):\n"
        f"    flag = {str(tmp_path / 'killed')!r}\n"
        "    if not os.path.exists(flag):\n"
        "        open(flag, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    worker = RewardWorker([RewardSpec(f"{path}:once")], TIMEOUT)
    try:
        assert_scores_normally(worker)
    finally:
        worker.close()


def test_a_computing_child_dies_with_its_killed_parent(source: str, fifo: tuple[str, int]) -> None:
    path, reader = fifo
    code = """
import sys
from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.process.worker import RewardWorker
worker = RewardWorker([RewardSpec(sys.argv[1])], 10_000)
worker.score(ScoringRequest("", ("hold pipe and spin",), columns={"fifo": sys.argv[2]}))
"""
    parent = subprocess.Popen([sys.executable, "-c", code, source, path])
    try:
        assert_opened(reader)
    finally:
        parent.kill()
        parent.wait()
    assert_all_holders_died(reader)


def test_an_interrupted_call_leaves_no_answer_behind(worker: RewardWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next group would get this one's verdicts."""

    def interrupt(deadline: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worker._channel, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(worker, "abcdef")
    assert_scores_normally(worker)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def other(completions): ...", "has no 'reward'"),
        ("import os; os._exit(4)", "ended with exit status 4 while it loaded the rewards"),
        ("import time; time.sleep(10_000)", "was not ready after 2 s"),
    ],
)
def test_rewards_that_cannot_be_loaded(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(body)
    worker = RewardWorker([RewardSpec(f"{path}:reward")], TIMEOUT, start_timeout=2.0 if "sleep" in body else PATIENCE)
    with pytest.raises(RewardSetupError, match=message):
        worker.start()
    verdicts = worker.score(ScoringRequest("", ("a", "b"))).verdicts  # it neither hangs nor raises nor scores
    assert [v.status for v in verdicts] == ["error"] * 2 and message in verdicts[0].reason
    worker.close()


def test_shipped_rewards_in_the_worker() -> None:
    worker = RewardWorker([RewardSpec("format", 0.5), RewardSpec("accuracy")], PATIENCE)
    worker.start()
    completions = ("<think>a</think><answer>\\frac{1}{2}</answer>", "<think>a</think><answer>2</answer>")
    scores = worker.score(ScoringRequest("", completions, answer="0.5"))
    worker.close()
    assert [v.score for v in scores.verdicts] == [1.5, 0.5]
    assert scores.seconds.keys() == {"format", "accuracy"} and min(scores.seconds.values()) > 0
    assert worker.traits == Traits(needs_media=False, separable=True)


def test_endless_allocation_ends_at_the_limit(source: str) -> None:
    """Python code gets a MemoryError and goes on; the machine keeps its memory."""
    worker = RewardWorker([RewardSpec(source)], PATIENCE, memory=300 * 2**20)
    worker.start()
    pid = worker.pid
    assert ask(worker, "allocate") == ["error"] * 2
    assert_scores_normally(worker)
    assert worker.pid == pid
    worker.close()


SERVED = """
def served(request):
    from rollout.types import Verdict
    return [Verdict.scored(served.double(len(text))) for text in request.completions]

served.connect = lambda services: setattr(served, "double", services["double"])
"""


def test_services_of_the_worker_are_called_by_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(SERVED)
    asked: list[int] = []

    def double(value: int, timeout: float) -> float:
        assert 0 < timeout <= PATIENCE
        asked.append(value)
        if value == 3:
            raise ValueError("three is too much")
        if asked == [4]:
            raise TransientError("busy")
        return 2.0 * value

    worker = RewardWorker([RewardSpec(f"{tmp_path}/mine.py:served")], PATIENCE, services={"double": double})
    assert [v.score for v in worker.score(ScoringRequest("", ("a", "ab"))).verdicts] == [2.0, 4.0]
    (failed,) = worker.score(ScoringRequest("", ("abc",))).verdicts
    assert failed.status == "error" and "three is too much" in failed.reason
    asked.clear()
    assert [v.score for v in worker.score(ScoringRequest("", ("abcd",))).verdicts] == [8.0]
    assert asked == [4, 4], "what is transient is tried again"
    worker.close()

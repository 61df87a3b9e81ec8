"""Ray's head service dies, or the driver is killed: our words, an orderly end, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from saccade.errors import RunError
from saccade.fleet import head, reaper
from saccade.fleet.head import HeadLostError, HeadWatch, end_process
from saccade.observe.display import SilentDisplay

WAIT = 120.0


class Listening:
    """Stands for the head: takes connections until it is closed."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"


class Told(SilentDisplay):
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.said = threading.Event()

    def phase(self, text: str) -> None:
        self.texts.append(text)
        self.said.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PROBE_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_head_that_is_silent_for_too_long_is_lost_and_says_what_to_do():
    service, display = Listening(), Told()
    with HeadWatch(service.address, display, local=False, patience=0.01) as watch:
        watch.check()
        assert not watch.gone()
        service.socket.close()
        assert display.said.wait(WAIT)
        with pytest.raises(HeadLostError, match=rf"gcs_server at {service.address}.*ray start --head.*--resume"):
            watch.check()
    assert issubclass(HeadLostError, RunError)
    assert len(display.texts) == 1


@pytest.mark.usefixtures("quick")
def test_before_ray_would_abort_the_process_it_ends_with_our_words(monkeypatch: pytest.MonkeyPatch):
    ended, texts = threading.Event(), []

    def end(text: str) -> None:
        texts.append(text)
        ended.set()

    monkeypatch.setattr(head, "end_process", end)
    service = Listening()
    service.socket.close()
    with HeadWatch(service.address, Told(), local=True, patience=0.01, limit=0.02) as watch:
        assert ended.wait(WAIT)
    assert texts[0] == watch.text and "run the same command with --resume" in texts[0]


def test_the_last_words_are_written_before_the_process_is_left(capsys: pytest.CaptureFixture[str]):
    left: list[int] = []
    end_process("all is lost", left.append)
    assert (left, capsys.readouterr().err) == ([1], "saccade: all is lost\n")


def test_the_head_is_given_up_before_ray_gives_it_up():
    assert max(head.LOCAL_PATIENCE, head.JOINED_PATIENCE) < head.RAY_LIMIT - head.RAY_MARGIN


@pytest.mark.parametrize("how", ["killed", "ended", "goes on"])
def test_whatever_descends_from_rays_programs_ends_with_the_run(tmp_path: Path, how: str):
    """A program of Ray's, its child in a session of its own. A child of the driver's that is none of Ray's stays, and
    one forked from it, which holds the pipe to the reaper."""
    (tmp_path / "raylet.py").write_text(
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    code = (
        "import os, signal, subprocess, sys, time\nfrom pathlib import Path\nfrom saccade.fleet import reaper\n"
        "folder = Path(sys.argv[1])\n"
        "reaping = reaper.start(folder)\n"
        "ray = subprocess.Popen([sys.executable, str(folder / 'raylet.py')], stdout=subprocess.PIPE, text=True)\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "worker = int(ray.stdout.readline())\n"
        "if not (forked := os.fork()): time.sleep(1000)\n"
        "time.sleep(4 * reaper.LOOK_SECONDS)\n"
        "print(ray.pid, worker, reaping.pid, other.pid, forked, flush=True)\n"
        "sys.stdin.readline()\n"
        "if sys.argv[2] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "reaper.finish(reaping)\n"
        "if sys.argv[2] == 'goes on': time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        *family, other, forked = (psutil.Process(int(pid)) for pid in driver.stdout.readline().split())
        known = [(process.pid, process.create_time()) for process in family]
        driver.stdin.write("\n")
        driver.stdin.close()
        try:
            assert all_end(known)
            assert other.is_running() and forked.is_running()
            assert how == "goes on" or driver.wait(WAIT) is not None
        finally:
            for process in (other, forked, driver):
                process.kill()


def test_whoever_lost_his_parent_and_is_now_of_a_driver_that_is_process_1_is_left_alone():
    """In a container: another Ray's programs, that were there before."""
    alive = {
        1: reaper.Process(parent=0, started=100),
        7: reaper.Process(parent=1, started=150),  # started by who ended since
        8: reaper.Process(parent=1, started=200),  # the reaper
        9: reaper.Process(parent=1, started=200),
        10: reaper.Process(parent=9, started=300),
    }
    assert set(reaper.children_since(1, alive[8].started, alive)) == {8, 9}


def test_a_process_that_took_a_dead_ones_number_is_left_alone():
    alive = reaper.processes()
    me, parent = os.getpid(), os.getppid()
    assert alive[me].parent == parent
    assert me in reaper.with_descendants({parent: alive[parent]}, alive)
    earlier = alive[parent]._replace(started=alive[parent].started - 1)
    assert reaper.with_descendants({parent: earlier}, alive) == {}


def all_end(family: list[tuple[int, float]]) -> bool:
    """Whether all of the processes, by number and time of creation, end. A zombie has: its parent may take its time."""
    deadline = time.monotonic() + WAIT
    while any(map(lives, family)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def lives(process: tuple[int, float]) -> bool:
    pid, created = process
    try:
        found = psutil.Process(pid)
        return found.create_time() == created and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

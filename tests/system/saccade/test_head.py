"""Ray's head service dies, or the driver is killed: our words, an orderly end, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.saccade.test_head import WAIT, all_end

RUN = """
import json, os, signal, subprocess, sys, psutil, ray
from saccade.fleet.connect import connect
from saccade.config.load import parse_config
from saccade.observe.display import SilentDisplay
from saccade.fleet.head import HeadLostError

class Holder:
    def __init__(self, apart):
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=apart)
    def family(self):
        me = psutil.Process()
        return [(p.pid, p.create_time()) for p in (me, *me.children())]

config = parse_config({"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}})
address = sys.argv[2] or None
with connect(config, address, SilentDisplay()) as head:
    # Of a cluster that was joined, Ray itself ends an actor's children, those of its process group.
    holder = ray.remote(Holder).options(num_cpus=0).remote(apart=address is None)
    actor = ray.get(holder.family.remote())
    family = psutil.Process().children(recursive=True)
    print(json.dumps([*actor, *((p.pid, p.create_time()) for p in family)]), flush=True)
    if sys.argv[1] == "driver":
        os.kill(os.getpid(), signal.SIGKILL)
    next(p for p in family if p.name() == "gcs_server").kill()
    try:
        while True:
            ray.wait([ray.put(0)], timeout=0.1)
            head.check()
    except HeadLostError as error:
        # Those that run still answer: the state can be saved.
        print(len(ray.get(holder.family.remote(), timeout=60)), error, flush=True)
"""


@pytest.mark.parametrize("killed", ["driver", pytest.param("head", marks=pytest.mark.slow)])
def test_nothing_of_a_local_ray_outlives_a_killed_driver_or_a_killed_head(repository: Path, killed: str):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", RUN, killed, ""]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        family = [(pid, created) for pid, created in json.loads(process.stdout.readline())]
        said = process.stdout.read()
        code = process.wait(WAIT)
    assert code == (-signal.SIGKILL if killed == "driver" else 0)
    assert said.startswith("2 Ray's head service (gcs_server at ") == (killed == "head"), said
    assert len(family) >= 6  # the head, a raylet, its agents, an actor, the actor's child
    assert all_end(family)


def test_a_killed_driver_leaves_no_actor_in_a_cluster_that_it_joined(repository: Path, local_ray: ModuleType):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", RUN, "driver", local_ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    family = [(pid, created) for pid, created in json.loads(done.stdout.splitlines()[0])]
    assert len(family) >= 2
    assert all_end(family)

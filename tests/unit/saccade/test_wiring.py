"""What of a configuration depends on the device, without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from learner.types import LearnerOptions
from learner.worker import LearnerWorker
from saccade.config.options import learner_environment, weight_transfer_options
from saccade.config.run_config import RunConfig
from tests.unit.saccade.test_placement import config
from vlm.config import ModelConfig


def test_a_rank_beside_a_gpu_uses_the_cpus_it_is_given_and_segments_that_grow():
    given = config(cluster={"resources": {"learner": {"CPU": 6}}})
    assert learner_environment(given, "cuda") == {
        "OMP_NUM_THREADS": "6",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    assert learner_environment(given, "cpu") == {"OMP_NUM_THREADS": "6"}
    assert (
        learner_environment(config(cluster={"resources": {"learner": {"CPU": 0.5}}}), "cpu")["OMP_NUM_THREADS"] == "1"
    )


@pytest.mark.parametrize(
    ("given", "device", "mib"),
    [({}, "cuda", 256), ({}, "cpu", 8), ({"resources": {"learner": {"GPU": 0.5}}}, "cuda", 8)],
)
def test_what_is_sent_at_once_follows_the_transport(tiny_model: Path, given: dict, device: str, mib: int):
    chosen: RunConfig = config(model={"path": str(tiny_model)}, cluster=given)
    assert weight_transfer_options(chosen, device).bucket_bytes == mib * 2**20  # type: ignore[arg-type]


def test_a_rank_finds_what_lies_beside_its_python(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "PATH",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "DS_ACCELERATOR",
    ):
        monkeypatch.setenv(name, "/bin")
    LearnerWorker(LearnerOptions(ModelConfig("m"), 1, device="cpu"), 0, None)
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/bin"]

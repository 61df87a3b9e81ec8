"""Fixtures that many tests share: a tiny model, a local Ray, and an environment that reaches for nothing outside."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Libraries read these at import, and Ray's processes inherit them; hence before any other import.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override every engine's own kv_cache_gib
os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",  # 15 by default: what else a machine does would come first, and starts take minutes
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

# No deadline: a busy machine must not fail a property that holds. The same examples in every run, so that a failure is
# of the change that shows it; `pytest --hypothesis-profile explore -m hypothesis` looks for new ones.
_alike = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("saccade", max_examples=40, derandomize=True, **_alike)
settings.register_profile("explore", max_examples=400, **_alike)
settings.load_profile("saccade")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL with a byte-level tokenizer, processor and chat template, in Hugging Face format."""
    from vlm.tiny import build_tiny

    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[ModuleType]:
    """`ray`, connected to a Ray of this test session's own with 8 logical CPUs; workers can import this repository."""
    import ray

    # AF_UNIX paths end at 107 characters, so Ray's sockets cannot live under pytest's long temporary folders.
    folder = tempfile.mkdtemp(prefix="saccade-")
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        namespace="saccade-tests",
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
        _temp_dir=folder,
    )
    try:
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def logits_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a tiny model are computed in several chunks, as those of a large vocabulary are."""
    from learner.model.logprobs import CHUNK_BYTES
    from tests.helpers.learner_cases import FEW_ROWS

    monkeypatch.setitem(CHUNK_BYTES, "cpu", FEW_ROWS)


@pytest.fixture(scope="session")
def process_group(tiny_model: Path) -> Iterator[None]:
    """A default group of this process alone. One for all modules: DeepSpeed keeps the first that it sees."""
    import torch.distributed as dist

    from learner.engines.process_group import join, open_store
    from tests.helpers.learner_cases import options

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    store, port = open_store("127.0.0.1", 60.0)
    join(options(tiny_model), 0, "127.0.0.1", port, store)
    yield
    dist.destroy_process_group()

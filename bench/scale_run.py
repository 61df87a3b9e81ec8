"""The run of `bench.scale`: the loop and the driver's side of a run around simulated actors, and what it costs."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from bench.common import median
from bench.scale_actors import MARK, EngineHost, Hosted, SimulatedData, SimulatedRank, SimulatedRewards
from bench.scale_settings import IN_FLIGHT, PUBLISHED_ENGINES, SIGMA, Setting
from learner.group import LearnerGroup
from learner.types import LearnerOptions, UpdateStats
from rollout.config import RolloutConfig
from rollout.engines.protocol import SamplingParams
from rollout.engines.simulated_engine import Simulation
from rollout.handle import RayEngineHandle
from saccade.fleet.engine_fleet import EngineFleet
from saccade.fleet.handles import RayData, RayRewards
from saccade.fleet.pool import EnginePool, Pool
from saccade.fleet.waiting import in_thread
from saccade.loop import step
from saccade.observe.metrics import StepRecord
from saccade.pipeline.admission import make_admission
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline
from saccade.pipeline.sealed_batch import SealedBatch
from vlm.config import ModelConfig

HOSTS, REWARDS = 4, 2


class Watched:
    """Counts what the driver's process deserializes."""

    objects = 0
    pixels = 0

    @contextmanager
    def deserialized(self) -> Iterator[None]:
        """Count bytes of objects, and of images in them, that are deserialized in this process."""
        context = ray._private.worker.global_worker.get_serialization_context()
        original = context.deserialize_objects

        def counted(serialized: Any, *given: Any, **named: Any) -> Any:
            for entry in serialized:
                if (data := entry[0]) is not None:
                    raw = bytes(memoryview(data))
                    self.objects += len(raw)
                    self.pixels += len(raw) if MARK in raw else 0
            return original(serialized, *given, **named)

        context.deserialize_objects = counted
        try:
            yield
        finally:
            context.deserialize_objects = original


def received() -> int:
    """Bytes that the TCP connections of this process received so far."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or no TCP connection
            if str(path.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, 128)[0]  # tcpi_bytes_received of linux/tcp.h
    return total


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class SimulatedLearner(LearnerGroup):
    """A LearnerGroup of one simulated rank."""

    def __init__(self, rank: Any, rollout: RolloutConfig) -> None:
        super().__init__(LearnerOptions(ModelConfig("simulated"), 10**6, "cpu", rollout=rollout), [{}])
        self._workers = [rank]


@dataclass
class SimulatedRun:
    """The part of a run that `saccade.loop.step` needs."""

    rollouts: RolloutPipeline
    learner: SimulatedLearner
    fleet: EngineFleet
    rollout: RolloutConfig
    """The run is its own configuration, of which a step asks no more than this."""
    decode_seconds: float
    version: int = 0
    points: list[dict[str, float]] = field(default_factory=list)
    """Measured at the end of each step."""

    async def update(self, batch: SealedBatch) -> UpdateStats:
        return await in_thread(lambda: self.learner.update(batch.groups, batch.summaries, self.version))

    async def sync_weights(self) -> None:
        self.outstanding = len(self.rollouts.groups.outstanding())  # without the batch that was just trained
        await self.fleet.sync(self.version)

    def record(self, batch: SealedBatch, update: UpdateStats, staleness: int, seconds: Mapping[str, float]) -> None:
        StepRecord.of(self.version, batch.summaries, update, **batch.counts(), staleness=staleness, seconds=seconds)
        self.points.append(
            {
                "groups": len(batch.groups),
                "in_flight": self.outstanding + len(batch.groups),
                "issued_again": batch.issued_again,
                "late": median([s.generate_seconds / (max(s.lengths) * self.decode_seconds) for s in batch.summaries]),
                "cpu": time.process_time(),
                "time": time.perf_counter(),
                "mib": resident_mib(),
                "received": received(),
                **{f"{phase} s": value for phase, value in seconds.items()},
            }
        )

    def enter(self, phase: str) -> None: ...

    def judge(self, update: UpdateStats) -> None: ...

    def heed(self, update: UpdateStats) -> None: ...

    async def evaluate_if_due(self) -> None: ...

    async def checkpoint_if_due(self) -> None: ...


def fleet(setting: Setting, engines: int, faster: float) -> SimulatedRun:
    """Start the actors, and return the run around them."""
    names = [f"rollout-{i}" for i in range(engines)]
    simulation = Simulation(
        decode_seconds=setting.decode_seconds / faster, mean_tokens=setting.tokens, length_sigma=SIGMA
    )

    def remote(actor: type, **options: Any) -> Any:
        return ray.remote(actor).options(num_cpus=0, **options)

    shares = [names[i::HOSTS] for i in range(HOSTS) if names[i::HOSTS]]
    hosts = [remote(EngineHost, max_concurrency=100_000).remote(share, simulation) for share in shares]
    per_completion = setting.step_seconds / setting.step_completions * PUBLISHED_ENGINES / engines / faster
    rank = remote(SimulatedRank).remote(per_completion)
    rewards = [RayRewards(f"reward-{i}", remote(SimulatedRewards).remote()) for i in range(REWARDS)]
    data = RayData("data", remote(SimulatedData).remote())
    ray.get([host.start.remote() for host in hosts] + [a.__ray_ready__.remote() for a in (rank, data.actor)])
    handles = [RayEngineHandle(name, Hosted(hosts[i % HOSTS], i // HOSTS)) for i, name in enumerate(names)]
    dispatcher = Dispatcher(
        EnginePool(handles, by_load=True),
        Pool(rewards),
        SamplingParams(n=setting.completions, max_tokens=8 * setting.tokens),
        run_seed=0,
        group_timeout=3600.0,
        reward_timeout=60.0,
    )
    size = IN_FLIGHT * engines // (setting.staleness + 1)
    config = RolloutConfig(num_generations=setting.completions, max_staleness=setting.staleness)
    admission = make_admission(config, 10**6, size)
    rollouts = RolloutPipeline(PromptStream(Pool([data]), 600.0), dispatcher, admission, prompts_per_step=size)
    learner = SimulatedLearner(rank, config)
    syncs = EngineFleet(dispatcher.pool, learner, timeout=300.0)
    return SimulatedRun(rollouts, learner, syncs, config, simulation.decode_seconds)


async def measured(run: SimulatedRun, warmup: int, steps: int) -> dict[str, Any]:
    """Run the steps, and return what those after the warm-up cost."""
    watched = Watched()
    async with run.rollouts.running():
        for number in range(warmup + steps):
            if number == warmup:
                watched = Watched()
            with watched.deserialized():
                await step(run, run)  # type: ignore[arg-type]
    start, points = run.points[warmup - 1], run.points[warmup:]
    groups, end = sum(point["groups"] for point in points), points[-1]
    seconds = end["time"] - start["time"]
    return {
        "groups": groups,
        "in_flight": max(point["in_flight"] for point in points),
        "groups_per_second": groups / seconds,
        "cpu_ms_per_group": 1e3 * (end["cpu"] - start["cpu"]) / groups,
        "resident_mib": [point["mib"] for point in (start, *points)],
        "seconds_per_step": seconds / steps,
        "idle_share": sum(point["rollout s"] for point in points) / seconds,
        "sync_share": sum(point["sync s"] for point in points) / seconds,
        "issued_again": sum(point["issued_again"] for point in points),
        "late": median([point["late"] for point in points]),
        "pixel_bytes": watched.pixels,
        "object_bytes_per_group": watched.objects / groups,
        "received_bytes_per_group": (end["received"] - start["received"]) / groups,
    }

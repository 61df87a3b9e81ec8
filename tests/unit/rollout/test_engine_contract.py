"""The contract over the simulated engine, and the faults it can be told to have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from torch import nn

from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineDeadError, EngineOptions, RolloutEngine, SamplingParams
from rollout.engines.simulated_engine import SimulatedEngine, Simulation
from tests.contracts.engine_contract import (
    MAX_MODEL_LEN,
    EngineContract,
    Harness,
    assert_dead,
    image_media,
    make_prompt,
    small_policy,
)
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

MODEL = ModelConfig("simulated")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return load_adapter(str(tiny_model))


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> nn.Module:
    return small_policy(str(tiny_model))


class Simulate(Protocol):
    def __call__(self, simulation: Simulation | None = None, **engine_options: Any) -> Harness: ...


@pytest.fixture
def simulate(adapter: MultimodalAdapter) -> Iterator[Simulate]:
    """Starts simulated engines, and ends them after the test."""
    started: list[Harness] = []

    def start(simulation: Simulation | None = None, **engine_options: Any) -> Harness:
        rollout = RolloutConfig(engine_options=engine_options)
        options = EngineOptions(MODEL, rollout, device="cpu", max_model_len=MAX_MODEL_LEN, control_timeout=0.3)
        harness = Harness(SimulatedEngine(options, adapter, simulation or Simulation(decode_seconds=1e-4)), adapter)
        started.append(harness)
        harness.run(harness.engine.start())
        return harness

    yield start
    for harness in started:
        harness.run(harness.engine.shutdown())
        harness.runner.close()


class TestSimulatedEngine(EngineContract):
    @pytest.fixture
    def harness(self, simulate: Simulate) -> Harness:
        return simulate()

    def test_weights_without_a_group_are_an_error(self, harness: Harness) -> None:
        with pytest.raises(RuntimeError, match="has not joined"):
            harness.run(harness.engine.receive_weights({"names": [], "dtype_names": [], "shapes": []}))


def test_it_is_a_rollout_engine(adapter: MultimodalAdapter) -> None:
    engine = SimulatedEngine(EngineOptions(MODEL), adapter)
    assert isinstance(engine, RolloutEngine)


def test_latency_is_steps_times_step_time(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    """8 sequences of 20 tokens: together 20 steps; on 2 slots four rounds of 20. A step is 2 ms + 0.5 ms a sequence."""
    simulation = Simulation(decode_seconds=0.002, per_sequence_seconds=0.0005)
    prompt, sampling = make_prompt(adapter, "?"), SamplingParams(n=8, max_tokens=20, ignore_eos=True)

    def seconds(slots: int) -> float:
        harness = simulate(simulation, max_num_seqs=slots)
        start = time.perf_counter()
        harness.sample(prompt, sampling)
        return time.perf_counter() - start

    assert seconds(8) >= 20 * 0.006
    assert seconds(2) >= 80 * 0.003


def test_lengths_follow_the_seed_and_scatter(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    harness = simulate(Simulation(decode_seconds=0.0, mean_tokens=20, length_sigma=0.5))
    sampling = SamplingParams(n=64, max_tokens=400, seed=3)
    prompt = make_prompt(adapter, "?")
    lengths = [c.num_tokens for c in harness.sample(prompt, sampling)]
    assert lengths == [c.num_tokens for c in harness.sample(prompt, sampling)]
    assert 12 < sorted(lengths)[32] < 32 and len(set(lengths)) > 10


def test_dead_engine(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    harness = simulate(Simulation(decode_seconds=1e-4, fault="die", fault_after_groups=1))
    prompt, sampling = make_prompt(adapter, "?", [image_media()]), SamplingParams(n=2, max_tokens=4)
    harness.sample(prompt, sampling)
    assert_dead(harness, prompt, sampling)


def test_death_reaches_running_requests(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    harness = simulate(Simulation(decode_seconds=0.01))
    engine = harness.engine
    assert isinstance(engine, SimulatedEngine)

    async def play() -> None:
        call = asyncio.create_task(
            engine.sample(make_prompt(adapter, "?"), (), SamplingParams(n=2, max_tokens=400, ignore_eos=True))
        )
        await asyncio.sleep(0)
        engine.fail("die")
        await call

    with pytest.raises(EngineDeadError, match="died"):
        harness.run(asyncio.wait_for(play(), 5.0))


def test_hanging_engine_is_given_up_after_the_control_timeout(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    harness = simulate(Simulation(decode_seconds=1e-4, fault="hang", fault_after_groups=1))
    prompt, sampling = make_prompt(adapter, "?"), SamplingParams(n=1, max_tokens=2)
    harness.sample(prompt, sampling)
    with pytest.raises(TimeoutError):
        harness.run(asyncio.wait_for(harness.engine.sample(prompt, (), sampling), 0.5))
    with pytest.raises(EngineDeadError, match=r"pause within 0\.3 s"):
        harness.run(harness.engine.pause())


def test_slow_engine(adapter: MultimodalAdapter, simulate: Simulate) -> None:
    simulation = Simulation(decode_seconds=0.002, fault="slow", fault_after_groups=1, slowdown=10.0)
    harness = simulate(simulation)
    prompt, sampling = make_prompt(adapter, "?"), SamplingParams(n=1, max_tokens=10, ignore_eos=True)
    harness.sample(prompt, sampling)
    start = time.perf_counter()
    harness.sample(prompt, sampling)
    assert time.perf_counter() - start >= 10 * 0.02


def test_an_engine_that_was_not_started_is_dead(adapter: MultimodalAdapter) -> None:
    harness = Harness(SimulatedEngine(EngineOptions(MODEL, device="cpu"), adapter), adapter)
    assert_dead(harness, make_prompt(adapter, "?"), SamplingParams())

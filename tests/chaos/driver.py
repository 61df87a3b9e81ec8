"""The driver of a run under chaos: `python -m tests.chaos.driver CONFIG ENGINE ADDRESS [--resume]`.

With simulated engines everything but the model in the engine is real: Ray, weight transfers, rewards, DeepSpeed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rollout.actor import RolloutActor
from rollout.engines.protocol import EngineOptions
from rollout.engines.simulated_engine import SimulatedEngine, Simulation
from saccade.config.load import load_config
from saccade.fleet import create
from saccade.loop import train
from saccade.observe.display import SilentDisplay
from saccade.pipeline.health import Health
from vlm.adapter import MultimodalAdapter


def simulated(options: EngineOptions, adapter: MultimodalAdapter) -> SimulatedEngine:
    return SimulatedEngine(options, adapter, Simulation(decode_seconds=0.02, mean_tokens=8))


class SimulatedActor(RolloutActor):
    def __init__(self, *given: Any, **known: Any) -> None:
        super().__init__(*given, **{**known, "engine": simulated})


class Lines(SilentDisplay):
    """Prints what is said, with the time."""

    def phase(self, text: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stdout.flush()


def main(path: str, engine: str, address: str, *resume: str) -> None:
    if engine == "simulated":
        create.RolloutActor = SimulatedActor  # type: ignore[misc]
        Health.judge = lambda self, update: []  # type: ignore[method-assign]  # its tokens are not the model's
    train(load_config(Path(path), []), resume=bool(resume), address=address or None, display=Lines())


if __name__ == "__main__":
    main(*sys.argv[1:])

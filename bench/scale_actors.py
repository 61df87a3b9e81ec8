"""The fleet of `bench.scale`: Ray actors that do what those of a run do, except for what a GPU or a model would do.

    SimulatedData ─ Prompt, image by reference ─▶ EngineHost ─ RolloutGroup ─▶ SimulatedRewards ─ verdicts
                                                                    └───────────────────────────────┴─▶ SimulatedRank

An `EngineHost` holds many engines: 128 processes, each with torch in it, do not fit on a small machine. Each engine is
a real RolloutActor around a SimulatedEngine, and the driver has a real RayEngineHandle for each, whose calls go through
Ray one by one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rollout.types import (
    GroupSummary,
    Prompt,
    PromptRef,
    RolloutFailure,
    RolloutGroup,
    StoredGroup,
    StoredPrompt,
    Verdict,
)
from vlm.media.types import Media

if TYPE_CHECKING:
    from learner.types import RankStats
    from rollout.engines.simulated_engine import Simulation
    from weight_sync.protocols import EngineHandle, TransferReport

MARK = b"these bytes are pixels"
"""The beginning of every image, by which the driver would know one."""
IMAGE_BYTES = 64 * 1024
IMAGE_TOKENS, TEXT_TOKENS = 256, 44
TENSORS = 729
"""Tensors of Qwen2.5-VL-7B, whose digests each engine reports at each transfer."""
PLACEHOLDER, STOP = 1, 2


class SimulatedData:
    """Rows 0, 1, 2, ..., each with an image of its own."""

    def __init__(self) -> None:
        self._row = 0

    def take(self, n: int) -> tuple[list[StoredPrompt], dict[str, Any]]:
        rows = range(self._row, self._row + n)
        self._row += n
        return [self._stored(row) for row in rows], {"row": self._row}

    def _stored(self, row: int) -> StoredPrompt:
        pixels = MARK + os.urandom(IMAGE_BYTES - len(MARK))
        image = Media("image", hashlib.sha256(pixels).hexdigest(), ray.put(pixels), 448, 448)
        ids = np.full(TEXT_TOKENS + 1, 3, np.int32)
        ids[0] = PLACEHOLDER
        length = TEXT_TOKENS + IMAGE_TOKENS
        prompt = Prompt(PromptRef(f"scale:{row}", row=row), "text " * TEXT_TOKENS, ids, length, (image,), answer="4")
        return StoredPrompt(prompt.ref, ray.put(prompt), length)


class Words:
    """The part of a model's adapter that a SimulatedEngine needs."""

    def __init__(self) -> None:
        self.tokenizer = range(64)
        self.stop_token_ids = (STOP,)
        self.placeholder_ids = {"image": PLACEHOLDER}

    def media_lengths(self, media: Sequence[Media]) -> list[int]:
        return [IMAGE_TOKENS for _ in media]

    def completion_text(self, tokens: np.ndarray) -> str:
        return "word " * len(tokens)


class EngineHost:
    """Engines in one process, each called by its place."""

    def __init__(self, names: Sequence[str], simulation: Simulation) -> None:
        from rollout.actor import RolloutActor
        from rollout.engines.protocol import EngineOptions
        from rollout.engines.simulated_engine import SimulatedEngine
        from vlm.config import ModelConfig

        options = EngineOptions(ModelConfig("simulated"), max_model_len=2**20, device="cpu")
        self._engines = [
            RolloutActor(
                name,
                options,
                Words,  # type: ignore[arg-type]
                group_timeout=3600.0,
                engine=lambda options, adapter: SimulatedEngine(options, adapter, simulation),
            )
            for name in names
        ]

    async def start(self) -> None:
        for engine in self._engines:
            await engine.start()

    async def call(self, place: int, method: str, *given: Any) -> Any:
        return await getattr(self._engines[place], method)(*given)


@dataclass(frozen=True)
class _Method:
    host: Any
    place: int
    name: str

    def remote(self, *given: Any) -> ray.ObjectRef:
        return self.host.call.remote(self.place, self.name, *given)


@dataclass(frozen=True)
class Hosted:
    """An engine of a host, called as if it were an actor of its own."""

    host: Any
    place: int

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self.host, self.place, name)


class SimulatedRewards:
    """One completion in two is right."""

    @ray.method(num_returns=2)
    def score(self, group: RolloutGroup | RolloutFailure) -> tuple[tuple[Verdict, ...], GroupSummary]:
        if isinstance(group, RolloutFailure):
            return (), GroupSummary.of_failure(group)
        scores = [float(completion.seed % 2) for completion in group.completions]
        verdicts = tuple(Verdict.scored(score, {"accuracy": score}) for score in scores)
        return verdicts, GroupSummary.of(replace(group, verdicts=verdicts))


class SimulatedRank:
    """A rank of the learner: it fetches groups, verdicts and images, and lets the time of an update pass."""

    def __init__(self, seconds_per_completion: float) -> None:
        self._seconds = seconds_per_completion
        self._engines: list[str] = []
        self._groups: list[RolloutGroup] = []
        self._fetched = 0.0

    def fetch(self, stored: Sequence[StoredGroup]) -> list[int]:
        begin = time.perf_counter()
        self._groups = ray.get([each.group for each in stored])
        verdicts = ray.get([each.verdicts for each in stored])
        pixels = ray.get([item.data for group in self._groups for item in group.prompt.media])
        if any(not image.startswith(MARK) for image in pixels) or len(pixels) != len(verdicts):
            raise RuntimeError("an image of the batch did not arrive")
        self._fetched = time.perf_counter() - begin
        return []

    def update(self, advantages: Sequence[Sequence[float]], minibatches: Sequence[int], version: int) -> RankStats:
        from learner.types import RankStats

        completions = [completion for group in self._groups for completion in group.completions]
        oldest = min(completion.oldest_version for completion in completions)
        time.sleep(max(0.0, self._seconds * len(completions) - self._fetched))
        return RankStats(loss=0.0, grad_norm=1.0, learning_rate=1e-6, staleness_max=version - oldest)

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self._engines = [engine.name for engine in engines]

    def send_weights(self) -> TransferReport:
        """Nothing is sent; the report is as large as that of a transfer."""
        from weight_sync.protocols import TransferReport
        from weight_sync.verify import WeightReport

        def digests() -> dict[str, str]:
            return {f"model.layers.{i}.weight": f"bfloat16 [3584, 3584] {i:016x}" for i in range(TENSORS)}

        return TransferReport(digests(), {name: WeightReport(digests()) for name in self._engines})

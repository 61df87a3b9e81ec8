"""TorchEngine, the reference, against the contract of TrainEngine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from learner.algorithm.schedule import learning_rate
from learner.config import Constant, CosineDecay, LinearDecay
from learner.engines.protocol import TrainEngine
from learner.engines.torch_engine import TorchEngine
from tests.contracts.train_engine_contract import Make, TrainEngineContract
from tests.helpers.learner_cases import adapter_of, options


class TestTorchEngine(TrainEngineContract):
    @pytest.fixture
    def make(self, tiny_model: Path) -> Make:
        return lambda chosen: TorchEngine(chosen, adapter_of(tiny_model))

    def test_is_a_train_engine(self, make: Make, tiny_model: Path):
        assert isinstance(make(options(tiny_model)), TrainEngine)

    def test_refuses_what_it_is_not(self, make: Make, tiny_model: Path):
        with pytest.raises(ValueError, match="is one rank, not 2"):
            make(options(tiny_model, ranks=2))
        scoring = make(options(tiny_model, dtype="bfloat16"))
        with pytest.raises(ValueError, match="in bfloat16 it scores, and does not train"):
            scoring.train_step([], lambda *_: None)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (LinearDecay(min_ratio=0.1), [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
        (
            CosineDecay(min_ratio=0.1),
            [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1],
        ),
    ],
)
def test_schedules_by_hand(schedule: Any, expected: list[float]):
    chosen = options(Path("m"), learning_rate=1.0, lr_schedule=schedule, warmup_steps=2, total_steps=6)
    # after two steps of warm-up four intervals remain: done = 0, 1/4, 1/2, 3/4 in the last step, and 1 behind it
    assert [learning_rate(step, chosen) for step in range(7)] == pytest.approx(expected)

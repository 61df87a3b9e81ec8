"""DeepSpeedEngine on one rank against the contract of TrainEngine, over ZeRO stages, offload and precision.

Several ranks are in test_learner_ranks.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.engines.checkpoint import load_checkpoint, save_checkpoint
from learner.engines.protocol import TrainEngine
from learner.types import LearnerOptions
from tests.contracts.train_engine_contract import Make, TrainEngineContract, assert_gradients_close, gradients_of
from tests.helpers.learner_cases import adapter_of, changed, expected_update, mixed_case, options

pytestmark = pytest.mark.usefixtures("logits_in_several_chunks")


class TestZero2(TrainEngineContract):
    """The default stage; the others follow below, in what can differ in them."""

    @pytest.fixture
    def make(self, tiny_model: Path, process_group: None) -> Make:
        from learner.engines.deepspeed_engine import DeepSpeedEngine

        def build(chosen: LearnerOptions) -> TrainEngine:
            return DeepSpeedEngine(changed(chosen, zero_stage=2), adapter_of(tiny_model))

        return build


VARIANTS = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 3": {"zero_stage": 3},
    "zero 2, optimizer offloaded": {"zero_stage": 2, "offload": "optimizer"},
    "zero 3, all offloaded, checkpointing": {
        "zero_stage": 3,
        "offload": "parameters",
        "gradient_checkpointing": ("language", "vision"),
    },
}


QUICK = ("zero 2, optimizer offloaded", "zero 3, all offloaded, checkpointing")


@pytest.mark.parametrize(
    "changes",
    [pytest.param(v, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, v in VARIANTS.items()],
)
def test_gradients_and_resume_of_every_variant(
    tiny_model: Path, process_group: None, tmp_path: Path, changes: dict[str, object]
):
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case = mixed_case(adapter_of(tiny_model))
    chosen = options(tiny_model, micro_batch=90, **changes)
    expected = expected_update(tiny_model, case, chosen)
    contract = TrainEngineContract()
    engine = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    first = contract.update(engine, chosen, case)
    assert first["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert_gradients_close(gradients_of(engine, chosen), expected.gradients)
    norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    save_checkpoint(engine, tmp_path / "checkpoint")
    second = contract.update(engine, chosen, case)
    resumed = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    again = contract.update(resumed, chosen, case)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_bfloat16_keeps_float32_masters_and_sums(tiny_model: Path, process_group: None, tmp_path: Path, stage: int):
    """Steps far below bfloat16's resolution add up in the master weights, and survive a checkpoint."""
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case = mixed_case(adapter_of(tiny_model)).part([0, 1])
    chosen = options(tiny_model, dtype="bfloat16", zero_stage=stage, learning_rate=1e-6, micro_batch=90)
    exact = expected_update(tiny_model, case, chosen)
    engine = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    before = master_weights(engine)
    stats = TrainEngineContract().update(engine, chosen, case)
    assert stats["loss"] == pytest.approx(exact.loss, abs=0.02)
    assert_same_direction(gradients_of(engine, chosen), exact.gradients)
    TrainEngineContract().update(engine, chosen, case)
    after = master_weights(engine)
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in after])
    assert all(value.dtype == torch.float32 for value in after.values())
    assert 1e-6 < moved.median() < 2.1e-6
    save_checkpoint(engine, tmp_path / "checkpoint")
    resumed = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    for name, value in master_weights(resumed).items():
        assert torch.equal(value, after[name]), name


def master_weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    tensors = {name: value.detach().clone() for name, value in engine.state_tensors()}
    return {name: value for name, value in tensors.items() if name.startswith("param/")}


def assert_same_direction(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    a, b = (torch.cat([g[name].double().flatten() for name in sorted(exact)]) for g in (ours, exact))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    assert a.norm() / b.norm() == pytest.approx(1.0, abs=0.05)


def test_bfloat16_without_zero_is_refused(tiny_model: Path):
    with pytest.raises(ValueError, match="zero_stage"):
        options(tiny_model, dtype="bfloat16", zero_stage=0)


@pytest.mark.parametrize(
    "changes",
    [
        *({"zero_stage": stage} for stage in (0, 1, 3)),
        *({"zero_stage": stage, "dtype": "bfloat16"} for stage in (1, 2, 3)),
        *({"zero_stage": stage, "dtype": "bfloat16", "offload": "optimizer"} for stage in (1, 2, 3)),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_stage_and_precision_refuses_steps_that_are_not_finite(
    tiny_model: Path, process_group: None, changes: dict[str, object]
):
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    def make(chosen: LearnerOptions) -> TrainEngine:
        return DeepSpeedEngine(changed(chosen, **changes), adapter_of(tiny_model))

    contract, case = TrainEngineContract(), mixed_case(adapter_of(tiny_model))
    contract.test_an_update_takes_the_steps_that_are_finite(make, tiny_model, case)
    for broken in ("loss", "first step"):
        contract.test_no_step_is_taken_on_what_is_not_finite(make, tiny_model, case, broken)
    contract.test_vectors_do_not_decay(make, tiny_model, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "offload" in name])
def test_the_optimizer_of_states_offloaded_from_gpus(
    tiny_model: Path, process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, dtype: str
):
    """DeepSpeedCPUAdam, which only a learner on GPUs takes (compiled here at first use, for a minute): it steps as
    torch's, refuses what is not finite, does not decay vectors, and resumes exactly."""
    from learner.engines import deepspeed_engine
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case, contract = mixed_case(adapter_of(tiny_model)), TrainEngineContract()
    chosen = options(tiny_model, micro_batch=90, dtype=dtype, **VARIANTS[variant])
    plain = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    contract.update(plain, chosen, case)
    make_optimizer = deepspeed_engine._make_optimizer
    monkeypatch.setattr(
        deepspeed_engine, "_make_optimizer", lambda p, given: make_optimizer(p, replace(given, device="cuda"))
    )
    engine = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    assert type(engine._optimizer).__name__ == "DeepSpeedCPUAdam"
    contract.update(engine, chosen, case)
    ours, theirs = master_weights(engine), master_weights(plain)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    save_checkpoint(engine, tmp_path / "checkpoint")
    second = contract.update(engine, chosen, case)
    resumed = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    again = contract.update(resumed, chosen, case)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    build = lambda given: DeepSpeedEngine(changed(given, dtype=dtype, **VARIANTS[variant]), adapter_of(tiny_model))  # noqa: E731
    for broken in ("loss", "first step"):
        contract.test_no_step_is_taken_on_what_is_not_finite(build, tiny_model, case, broken)
    contract.test_vectors_do_not_decay(build, tiny_model, case)

"""One update of every family: the same on mixed micro-batches as one sample at a time, and on two ranks of which one
has text alone, under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.config import Behavior, PpoClip
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from tests.contracts.train_engine_contract import assert_gradients_close, gradients_of
from tests.helpers import learner_cases
from tests.helpers.learner_cases import Case, Expected, adapter_of, expected_update, make_case, make_group, options
from tests.helpers.ranks import run_ranks
from vlm.adapter import MultimodalAdapter
from vlm.tiny import TINY, build_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("logits_in_several_chunks")]


def case_of(adapter: MultimodalAdapter) -> Case:
    """Text, one image, three, and whatever else the family takes."""
    kinds = [["image"], ["image"] * 3, *([kind, "image"] for kind in adapter.modalities if kind != "image")]
    if not adapter.modalities:
        kinds = [[], []]
    groups = [make_group(adapter, i, media=own, scores=[0.0, 1.0, 0.5]) for i, own in enumerate(kinds)]
    return make_case([*groups, make_group(adapter, len(groups), media=[], scores=[1.0, 0.0])])


def options_of(model: Path, **changes: Any) -> LearnerOptions:
    """The ratio is against random log-probabilities, so that the loss depends on what the model computes."""
    kinds = tuple(adapter_of(model).modalities)
    wide = {"off_policy": Behavior(), "loss": PpoClip(low=1.0, high=100.0)}
    return options(model, media_kinds=kinds, **wide, **changes)


def update(engine: Any, chosen: LearnerOptions, case: Case) -> float:
    return learner_cases.update(engine, chosen, case)["loss"]


def two_ranks(rank: int, models: Path, out: Path) -> None:
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    for model in sorted(models.iterdir()):
        case = case_of(adapter_of(model))
        last = len(case.groups) - 1
        own = case.part(range(last)) if rank == 0 else case.part([last])
        for stage in (2, 3):
            chosen = options_of(model, ranks=2, zero_stage=stage)
            engine = DeepSpeedEngine(chosen, adapter_of(model))
            loss = update(engine, chosen, own)
            gradients = gradients_of(engine, chosen)
            if rank == 0:
                save_file(gradients, out / f"{model.name}-{stage}.safetensors")
                (out / f"{model.name}-{stage}.json").write_text(json.dumps(loss))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all families, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "out").mkdir()
    for family in TINY:
        build_tiny(family, folder / "models" / family)
    run_ranks(two_ranks, 2, folder / "models", folder / "out")
    return folder


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_mixed_batch_trains_as_its_samples_one_by_one_and_on_ranks(family: str, folder: Path) -> None:
    """The expected loss and gradients come from the Hugging Face model's own forward over each sample, in float64."""
    model = folder / "models" / family
    case = case_of(adapter_of(model))
    # Experts are multiplied in one call that takes no float64.
    expected = expected_update(model, case, options_of(model), torch.float32 if family == "aria" else torch.float64)
    engine = TorchEngine(options_of(model), adapter_of(model))
    assert_update(update(engine, options_of(model), case), gradients_of(engine, options_of(model)), expected)
    for stage in (2, 3):
        loss = json.loads((folder / "out" / f"{family}-{stage}.json").read_text())
        assert_update(loss, load_file(folder / "out" / f"{family}-{stage}.safetensors"), expected)


def assert_update(loss: float, gradients: dict[str, Any], expected: Expected) -> None:
    assert abs(expected.loss) > 1e-3 and loss == pytest.approx(expected.loss, rel=2e-5)
    assert_gradients_close(gradients, expected.gradients)

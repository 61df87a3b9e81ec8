"""What bench/weight_sync.py counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.weight_delta import changed_share, sent_share
from bench.weight_receiver import ProcessEngine
from bench.weight_sync import SIZES, BenchLearner, make_model, measure


@pytest.mark.parametrize(("name", "millions"), [("1M", 1), ("50M", 50), ("200M", 200)])
def test_models_have_the_size_of_their_name(name: str, millions: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in make_model(*SIZES[name]).parameters())
    assert 0.75 < count / (millions * 1e6) < 1.05


def test_only_what_bfloat16_shows_counts_as_changed() -> None:
    """bfloat16 has 8 bits: beside 1 lie 1 + 2^-7 above and 1 - 2^-8 below."""
    before = torch.ones(4)
    after = before + torch.tensor([0.0, 2.0**-9, 2.0**-7, -(2.0**-8)])
    share = changed_share({"w": before.to(torch.bfloat16)}, {"w": after.to(torch.bfloat16)})
    assert share == 0.5
    assert sent_share(share) == 0.5625  # a bit for each 16, and half of the values


def test_a_measured_transfer_is_a_real_one() -> None:
    engine = ProcessEngine("engine")
    try:
        result = measure(BenchLearner(nn.Linear(16, 16), 0), [engine], repeats=1)
    finally:
        engine.close()
    assert result["nbytes"] == 4 * (16 * 16 + 16)
    assert min(result["raw"], result["pause"], result["transfer"]) > 0
    assert result["vs_raw"] == (result["pause"] - result["gather"]) / result["raw"]

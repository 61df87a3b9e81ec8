"""flex_attention as GPUs run it, on a CPU: torch traces and differentiates it there, and leaves out the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from learner.batching.collate import collate
from learner.batching.rows import TrainingRow, encode_prompts, to_sample
from learner.config import Kl
from learner.model import flex
from learner.model.attention import GroupAttention
from learner.model.flex import FLEX_BLOCK, MASK_CHUNK, flex_length
from learner.model.load import load_policy
from tests.helpers.learner_cases import adapter_of, make_group, options
from tests.unit.learner.test_attention import CPU, random_inputs, written_out
from vlm.batch import MultimodalBatch
from vlm.config import Lora

LENGTHS = ((100, (30, 25)), (60, (7,))), ((128, (128,)),), ((300, (200, 12)),), ((700, (100, 224)),), ((20, (9, 9)),)
"""Groups of a row each; the second and the fourth are whole blocks, the last is a single one."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the kernel, which a CPU has none of for the backward pass; everything before it as on a GPU."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = flex.compiled_flex("aot_eager")
    monkeypatch.setattr(flex, "compiled_flex", lambda: compiled)
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("heads", [(4, 2), *(pytest.param(h, marks=pytest.mark.slow) for h in ((6, 2), (2, 2)))])
def test_values_and_gradients_are_those_of_the_mask(traced: None, heads: tuple[int, int]):
    """In float64, of rows that are filled up and rows that are not."""
    for seed, groups in enumerate(LENGTHS):
        inputs = random_inputs(groups, *heads, torch.float64, seed)
        attend = GroupAttention(groups, CPU, "flex")
        found, expected = attend(SimpleNamespace(), *inputs, 0.3), written_out(*inputs, attend.mask, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ours, exact = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


SCENARIOS = {
    "full training": ({}, 2),
    "full training, reference": ({"kl": Kl(0.1)}, 4),
    "LoRA on the language model": ({"lora": Lora(2)}, 2),
    "LoRA on attention, reference": ({"lora": Lora(2, targets=("language.attention",)), "kl": Kl(0.1)}, 4),
    "LoRA on mlp, reference": ({"lora": Lora(2, targets=("language.mlp",)), "kl": Kl(0.1)}, 4),
}


QUICK = ("full training, reference", "LoRA on attention, reference")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(*scenario, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, scenario in SCENARIOS.items()
    ],
)
def test_few_variants_are_compiled(traced: None, tiny_model: Path, changes: dict[str, object], expected: int):
    """For each set of inputs that need a gradient one of the first length and one of all others; torch stops at 8."""
    adapter = adapter_of(tiny_model)
    chosen = options(tiny_model, **{"kl": None, **changes})
    policy = load_policy(chosen, adapter)
    policy.attention = "flex"
    for sizes in ((1, 1), (2, 1), (1, 2), (3, 2), (4, 3)):
        batch = batch_of(tiny_model, *sizes)
        if chosen.algorithm.kl is not None:
            with torch.no_grad():
                policy(batch, reference=True)
        policy(batch)[0].sum().backward()
    assert graphs() == expected


def batch_of(model: Path, groups: int, images: int) -> MultimodalBatch:
    """A row of groups with so many images each."""
    adapter = adapter_of(model)
    made = [make_group(adapter, i, images=images) for i in range(groups)]
    prompts = encode_prompts(adapter, made, {m.digest: m.data for g in made for m in g.prompt.media})
    samples = [tuple(to_sample(c) for c in g.completions) for g in made]
    return collate([TrainingRow(p, own) for p, own in zip(prompts, samples, strict=True)], adapter)


def test_too_many_variants_are_an_error_and_not_all_pairs_at_once(traced: None):
    groups = LENGTHS[0]
    attend = GroupAttention(groups, CPU, "flex")
    with torch._dynamo.config.patch(recompile_limit=1):
        attend(SimpleNamespace(), *random_inputs(groups, 4, 2, torch.float64, 0), 0.3)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(SimpleNamespace(), *random_inputs(groups, 4, 2, torch.float32, 0), 0.3)


def test_rows_are_filled_up_to_whole_blocks():
    assert [flex_length(n) for n in (1, 127, 128, 129, 16_000)] == [128, 128, 128, 256, 16_000]


@pytest.mark.parametrize("groups", [((700, (130, 3, 260)), (5, (900,)), (128, (128, 128))), ((1, ()),)])
@pytest.mark.parametrize("chunk", [1, MASK_CHUNK])
def test_the_mask_of_blocks_is_torchs_own_made_in_pieces(groups: tuple, chunk: int, monkeypatch: pytest.MonkeyPatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(flex, "MASK_CHUNK", chunk)
    attend = GroupAttention(groups, CPU, "flex")
    with Largest() as largest:
        ours = attend.block_mask
    length = ours.seq_lengths[0]
    assert length == flex_length(sum(p + sum(own) for p, own in groups))
    assert largest.numel == (FLEX_BLOCK * length if chunk == 1 else length**2)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (int(ours.full_kv_num_blocks.sum()) > 0) == (length > FLEX_BLOCK)

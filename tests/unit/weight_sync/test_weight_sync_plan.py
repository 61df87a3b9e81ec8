"""Buckets, ranks, digests and coverage verdicts: pure parts of weight synchronisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weight_sync.client import rank_offsets
from weight_sync.gloo import ALIGNMENT, plan_buckets, view_in
from weight_sync.protocols import ParamMeta
from weight_sync.sender import DigestingSource
from weight_sync.source import PolicySource
from weight_sync.verify import (
    CHAIN,
    CHUNK_WORDS,
    WeightMismatchError,
    WeightReport,
    _multipliers,
    hash_words,
    merge_worker_reports,
    mismatches,
    problems_of,
    tensor_digest,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
METAS = st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 7), max_size=3)), max_size=12)


@given(METAS, st.integers(1, 400))
def test_every_tensor_is_in_exactly_one_bucket_and_fits(rows: list, bucket_bytes: int) -> None:
    metadata = [ParamMeta(f"p{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(rows)]
    buckets = plan_buckets(metadata, bucket_bytes)
    assert [i for b in buckets for i in range(b.start, b.stop)] == list(range(len(metadata)))
    for bucket in buckets:
        assert bucket.nbytes <= bucket_bytes or bucket.stop - bucket.start == 1
        buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        used = 0
        for meta, offset in zip(metadata[bucket.start : bucket.stop], bucket.offsets, strict=True):
            assert offset % ALIGNMENT == 0 and offset >= used
            view = view_in(buffer, offset, meta)
            assert view.shape == meta.shape and view.dtype == meta.dtype
            used = offset + meta.nbytes
        assert used <= bucket.nbytes


def test_plan_by_hand() -> None:
    metadata = [
        ParamMeta("a", torch.float32, (5,)),
        ParamMeta("b", torch.float32, (4,)),
        ParamMeta("c", torch.int8, ()),
    ]
    first, second = plan_buckets(metadata, 48)  # a: 20 bytes, padded to 32; b: 16; c: 1, padded to 16
    assert (first.start, first.stop, first.nbytes, first.offsets) == (0, 2, 48, (0, 32))
    assert (second.start, second.stop, second.nbytes, second.offsets) == (2, 3, 16, (0,))


@pytest.mark.parametrize(
    ("workers", "offsets"), [([1], [1]), ([1, 1], [1, 2]), ([2, 1, 4], [1, 3, 4]), ([4, 2], [1, 5])]
)
def test_engines_follow_the_learner_without_overlap(workers: list[int], offsets: list[int]) -> None:
    assert rank_offsets(workers) == offsets
    ranks = [o + i for o, n in zip(offsets, workers, strict=True) for i in range(n)]
    assert ranks == list(range(1, 1 + sum(workers)))


# ---------------------------------------------------------------------------------------------------- digests


def reference_hash(data: bytes) -> int:
    """The definition for one chunk, in Python's integers: 32-bit words times fixed multipliers, plus the length."""
    multipliers = [int(m) for m in _multipliers(torch.device("cpu"))[: len(data) // 4 + 1]]
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data) // 4 * 4, 4)]
    words.append(int.from_bytes(data[len(data) // 4 * 4 :].ljust(4, b"\0"), "little", signed=True))
    return (sum(w * m for w, m in zip(words, multipliers, strict=True)) + len(data)) % 2**64


@given(st.binary(max_size=200))
def test_hash_is_the_multilinear_sum(data: bytes) -> None:
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    assert int(hash_words(tensor)) % 2**64 == reference_hash(data)


@pytest.mark.parametrize("extra", [0, 3, 8])
def test_hash_of_several_chunks(extra: int) -> None:
    """Each chunk has the sum of its words times the multipliers, and the last one what is left over and the length; the
    sum of chunk i counts CHAIN**i times. Made up of extreme words, so that the sums overflow."""
    data = np.random.default_rng(0).choice([0, 1, -1, 2**31 - 1, -(2**31)], 2 * CHUNK_WORDS).astype(np.int32)
    rest = bytes(range(extra))
    raw = data.tobytes() + rest
    multipliers = [int(m) for m in _multipliers(torch.device("cpu"))]
    halves = data.reshape(2, CHUNK_WORDS).tolist()
    sums = [sum(w * m for w, m in zip(half, multipliers, strict=True)) for half in halves]
    sums.append(reference_hash(rest) - len(rest) + len(raw))
    expected = sum(s * CHAIN**i for i, s in enumerate(sums)) % 2**64
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    assert int(hash_words(tensor)) % 2**64 == expected


@given(st.binary(min_size=1, max_size=64), st.integers(0, 511))
def test_any_flipped_bit_changes_the_digest(data: bytes, bit: int) -> None:
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    other = tensor.clone()
    other[bit // 8 % len(data)] ^= 1 << bit % 8
    assert tensor_digest(tensor) != tensor_digest(other)


@pytest.mark.parametrize("size", [CHUNK_WORDS - 1, CHUNK_WORDS, 2 * CHUNK_WORDS, 3 * CHUNK_WORDS + 5])
def test_digest_over_chunks(size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0))
    first = tensor_digest(tensor)
    assert first == tensor_digest(tensor.clone())
    swapped = tensor.roll(1)
    assert tensor_digest(swapped) != first
    negated = tensor.clone()
    negated[[0, size - 1]] *= -1  # two sign bits: the highest bits of their words
    assert tensor_digest(negated) != first


def test_chunks_that_change_places_change_the_digest() -> None:
    tensor = torch.arange(2 * CHUNK_WORDS, dtype=torch.int32)
    assert tensor_digest(tensor) != tensor_digest(tensor.roll(CHUNK_WORDS))


def test_digest_sees_dtype_shape_and_unaligned_views() -> None:
    tensor = torch.zeros(8)
    assert tensor_digest(tensor) != tensor_digest(tensor.view(2, 4))
    assert tensor_digest(tensor) != tensor_digest(tensor.view(torch.int32))
    values = torch.randn(6).to(torch.bfloat16)
    assert tensor_digest(torch.cat([values[:1], values])[1:]) == tensor_digest(values)


# ---------------------------------------------------------------------------------------------------- verdicts


def test_mismatches_name_each_kind() -> None:
    assert mismatches({"a": "1"}, {"a": "1"}) == ""
    text = mismatches({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert "1 never arrived: c" in text and "1 never sent: d" in text and "b (sent 2, received 9)" in text


def test_long_lists_are_cut() -> None:
    text = mismatches({f"p{i}": "x" for i in range(9)}, {})
    assert "9 never arrived: p0, p1, p2, p3, p4 ..." in text


def test_problems_of_a_report() -> None:
    good = WeightReport({"a": "1"})
    assert problems_of({"a": "1"}, good) == ""
    text = problems_of({"a": "1"}, WeightReport({"a": "1"}, ("a",), ("mlp (3 of 4 elements)",)))
    assert "no parameter of the engine took" in text and "mlp (3 of 4 elements)" in text


def test_workers_of_one_engine_must_agree() -> None:
    merged = merge_worker_reports([WeightReport({"a": "1"}, (), ("x",)), WeightReport({"a": "1"}, ("n",), ("y", "x"))])
    assert merged == WeightReport({"a": "1"}, ("n",), ("x", "y"))
    slowest = merge_worker_reports([WeightReport({}, (), (), 1.0, 4.0), WeightReport({}, (), (), 2.0, 3.0)])
    assert (slowest.load_seconds, slowest.verify_seconds) == (2.0, 4.0)
    with pytest.raises(WeightMismatchError, match=r"worker 1 and worker 0 .*a \(sent 1, received 2\)"):
        merge_worker_reports([WeightReport({"a": "1"}), WeightReport({"a": "2"})])


# ---------------------------------------------------------------------------------------------------- source


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_source_of_a_plain_module_leaves_the_tied_head_out_and_renames() -> None:
    model = Tied()
    source = PolicySource(model, rename=lambda name: f"engine.{name}", bucket_bytes=1)
    pairs = list(source)
    assert [n for n, _ in pairs] == ["engine.embed.weight", "engine.body.weight", "engine.body.bias"]
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, tuple(t.shape)) for n, t in pairs]
    assert all(not t.requires_grad for _, t in pairs)
    with torch.no_grad():
        model.body.bias.add_(1)
    assert torch.equal(dict(source)["engine.body.bias"], model.body.bias)  # a fresh pass each time


def test_names_must_stay_distinct() -> None:
    with pytest.raises(ValueError, match="same engine name"):
        PolicySource(Tied(), rename=lambda name: "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_merged_out_of_place(dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    base = Tied().to(dtype)
    before = base.body.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["body"]))
    layer = model.base_model.model.body
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = before.double() + 3.0 * b @ a  # alpha / r = 3
    source = PolicySource(model)
    assert [m.name for m in source.metadata()] == ["embed.weight", "body.weight", "body.bias"]
    merged = dict(source)["body.weight"]
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    assert merged.dtype == dtype and torch.allclose(merged.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["embed"]}, "only LoRA on linear layers"),
        ({"target_modules": ["body"], "use_dora": True}, "not DoraLinearVariant"),
        ({"target_modules": ["body"], "alora_invocation_tokens": [1]}, "not ALoraLinearVariant"),
        ({"target_modules": ["body"], "lora_bias": True}, "without biases of its own"),
        ({"target_modules": ["head"]}, "base_model.model.head: another layer shares its weight"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(settings: dict[str, Any], expected: str) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=expected):
        PolicySource(get_peft_model(Tied(), LoraConfig(r=2, **settings)))


def test_digesting_source_holds_no_tensor() -> None:
    source = DigestingSource(PolicySource(Tied()), enabled=True)
    sent = {name: tensor_digest(tensor) for name, tensor in source}
    assert source.digests() == sent
    assert all(t.numel() == 1 for t in source._hashes.values())

"""The warm start teaches the format and nothing else; its batches mark exactly the completions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from saccade.demo.shapes import ShapesFiles, completion, make_shapes, vocabulary
from saccade.demo.warm_start import encode_row, format_batch, read_rows
from vlm.adapter import MultimodalAdapter
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ShapesFiles:
    return make_shapes(tmp_path_factory.mktemp("shapes"), seed=0, train_rounds=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model"), words=vocabulary())


@pytest.fixture(scope="module")
def adapter(model: Path) -> MultimodalAdapter:
    return load_adapter(str(model))


def test_only_completions_have_a_loss(adapter: MultimodalAdapter, files: ShapesFiles) -> None:
    rows = read_rows(files.train)[:5]
    endings = [completion(row["answer"]) for row in rows]
    prompts = [encode_row(adapter, row) for row in rows]
    batch = format_batch(adapter, prompts, endings)
    for i, (prompt, ending) in enumerate(zip(prompts, endings, strict=True)):
        trained = batch.input_ids[i][batch.loss_mask[i]]
        assert adapter.tokenizer.decode(trained) == f"{ending} <|im_end|>"
        untrained = batch.input_ids[i][~batch.loss_mask[i]]
        assert torch.equal(untrained[: len(prompt.input_ids)], prompt.input_ids)
        assert set(untrained[len(prompt.input_ids) :].tolist()) <= {adapter.tokenizer.pad_token_id}
        assert int(batch.attention_mask[i].sum()) == len(prompt.input_ids) + len(trained)
    images = torch.cat([p.inputs["pixel_values"] for p in prompts])
    assert batch.pixel_values is not None and torch.equal(batch.pixel_values, images)


@torch.no_grad()
def test_padding_changes_no_logit(adapter: MultimodalAdapter, files: ShapesFiles, model: Path) -> None:
    policy = AutoModelForImageTextToText.from_pretrained(model)
    rows = read_rows(files.train)[:4]
    prompts = [encode_row(adapter, row) for row in rows]
    endings = [completion(row["answer"]) for row in rows]
    together = format_batch(adapter, prompts, endings)
    logits = policy(**together.model_kwargs()).logits
    assert len({int(n) for n in together.attention_mask.sum(1)}) > 1, "rows of one length would prove nothing"
    for i in range(4):
        alone = format_batch(adapter, prompts[i : i + 1], endings[i : i + 1])
        length = alone.input_ids.shape[1]
        torch.testing.assert_close(policy(**alone.model_kwargs()).logits[0], logits[i, :length], atol=1e-5, rtol=1e-5)

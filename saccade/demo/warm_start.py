"""Supervised warm start on the answer format alone: answers are drawn at random, so nothing about the images is taught.

GRPO compares completions that differ in reward. A random model never writes `<think>..</think> <answer>..</answer>`, so
all its completions would be equally worthless; after these few steps each one has the format, and a guess in it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, PreTrainedModel

from rewards.functions.accuracy import matches
from rewards.functions.format import answer_text, format_problem
from rollout.data.formats import Row
from saccade.demo.shapes import ANSWERS, completion
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.families.registry import load_adapter
from vlm.media.images import open_image

PROMPTS = 256
"""How many training prompts are used, again and again. They are enough for a format, and encoding an image takes longer
than training on it."""
TEST_PROMPTS = 96


@dataclass(frozen=True)
class WarmStart:
    """The result of the warm start, measured on prompts that it was not trained on."""

    model: Path
    loss: float
    """Mean negative log-likelihood per completion token of the last step; the random answers keep it above 0."""
    format_rate: float
    """Share of greedy completions in the think/answer format."""
    accuracy: Mapping[str, float]
    """Kind of question -> share of right answers. Chance is one in the number of possible answers."""
    seconds: float


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread. Operations this small gain nothing from more threads, and on busy cores threads that wait
    for each other are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@single_thread()
def warm_start(
    model: str | Path,
    train: str | Path,
    test: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    steps: int = 40,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    warmup_steps: int = 10,
) -> WarmStart:
    """Train `model` on prompts of the shapes file `train` with random answers; save it with its processor in `output`.

    `test` is the shapes file on which the result is measured."""
    begin = time.perf_counter()
    adapter = load_adapter(str(model))
    policy: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps))
    rng = random.Random(f"warm start/{seed}")
    rows = rng.sample(read_rows(train), PROMPTS)
    prompts = [encode_row(adapter, row) for row in rows]
    loss = torch.tensor(0.0)
    for _ in range(steps):
        drawn = rng.sample(range(PROMPTS), batch_size)
        endings = [completion(rng.choice(ANSWERS[rows[i]["kind"]])) for i in drawn]
        loss = _loss(policy, format_batch(adapter, [prompts[i] for i in drawn], endings))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    format_rate, accuracy = _measure(policy, adapter, rng.sample(read_rows(test), TEST_PROMPTS))
    policy.save_pretrained(output)
    adapter.processor.save_pretrained(output)
    return WarmStart(Path(output), loss.item(), format_rate, accuracy, time.perf_counter() - begin)


def format_batch(
    adapter: MultimodalAdapter, prompts: Sequence[EncodedPrompt], endings: Sequence[str]
) -> MultimodalBatch:
    """Make a batch of prompts, each followed by its ending and the end of the turn. Only these have a loss."""
    targets = [torch.tensor([*adapter.tokenize(text), *adapter.stop_token_ids[:1]]) for text in endings]
    tokens = [torch.cat([p.input_ids, t]) for p, t in zip(prompts, targets, strict=True)]
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=adapter.tokenizer.pad_token_id)
    position = torch.arange(input_ids.shape[1])[None]
    ends = torch.tensor([len(t) for t in tokens])[:, None]
    starts = torch.tensor([len(p.input_ids) for p in prompts])[:, None]
    attention_mask = (position < ends).long()
    loss_mask = (position >= starts) & (position < ends)
    inputs = {**adapter.join(prompts), **adapter.token_inputs(input_ids)}
    return MultimodalBatch(
        input_ids,
        attention_mask,
        loss_mask,
        pixel_values=inputs.pop("pixel_values"),
        extra_model_kwargs=inputs,
    )


def _loss(policy: PreTrainedModel, batch: MultimodalBatch) -> Tensor:
    """Return the mean negative log-likelihood of the tokens in the loss mask."""
    logits = policy(**batch.model_kwargs(), use_cache=False).logits[:, :-1]
    mask = batch.loss_mask[:, 1:]
    return torch.nn.functional.cross_entropy(logits[mask].float(), batch.input_ids[:, 1:][mask])


def _measure(
    policy: PreTrainedModel, adapter: MultimodalAdapter, rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """Return the format rate and the accuracy per kind, of greedy completions."""
    right: dict[str, list[bool]] = {}
    formatted = []
    for row, text in _complete(policy, adapter, rows):
        formatted.append(not format_problem(text))
        right.setdefault(row["kind"], []).append(matches(row["answer"], answer_text(text) or ""))
    return sum(formatted) / len(formatted), {kind: sum(r) / len(r) for kind, r in sorted(right.items())}


def _complete(policy: PreTrainedModel, adapter: MultimodalAdapter, rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """Yield greedy completions. Rows with the same question are generated together, since their prompts are equally
    long."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row["prompt"], []).append(row)
    for same in by_question.values():
        prompts = [encode_row(adapter, row) for row in same]
        input_ids = torch.stack([p.input_ids for p in prompts])
        inputs = {**adapter.join(prompts), **adapter.token_inputs(input_ids)}
        inputs["attention_mask"] = torch.ones_like(input_ids)
        with torch.no_grad():
            out = policy.generate(input_ids, **inputs, do_sample=False, max_new_tokens=12)
        for row, ids in zip(same, out[:, input_ids.shape[1] :], strict=True):
            yield row, adapter.completion_text(ids.tolist())


def encode_row(adapter: MultimodalAdapter, row: Row) -> EncodedPrompt:
    """Encode the prompt of a shapes row as a run would."""
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    return adapter.encode(adapter.render([{"role": "user", "content": content}]), [open_image(row["image"]["bytes"])])


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a shapes file."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows

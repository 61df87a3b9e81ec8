"""What every RolloutEngine must do, as a class of tests: subclass it and give it a `harness` fixture."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rollout.engines.protocol import EngineDeadError, PromptRefusedError, RolloutEngine, SamplingParams
from rollout.types import BAN, Completion, Prompt, PromptRef, Segment
from vlm.adapter import MultimodalAdapter
from vlm.media.images import digest
from vlm.media.types import Media
from weight_sync.protocols import EngineHandle, TransferReport
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightReport

T = TypeVar("T")
MAX_MODEL_LEN = 512


def image_media(seed: int = 0, width: int = 84, height: int = 56) -> Media:
    """A noise image, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Media("image", digest(buffer.getvalue()), buffer.getvalue(), width, height)


def make_prompt(adapter: MultimodalAdapter, text: str, media: Sequence[Media] = (), uid: str = "test:0") -> Prompt:
    content = [*({"type": "image"} for _ in media), {"type": "text", "text": text}]
    rendered = adapter.render([{"role": "user", "content": content}])
    ids = adapter.tokenize(rendered)
    length = adapter.expanded_length(ids, media)
    return Prompt(PromptRef(uid), rendered, np.asarray(ids, np.int32), length, tuple(media))


@dataclass
class Harness:
    """An engine that runs on an event loop of its own, driven from synchronous tests."""

    engine: RolloutEngine
    adapter: MultimodalAdapter
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def sample(self, prompt: Prompt, sampling: SamplingParams) -> tuple[Completion, ...]:
        return self.run(self.engine.sample(prompt, prompt.media, sampling)).completions

    def synchronize(self, learner: LocalLearner, version: int, *, form: bool = True) -> None:
        """A real synchronisation, the learner in another thread of this process."""

        async def call() -> None:
            handles = [LoopHandle("engine", self.engine, asyncio.get_running_loop())]
            if form:
                await asyncio.to_thread(learner.form_weight_group, handles)
            await asyncio.to_thread(sync_weights, learner, handles, version, timeout=60.0)

        self.run(call())


@dataclass(frozen=True)
class LoopHandle:
    """`EngineHandle` of an engine in this process, callable from other threads."""

    name: str
    engine: RolloutEngine
    loop: asyncio.AbstractEventLoop
    workers: int = 1

    def _call(self, call: Awaitable[T]) -> Future[T]:
        async def wrapped() -> T:
            return await call

        return asyncio.run_coroutine_threadsafe(wrapped(), self.loop)

    def check_health(self) -> Future[None]:
        return self._call(self.engine.check_health())

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self._call(self.engine.init_weight_transfer(init_info))

    def pause(self) -> Future[None]:
        return self._call(self.engine.pause())

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self._call(self.engine.receive_weights(update_info))

    def commit(self, version: int) -> Future[None]:
        return self._call(self.engine.commit(version))

    def resume(self) -> Future[None]:
        return self._call(self.engine.resume())


class LocalLearner:
    """`WeightLearner` of one rank in this process."""

    def __init__(
        self,
        model: nn.Module,
        *,
        timeout: float = 30.0,
        rename: Callable[[str], str | None] = str,
        bucket_bytes: int = 2**18,
    ) -> None:
        source = PolicySource(model, rename=rename, bucket_bytes=bucket_bytes)
        self.sender = WeightSender(source, backend="gloo", rank=0, bucket_bytes=bucket_bytes, timeout=timeout)

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.sender.form_group(engines)

    def send_weights(self) -> TransferReport:
        report = self.sender.send()
        assert report is not None
        self.sent = report.sent
        return report


def segment(completion: Completion) -> Segment:
    (only,) = completion.segments
    return only


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [segment(c).token_ids.tolist() for c in completions]


class EngineContract:
    """Every test starts with a running, unpaused engine and leaves it so."""

    @pytest.fixture
    def prompt(self, harness: Harness) -> Prompt:
        return make_prompt(harness.adapter, "which one?", [image_media()])

    @pytest.fixture
    def sampling(self, harness: Harness) -> SamplingParams:
        banned = harness.adapter.banned_token_ids
        return SamplingParams(n=4, max_tokens=6, seed=11, ignore_eos=True, banned_token_ids=banned)

    def test_k_completions_with_everything_the_learner_needs(
        self, harness: Harness, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        output = harness.run(harness.engine.sample(prompt, prompt.media, sampling))
        version = harness.run(harness.engine.version())
        assert len(output.prompt_token_ids) == prompt.expanded_length > len(prompt.token_ids)
        assert output.prompt_token_ids.dtype == np.int32
        assert [c.seed for c in output.completions] == [11, 12, 13, 14]
        for completion in output.completions:
            part = segment(completion)
            assert len(part.token_ids) == 6 and completion.finish_reason == "length"
            assert part.logprobs is not None and part.logprobs.dtype == np.float32 and (part.logprobs <= 0).all()
            assert part.policy_versions.tolist() == [version] * 6
            assert completion.text == harness.adapter.completion_text(part.token_ids)

    def test_a_seed_repeats_its_draw(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        first = ids(harness.sample(prompt, sampling))
        assert ids(harness.sample(prompt, sampling)) == first
        assert ids(harness.sample(prompt, replace(sampling, seed=500))) != first
        assert len({tuple(row) for row in first}) == 4

    def test_completion_k_draws_with_seed_plus_k(
        self, harness: Harness, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        together = ids(harness.sample(prompt, sampling))
        alone = [ids(harness.sample(prompt, replace(sampling, n=1, seed=11 + k)))[0] for k in range(4)]
        assert alone == together

    def test_a_maximum_for_each_completion(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        limits = (1, 6, 2, 3)
        together = ids(harness.sample(prompt, sampling))
        each = ids(harness.sample(prompt, replace(sampling, max_tokens_each=limits)))
        assert each == [row[:limit] for row, limit in zip(together, limits, strict=True)]

    def test_a_list_of_maxima_must_fit(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        with pytest.raises(ValueError, match="2 entries for n=4"):
            harness.sample(prompt, replace(sampling, max_tokens_each=(1, 2)))

    def test_banned_tokens_are_never_sampled(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        allowed = {5, 6, 7}
        banned = tuple(i for i in range(len(harness.adapter.tokenizer)) if i not in allowed)
        rows = ids(harness.sample(prompt, replace(sampling, banned_token_ids=banned)))
        assert {token for row in rows for token in row} <= allowed

    def test_a_stop_token_ends_and_belongs_to_the_completion(
        self, harness: Harness, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        eos = harness.adapter.tokenizer.eos_token_id
        everything_else = tuple(i for i in range(len(harness.adapter.tokenizer)) if i not in (eos, 5))
        free = replace(
            sampling, n=16, max_tokens=300, ignore_eos=False, banned_token_ids=everything_else, stop_token_ids=(eos,)
        )
        stopped = [c for c in harness.sample(prompt, free) if c.finish_reason == "stop"]
        assert stopped
        for completion in stopped:
            row = segment(completion).token_ids.tolist()
            assert row[-1] == eos and eos not in row[:-1]
            assert harness.adapter.tokenizer.eos_token not in completion.text

    def test_too_long_a_prompt_is_refused(self, harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
        with pytest.raises(PromptRefusedError, match=r"tokens.*max_model_len of 512"):
            harness.sample(prompt, replace(sampling, max_tokens=MAX_MODEL_LEN))
        assert len(harness.sample(prompt, sampling)) == 4

    def test_many_prompts_at_once(self, harness: Harness, sampling: SamplingParams) -> None:
        prompts = [make_prompt(harness.adapter, f"number {i}", [image_media(i % 3)], f"test:{i}") for i in range(12)]

        async def all_together() -> list[list[list[int]]]:
            calls = [harness.engine.sample(p, p.media, replace(sampling, seed=i)) for i, p in enumerate(prompts)]
            return [ids(output.completions) for output in await asyncio.gather(*calls)]

        rows = harness.run(all_together())
        assert [[len(row) for row in group] for group in rows] == [[6] * 4] * 12

    def test_a_paused_engine_keeps_requests_and_marks_the_switch(
        self, harness: Harness, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        engine = harness.engine

        async def play() -> tuple[Segment, bool]:
            before = await engine.version()
            long = replace(sampling, n=1, max_tokens=200)
            running = asyncio.create_task(engine.sample(prompt, prompt.media, long))
            await engine.sample(prompt, prompt.media, replace(long, max_tokens=3))  # by then the other has begun
            await engine.pause()
            queued = asyncio.create_task(engine.sample(prompt, prompt.media, replace(long, max_tokens=1)))
            await engine.check_health()
            frozen = not running.done()
            await engine.commit(before + 1)
            assert await engine.version() == before + 1
            await engine.resume()
            assert segment((await queued).completions[0]).policy_versions.tolist() == [before + 1]
            return segment((await running).completions[0]), frozen

        part, frozen = harness.run(play())
        assert frozen
        versions = part.policy_versions
        assert len(versions) == 200 and (np.diff(versions) >= 0).all() and versions[-1] == versions[0] + 1

    def test_weights_arrive_and_are_accounted_for(self, harness: Harness, policy: nn.Module) -> None:
        learner = LocalLearner(policy, rename=harness.adapter.engine_weight_name)
        version = harness.run(harness.engine.version()) + 1
        harness.synchronize(learner, version)
        assert len(learner.sent) == len(list(policy.parameters()))
        assert harness.run(harness.engine.version()) == version

    def test_a_sender_that_fails_half_way_can_try_again(
        self, harness: Harness, policy: nn.Module, prompt: Prompt, sampling: SamplingParams
    ) -> None:
        learner = LocalLearner(policy, timeout=3.0, rename=harness.adapter.engine_weight_name)
        version = harness.run(harness.engine.version())
        whole = learner.sender.source._inner
        learner.sender.source._inner = BreaksOff(whole, after=len(whole.metadata()) // 2)
        with pytest.raises(RuntimeError, match="the learner stumbles"):
            harness.synchronize(learner, version + 1)
        assert harness.run(harness.engine.version()) == version
        learner.sender.source._inner = whole
        harness.synchronize(learner, version + 1)
        assert len(harness.sample(prompt, sampling)) == 4


class BreaksOff:
    """A weight source that fails in the middle of a pass."""

    def __init__(self, inner: Any, after: int) -> None:
        self.inner, self.after = inner, after

    def metadata(self) -> Any:
        return self.inner.metadata()

    def __iter__(self) -> Any:
        for number, pair in enumerate(self.inner):
            if number == self.after:
                raise RuntimeError("the learner stumbles")
            yield pair


def small_policy(model_path: str) -> nn.Module:
    """The model at `model_path` in float32, with weights moved away from those on disk."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
    move(model, seed=1)
    return model


@torch.no_grad()
def move(model: nn.Module, seed: int, scale: float = 0.02) -> None:
    """Change every weight of a model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def assert_dead(harness: Harness, prompt: Prompt, sampling: SamplingParams) -> None:
    """Every call on a dead engine raises EngineDeadError, at once."""
    for call in (
        harness.engine.sample(prompt, prompt.media, sampling),
        harness.engine.check_health(),
        harness.engine.pause(),
        harness.engine.version(),
    ):
        with pytest.raises(EngineDeadError):
            harness.run(asyncio.wait_for(call, 5.0))


@torch.no_grad()
def reference_logprobs(
    policy: nn.Module,
    adapter: MultimodalAdapter,
    prompt: Prompt,
    token_ids: Sequence[int],
    *,
    banned: Sequence[int] = (),
    temperature: float = 1.0,
) -> np.ndarray:
    """float32 `[T]` of the completion's tokens: the learner's formula on the Hugging Face model."""
    encoded = adapter.encode(prompt.text, [Image.open(io.BytesIO(m.data)).convert("RGB") for m in prompt.media])
    ids = torch.cat([encoded.input_ids, torch.tensor(token_ids, dtype=torch.long)])[None]
    inputs = {**encoded.inputs, **adapter.token_inputs(ids)}
    logits = policy(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, :-1].float()
    logits[:, list(banned)] += BAN
    chosen = (logits / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return chosen[-len(token_ids) :].numpy()

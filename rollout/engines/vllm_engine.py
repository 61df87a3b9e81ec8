"""VLLMEngine: vLLM's AsyncLLM as a `RolloutEngine`, on CUDA and on CPU.

Prompt + media ──adapter──▶ AsyncLLM.generate(n=K, seed) ──▶ Completions with exact ids, log-probabilities, versions
                            AsyncLLM control calls: pause, receive weights, commit, resume (each with a deadline)
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rollout.engines.log_tail import LogTail
from rollout.engines.protocol import (
    EngineDeadError,
    EngineOptions,
    EngineOutput,
    PromptRefusedError,
    SamplingParams,
)
from rollout.engines.vllm_config import check_build, engine_config
from rollout.engines.vllm_outputs import all_or_none, completion_of
from rollout.engines.vllm_process import check_device, set_environment
from rollout.types import BAN, Prompt
from vlm.adapter import MultimodalAdapter
from vlm.encoding import concatenate_padded
from vlm.errors import AdapterError
from vlm.media.images import MediaError
from vlm.media.types import Media
from weight_sync.verify import WeightReport, merge_worker_reports

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

HEALTH_TIMEOUT = 30.0  # seconds in which a living engine answers a question between two of its steps
LAST_WORDS_SECONDS = 0.5
"""Seconds to wait for the output of a dead engine, which arrives through a pipe and ends with its processes."""
SHUTDOWN_SECONDS = 2.0
"""Seconds after which the engine core is killed. It has nothing to save, and lingers after its own clean-up."""


class VLLMEngine:
    """The engine of vLLM. Call `start()` inside a running event loop. See `RolloutEngine` for the contract."""

    def __init__(self, options: EngineOptions, adapter: MultimodalAdapter) -> None:
        self._options = options
        self._adapter = adapter
        self._engine: AsyncLLM | None = None
        self._log = LogTail()
        self._last_words: str | None = None
        self._request_numbers = itertools.count()
        self._version = 0

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start vLLM. This blocks the event loop for at most `options.start_timeout` seconds."""
        options = self._options
        check_device(options)
        set_environment(options)
        with self._log.capture():
            try:
                from vllm.v1.engine.async_llm import AsyncLLM

                check_build(options)
                config = engine_config(options, self._adapter)
                self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
            except Exception as error:
                raise RuntimeError(self._explain_start(error)) from error
        await self.commit(0)

    def _explain_start(self, error: Exception) -> str:
        lines = self._log.text().splitlines()
        tail = "\n".join(f"  | {line}" for line in lines)
        # The exception often only says that a child process failed; the child's own is the last one in the log.
        causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        cause = causes[-1] if causes else f"{type(error).__name__}: {error}"
        return (
            f"the vLLM engine for {self._options.model.path!r} did not start: {cause}\nCheck the path, the memory "
            "settings (rollout.kv_cache_gib, gpu_memory_utilization) and the other rollout.engine_options. The "
            f"end of its own log:\n{tail or '  | (nothing)'}"
        )

    async def shutdown(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # it would treat the end of the engine core as a failure
            await asyncio.to_thread(engine.shutdown, SHUTDOWN_SECONDS)

    async def check_health(self) -> None:
        engine = self._alive()
        await self._control("answer a health check", engine.is_paused(), HEALTH_TIMEOUT)

    def _alive(self) -> AsyncLLM:
        if self._engine is None:
            raise EngineDeadError("the engine is not running: it was not started, or was shut down")
        if self._engine.errored:
            raise EngineDeadError(self._epitaph())
        return self._engine

    def _epitaph(self) -> str:
        if self._last_words is None:
            self._last_words = self._log.text(LAST_WORDS_SECONDS)
        return f"the vLLM engine died; the end of its log:\n{self._last_words}"

    # ------------------------------------------------------------------ sampling

    async def sample(self, prompt: Prompt, media: Sequence[Media], sampling: SamplingParams) -> EngineOutput:
        engine = self._alive()
        self._check_length(prompt, sampling)
        try:
            # Decoding an image takes milliseconds, in which the events of other requests would wait.
            engine_prompt = await asyncio.to_thread(self._adapter.engine_prompt, prompt.token_ids.tolist(), media)
        except (MediaError, AdapterError) as error:
            raise PromptRefusedError(f"prompt {prompt.ref}: {error}") from error
        requests = self._requests(sampling)
        outputs = await all_or_none(self._one(engine, prompt, engine_prompt, request) for request in requests)
        completions = [c for output in outputs for c in output.outputs]
        texts = [self._adapter.completion_text(c.token_ids) for c in completions]
        seed = sampling.seed
        return EngineOutput(
            np.asarray(outputs[0].prompt_token_ids, np.int32),
            tuple(
                completion_of(c, text, -1 if seed is None else seed + k, self._version)
                for k, (c, text) in enumerate(zip(completions, texts, strict=True))
            ),
        )

    async def processed_media(self, prompt: Prompt, media: Sequence[Media]) -> dict[str, Tensor]:
        """Return the output of vLLM's processor for the media, by the model's input names, with items concatenated. It
        is compared with the learner's inputs. The engine's processor must have no cache (`mm_processor_cache_gb=0`)."""
        from vllm import SamplingParams as VLLMSamplingParams

        engine = self._alive()
        given = self._adapter.engine_prompt(prompt.token_ids.tolist(), media)
        request = await engine.input_processor.process_inputs_async(
            "processed", given, VLLMSamplingParams(max_tokens=1), supported_tasks=await engine.get_supported_tasks()
        )
        found: dict[str, list[Tensor]] = {}
        for item in request.mm_features or ():
            for name, field in item.data.items():
                value = torch.as_tensor(field.data)
                found.setdefault(name, []).append(value if value.ndim else value[None])
        return {name: concatenate_padded(values) for name, values in found.items()}

    def _check_length(self, prompt: Prompt, sampling: SamplingParams) -> None:
        new = max(sampling.max_tokens_each, default=sampling.max_tokens)
        if prompt.expanded_length + new > self._options.max_model_len:
            raise PromptRefusedError(
                f"prompt {prompt.ref} has {prompt.expanded_length} tokens including its images; with {new} new "
                f"ones, that exceeds the engine's max_model_len of {self._options.max_model_len}"
            )

    def _requests(self, sampling: SamplingParams) -> list[Any]:
        """Return vLLM's sampling parameters: one request for all K, or one for each run of equal lengths.

        In vLLM, child k of a request with n=K also samples with `seed + k`, so both ways draw the same tokens."""
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        def request(n: int, max_tokens: int, seed: int | None) -> VLLMSamplingParams:
            return VLLMSamplingParams(
                n=n,
                max_tokens=max_tokens,
                temperature=sampling.temperature,
                seed=seed,
                ignore_eos=sampling.ignore_eos,
                stop_token_ids=list(sampling.stop_token_ids),
                logit_bias=dict.fromkeys(sampling.banned_token_ids, BAN) or None,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        seed, each = sampling.seed, sampling.max_tokens_each
        if not each:
            return [request(sampling.n, sampling.max_tokens, seed)]
        if len(each) != sampling.n:
            raise ValueError(f"max_tokens_each has {len(each)} entries for n={sampling.n} completions")
        requests, k = [], 0
        for tokens, run in itertools.groupby(each):
            n = len(list(run))
            requests.append(request(n, tokens, None if seed is None else seed + k))
            k += n
        return requests

    async def _one(self, engine: AsyncLLM, prompt: Prompt, engine_prompt: Any, request: Any) -> RequestOutput:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        name = f"{prompt.ref.uid}/{prompt.ref.epoch}/{prompt.ref.attempt}/{next(self._request_numbers)}"
        final: RequestOutput | None = None
        try:
            async for output in engine.generate(engine_prompt, request, name):
                final = output
        except VLLMEngineDeadError:
            raise EngineDeadError(self._epitaph()) from None
        except Exception as error:
            self._alive()
            cause = error.__cause__ or error
            if isinstance(cause, VLLMClientError | ValueError):
                raise PromptRefusedError(f"prompt {prompt.ref}: {cause}") from error
            raise RuntimeError(f"vLLM could not generate for {prompt.ref}: {type(cause).__name__}: {cause}") from error
        if final is None:
            raise RuntimeError(f"vLLM ended the request for {prompt.ref} without an output")
        return final

    # ------------------------------------------------------------------ weights

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        engine = self._alive()
        await self._control("leave its transfer group", engine.shutdown_weight_transfer_engine())
        request = WeightTransferInitRequest(init_info=dict(init_info))
        await self._control("join the transfer group", engine.init_weight_transfer_engine(request))

    async def pause(self) -> None:
        # Unlike clear_cache=True, this keeps the cache of *processed images*, which does not depend on weights.
        engine = self._alive()
        await self._control("pause", engine.pause_generation(mode="keep", clear_cache=False))
        await self._control("clear its prefix cache", engine.reset_prefix_cache(reset_running_requests=True))
        await self._control("clear its vision cache", engine.reset_encoder_cache())

    async def receive_weights(self, update_info: Mapping[str, Any]) -> WeightReport:
        call = self._alive().collective_rpc("receive_policy", kwargs={"update_info": dict(update_info)})
        reports = await self._control("receive weights", call)
        names = ("unconsumed", "uncovered")  # lists on their way between the processes
        return merge_worker_reports([WeightReport(**r | {n: tuple(r[n]) for n in names}) for r in reports])

    async def commit(self, version: int) -> None:
        await self._control("commit a version", self._alive().update_weight_version(str(version)))
        self._version = version

    async def resume(self) -> None:
        await self._control("resume", self._alive().resume_generation())

    def queued(self) -> int:
        return len(self._alive().output_processor.request_states)

    async def version(self) -> int:
        return int(await self._control("tell its version", self._alive().get_weight_version()))

    async def _control(self, what: str, call: Awaitable[T], timeout: float | None = None) -> T:
        """Await a control call, for at most `timeout` (`options.control_timeout`) and only while the engine lives. A
        call to a dead engine core never returns by itself."""
        engine = self._engine
        assert engine is not None
        limit = self._options.control_timeout if timeout is None else timeout
        task = asyncio.ensure_future(call)
        waiting = {task} if engine.output_handler is None else {task, engine.output_handler}
        done, _ = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            try:
                return task.result()
            except Exception:
                self._alive()  # a dead engine is reported as dead, whatever the call returned
                raise
        task.cancel()
        self._alive()
        raise EngineDeadError(f"the vLLM engine did not {what} within {limit:g} s; it hangs")

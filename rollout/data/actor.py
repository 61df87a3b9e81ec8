"""DataActor: reads prompts ahead of their use, and owns their media in the object store.

    PromptSource ──▶ prompts with bytes ──▶ ray.put, once per digest ──▶ prompts with references ──▶ ray.put ──▶ driver
                                              └─ kept: the latest references, up to `media_bytes`

The driver holds references, never pixels, nor tokens. An item lives in the store as long as this actor or any prompt
holds its reference; it is lost with this actor or its node, and `read` then puts it again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from rollout.data.source import DataError, DataOptions, DataReport, PromptSource
from rollout.types import Prompt, PromptRef, StoredPrompt
from vlm.media.types import Media

if TYPE_CHECKING:
    from vlm.adapter import MultimodalAdapter


class MediaStore:
    """References of encoded media in Ray's object store, by digest; the latest `capacity` bytes of them are kept."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        """Bytes of the media whose references are kept."""
        self.puts = 0
        self._kept: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()

    def put(self, media: Media) -> Media:
        """`media` with a reference for its bytes, the one that is kept if there is one."""
        if media.digest not in self._kept:
            self._kept[media.digest] = (ray.put(media.data), len(media.data))
            self.held += len(media.data)
            self.puts += 1
        self._kept.move_to_end(media.digest)
        reference = self._kept[media.digest][0]
        while self.held > self.capacity:
            self.held -= self._kept.popitem(last=False)[1][1]
        return replace(media, data=reference)

    def forget(self, media: Iterable[Media]) -> None:
        """Put these anew when they come next: a kept reference may be dead."""
        for item in media:
            self.held -= self._kept.pop(item.digest, (None, 0))[1]


@dataclass(frozen=True)
class DataActorReport:
    """Of the data and the media behind them."""

    train: DataReport
    evaluation: DataReport | None
    media_puts: int
    """Distinct media put into the store (again, for those that had left the kept ones)."""
    media_bytes: int
    """Bytes of the references kept now."""


class DataActor:
    """The one Ray actor that reads data. Calls run one at a time; between them one thread reads ahead."""

    def __init__(
        self,
        load_adapter: Callable[[], MultimodalAdapter],
        train: DataOptions,
        evaluation: DataOptions | None = None,
        media_bytes: int = 256 * 2**20,
    ) -> None:
        """`media_bytes` bounds the media whose references are kept for re-use."""
        self._load_adapter = load_adapter
        self._train, self._evaluation = train, evaluation
        self._media = MediaStore(media_bytes)
        self._ahead: deque[tuple[StoredPrompt, dict[str, Any]]] = deque()
        """Prompts that were read and not yet taken, each with the cursor behind it."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._reading: Future[None] | None = None

    def __repr__(self) -> str:
        return "data"

    def start(self) -> int:
        """Open the data and return the number of training rows. Raises DataError with all that is wrong."""
        adapter = self._load_adapter()
        self._source = PromptSource(self._train, adapter)
        self._eval_source = PromptSource(self._evaluation, adapter) if self._evaluation is not None else None
        self._state = self._source.state()
        return len(self._source)

    def take(self, n: int) -> list[StoredPrompt]:
        """The next `n` prompts, in the store, as are their media; as many again are then read in the background.

        Raises DataError, again at every call, and hands out nothing when too many rows are refused."""
        if self._reading is not None:
            self._reading.result()
        self._read_ahead(n)
        prompts = []
        for _ in range(n):
            prompt, self._state = self._ahead.popleft()
            prompts.append(prompt)
        self._reading = self._thread.submit(self._read_ahead, n)
        return prompts

    def read(self, refs: Sequence[PromptRef]) -> list[StoredPrompt]:
        """The prompts of `refs` again, their media put into the store anew: after a resume, or when they were lost."""
        self._wait()
        prompts = self._source.read(refs)
        self._media.forget(media for prompt in prompts for media in prompt.media)
        return [self._stored(prompt) for prompt in prompts]

    def held_out(self, limit: int | None = None, group_by: str | None = None) -> list[tuple[StoredPrompt, str]]:
        """The held-out prompts, at most `limit`: the same ones in the same order at every call. Each with what its
        column `group_by` holds."""
        if self._eval_source is None:
            raise DataError("no held-out data: data.eval is empty")
        self._wait()
        return [
            (self._stored(prompt), str(prompt.columns.get(group_by, "none")) if group_by else "all")
            for prompt in self._eval_source.one_epoch(limit)
        ]

    def state(self) -> dict[str, Any]:
        """The cursor behind the last prompt that `take` returned; what was read ahead does not count."""
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError when the data or their order are others."""
        self._wait()
        self._source.load_state(state)
        self._ahead.clear()
        self._state, self._reading = self._source.state(), None

    def report(self) -> DataActorReport:
        """Counts include rows that were read ahead until now: a run does not wait for slow files to be told of them."""
        held_out = self._eval_source.report() if self._eval_source is not None else None
        return DataActorReport(self._source.report(), held_out, self._media.puts, self._media.held)

    def _wait(self) -> None:
        """Let the reading thread finish; what it failed with is raised by the next `take`."""
        if self._reading is not None:
            wait([self._reading])

    def _read_ahead(self, n: int) -> None:
        while len(self._ahead) < n:
            (prompt,) = self._source.take(1)
            self._ahead.append((self._stored(prompt), self._source.state()))

    def _stored(self, prompt: Prompt) -> StoredPrompt:
        return StoredPrompt(prompt.ref, ray.put(self._with_references(prompt)))

    def _with_references(self, prompt: Prompt) -> Prompt:
        return replace(prompt, media=tuple(map(self._media.put, prompt.media)))

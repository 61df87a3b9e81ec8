"""DataActor: reads prompts ahead of time, and owns their media in the object store.

    PromptSource ──▶ prompts with bytes ──▶ ray.put, once per digest ──▶ prompts with references ──▶ ray.put ──▶ driver
                                              └─ kept: the latest references, up to `media_bytes`

The driver holds references, never pixels or tokens. An item stays in the store as long as this actor or any prompt
holds its reference. If this actor or its node is lost, so is the item, and `read` puts it into the store again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from rollout.data.options import DataOptions
from rollout.data.source import DataError, DataReport, PromptSource
from rollout.types import Prompt, PromptRef, StoredPrompt
from vlm.media.types import Media

if TYPE_CHECKING:
    from vlm.adapter import MultimodalAdapter


class MediaStore:
    """Keeps references of encoded media in Ray's object store, by digest: those of the latest `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        """Bytes of the media whose references are kept."""
        self.puts = 0
        self._kept: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()

    def put(self, media: Media) -> Media:
        """Return `media` with a reference in place of its bytes. A kept reference is reused."""
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
        """Drop the references of these items, which may be dead; the next `put` makes new ones."""
        for item in media:
            self.held -= self._kept.pop(item.digest, (None, 0))[1]


@dataclass(frozen=True)
class DataActorReport:
    """Figures of the data and their media."""

    train: DataReport
    evaluation: DataReport | None
    media_puts: int
    """Distinct media put into the store. An item that was no longer kept counts again."""
    media_bytes: int
    """Bytes of the media whose references are kept now."""


class DataActor:
    """The only Ray actor that reads data. Calls run one at a time; between them, one thread reads ahead."""

    def __init__(
        self,
        load_adapter: Callable[[], MultimodalAdapter],
        train: DataOptions,
        evaluation: DataOptions | None = None,
        media_bytes: int = 256 * 2**20,
    ) -> None:
        """Keep references of at most `media_bytes` bytes of media for reuse."""
        self._load_adapter = load_adapter
        self._train, self._evaluation = train, evaluation
        self._media = MediaStore(media_bytes)
        self._ahead: deque[tuple[StoredPrompt, dict[str, Any]]] = deque()
        """Prompts that were read but not taken yet, each with the cursor after it."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._reading: Future[None] | None = None

    def __repr__(self) -> str:
        return "data"

    def start(self) -> int:
        """Open the data and return the number of training rows. Raises DataError, which lists all problems."""
        adapter = self._load_adapter()
        self._source = PromptSource(self._train, adapter)
        self._eval_source = PromptSource(self._evaluation, adapter) if self._evaluation is not None else None
        self._state = self._beginning = self._source.state()
        return len(self._source)

    def take(self, n: int) -> tuple[list[StoredPrompt], dict[str, Any]]:
        """Return the next `n` prompts, and the cursor behind them. They and their media are in the store. The `n`
        prompts after them are then read in the background, and do not count.

        If too many rows are refused, every call raises DataError and returns no prompts."""
        if self._reading is not None:
            self._reading.result()
        self._read_ahead(n)
        prompts = []
        for _ in range(n):
            prompt, self._state = self._ahead.popleft()
            prompts.append(prompt)
        self._reading = self._thread.submit(self._read_ahead, n)
        return prompts, self._state

    def read(self, refs: Sequence[PromptRef]) -> list[StoredPrompt]:
        """Return the prompts of `refs` again and put their media into the store again, after a resume or a loss."""
        self._wait()
        prompts = self._source.read(refs)
        self._media.forget(media for prompt in prompts for media in prompt.media)
        return [self._stored(prompt) for prompt in prompts]

    def held_out(self, limit: int | None = None, group_by: str | None = None) -> list[tuple[StoredPrompt, str]]:
        """Return at most `limit` held-out prompts, in the same order at every call. Each with what its column
        `group_by` holds."""
        if self._eval_source is None:
            raise DataError("no held-out data: data.eval is empty")
        self._wait()
        return [
            (self._stored(prompt), str(prompt.columns.get(group_by, "none")) if group_by else "all")
            for prompt in self._eval_source.one_epoch(limit)
        ]

    def check_health(self) -> None:
        """Answered as long as this process runs."""

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue behind a cursor; None is the beginning. Raises DataError if the data or their order differ."""
        self._wait()
        self._source.load_state(self._beginning if state is None else state)
        self._ahead.clear()
        self._state, self._reading = self._source.state(), None

    def report(self) -> DataActorReport:
        """Return the counts, which include the rows read ahead so far. This does not wait for slow files."""
        held_out = self._eval_source.report() if self._eval_source is not None else None
        return DataActorReport(self._source.report(), held_out, self._media.puts, self._media.held)

    def _wait(self) -> None:
        """Wait for the reading thread. The next `take` raises its error, if it failed."""
        if self._reading is not None:
            wait([self._reading])

    def _read_ahead(self, n: int) -> None:
        while len(self._ahead) < n:
            (prompt,) = self._source.take(1)
            self._ahead.append((self._stored(prompt), self._source.state()))

    def _stored(self, prompt: Prompt) -> StoredPrompt:
        return StoredPrompt(prompt.ref, ray.put(self._with_references(prompt)), prompt.expanded_length)

    def _with_references(self, prompt: Prompt) -> Prompt:
        return replace(prompt, media=tuple(map(self._media.put, prompt.media)))

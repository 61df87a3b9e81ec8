"""Read prompts from Parquet, JSONL and JSON files: endlessly, shuffled by seed and epoch, and resumable at any row.

    files ──▶ columns ──▶ rows.RowStore ──▶ rows.EpochOrder ──▶ builder.PromptBuilder ──▶ Prompt
                                  ▲ (epoch, position)          └─▶ refused: file, row, reason; counted, capped

Row numbers count from 0 everywhere; in JSONL row n is line n.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rollout.data.builder import ANSWER_REFUSALS, PromptBuilder
from rollout.data.columns import MEDIA_ROLES, Columns, choose_columns, unread
from rollout.data.elsewhere import address_problem
from rollout.data.formats import DataError, RowFile
from rollout.data.media_files import media_kind
from rollout.data.options import DataOptions
from rollout.data.report import WHAT_TO_DO, DataReport, Refusal, differences
from rollout.data.rows import EpochOrder, RowRefusedError, RowStore, open_files
from rollout.types import Prompt, PromptRef
from vlm.media.types import MediaKind

if TYPE_CHECKING:
    from vlm.adapter import MultimodalAdapter

__all__ = ["DataError", "DataReport", "PromptSource", "Refusal"]

MIN_ROWS_FOR_SHARE = 1000
"""The share of refused rows is taken of at least this many rows (or of all rows of smaller data)."""
REFUSALS_KEPT = 10
ROWS_FOR_MEDIA = 20
"""How many rows are searched for media in columns without a role."""


def open_data(options: DataOptions) -> tuple[list[RowFile], Columns]:
    """Open the files and choose the column of each role. Raises DataError, which lists everything that is missing."""
    problems: list[str] = []
    data = options.data
    if data.root is not None and not data.root.is_dir():
        why = address_problem(data.folders[0])
        problems.append(f"data.media_from: no folder {data.folders[0]}" + (f"; {why}" if why else ""))
    files = open_files(options.files, problems)
    present = {str(file.path): file.columns for file in files if file.columns}
    columns = choose_columns(
        data.prompt_columns, options.extra_columns, present, problems, optional=options.optional_columns
    )
    if problems or columns is None:
        raise DataError("\n  - ".join([f"{len(problems)} problem(s) with the data:", *problems]))
    return files, columns


class PromptSource:
    """An endless sequence of prompts. `take(n)` moves a cursor that `state()` saves and `load_state()` restores."""

    def __init__(self, options: DataOptions, adapter: MultimodalAdapter) -> None:
        """Read the indexes of the files. Raises DataError, which lists all missing files and columns."""
        self.options = options
        files, columns = open_data(options)
        self.columns = columns
        """The column of each role."""
        self.unused = tuple(dict.fromkeys(name for file in files for name in unread(file.columns, columns.names)))
        """Columns that are not used."""
        self._store = RowStore(files, columns.names, options.window_bytes)
        self._builder = PromptBuilder(options, columns, adapter)
        blocks = self._store.blocks
        self._order = EpochOrder(
            [b.rows for b in blocks],
            [b.nbytes for b in blocks],
            seed=options.seed,
            shuffle=options.shuffle,
            window_bytes=options.window_bytes,
        )
        self._epoch = self._position = 0
        self._tried = 0
        self._refused: dict[int, str] = {}
        """Row -> kind of its refusal."""
        self._refusals: list[Refusal] = []
        self._truncated: set[int] = set()

    def __len__(self) -> int:
        """Return the number of rows, including refused ones."""
        return len(self._store)

    # ------------------------------------------------------------------ reading

    def take(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts and skip refused rows. Raises DataError if too many are refused."""
        return [self._next() for _ in range(n)]

    def _next(self) -> Prompt:
        for _ in range(len(self)):
            self._check_refused()
            epoch, row = self._epoch, self._order.row(self._epoch, self._position)
            prompt = self.attempt(row, epoch)
            self._position += 1
            if self._position == len(self):
                self._epoch, self._position = self._epoch + 1, 0
            if prompt is not None:
                return prompt
        raise self._nothing_usable()

    def one_epoch(self, limit: int | None = None) -> Iterator[Prompt]:
        """Return at most `limit` usable rows of epoch 0. The cursor does not move."""
        found = 0
        for prompt in self.look(len(self)):
            self._check_refused()
            if prompt is not None:
                yield prompt
                found += 1
            if limit is not None and found >= limit:
                return
        if not found:
            raise self._nothing_usable()

    def look(self, rows: int) -> Iterator[Prompt | None]:
        """Yield the first `rows` rows of epoch 0, with None for each refused one. The cursor does not move."""
        for position in range(min(rows, len(self))):
            yield self.attempt(self._order.row(0, position))

    def try_rows(self, rows: int) -> None:
        """Try the first `rows` rows of epoch 0. Raises DataError if a run would stop at them."""
        usable = 0
        for prompt in self.look(rows):
            self._check_refused()
            usable += prompt is not None
        self._check_refused()
        if not usable and rows >= len(self):
            raise self._nothing_usable()

    def overlooked(self) -> dict[str, MediaKind]:
        """Return unused columns that contain media in the first rows. Kinds of media that have a column, or that the
        configuration leaves out, do not count."""
        missing = [k for k in MEDIA_ROLES if getattr(self.columns, k) is None and k not in self.options.data.columns]
        files = [copy.copy(file) for file in self._store.files]  # files remember the columns that are read
        store = RowStore(files, self.unused, self.options.window_bytes)
        found: dict[str, MediaKind] = {}
        for row in range(min(ROWS_FOR_MEDIA, len(store)) if missing and self.unused else 0):
            with suppress(RowRefusedError):
                values = store.read(row)
                directory = self.options.data.root or files[store.locate(row)[0]].path.parent
                kinds = {name: media_kind(values.get(name), directory) for name in self.unused}
                found |= {name: kind for name, kind in kinds.items() if kind in missing}
        return found

    def golds(self, rows: int) -> Iterator[tuple[str, Prompt | Refusal]]:
        """Return up to `rows` random rows, some from every file, with the file's name. Each has the answer, further
        columns and the user's words, without media and tokens, or the reason why the answer is refused. Rows with a bad
        prompt are omitted."""
        names = [name for name in self.columns.names if name not in dict(self.columns.media).values()]
        files = [copy.copy(file) for file in self._store.files]  # files remember the columns that are read
        store, draw, first = RowStore(files, names, self.options.window_bytes), random.Random(self.options.seed), 0
        for name, count in zip(store.names, store.rows_of_files, strict=True):
            drawn = draw.sample(range(count), min(count, max(1, rows // len(files))))
            for row in (first + n for n in drawn):
                try:
                    yield name, self._builder.gold(store.read(row), PromptRef(store.uid(row), 0, 0, row))
                except RowRefusedError as error:
                    if error.kind in ANSWER_REFUSALS:
                        yield name, Refusal(name, row - first, error.kind, error.reason)
            first += count

    def read(self, refs: Sequence[PromptRef]) -> list[Prompt]:
        """Read the same prompts again, in the given order, after a resume or a loss of their media.

        Raises DataError if a row differs: these prompts were usable before, so the data have changed."""
        return [self._build(ref) for ref in refs]

    def _build(self, ref: PromptRef) -> Prompt:
        if ref.uid != self._store.uid(ref.row):
            raise DataError(f"row {ref.row} is {self._store.uid(ref.row)}, not {ref.uid}; have the files changed?")
        try:
            return self._build_row(ref)
        except RowRefusedError as error:
            raise DataError(f"{ref} cannot be read again: {error.reason}; have the files changed?") from error

    def attempt(self, row: int, epoch: int = 0) -> Prompt | None:
        """Return the prompt of a row, by its number over all files. None if the row is refused, which is counted."""
        self._tried += 1
        try:
            prompt = self._build_row(PromptRef(self._store.uid(row), epoch, 0, row))
            if prompt.truncated:
                self._truncated.add(row)
            return prompt
        except RowRefusedError as error:
            if row not in self._refused and len(self._refusals) < REFUSALS_KEPT:
                file, within = self._store.locate(row)
                self._refusals.append(Refusal(str(self._store.files[file].path), within, error.kind, error.reason))
            self._refused[row] = error.kind
            return None

    def _build_row(self, ref: PromptRef) -> Prompt:
        file, _ = self._store.locate(ref.row)
        return self._builder.build(self._store.read(ref.row), ref, self._store.files[file].path.parent)

    # ------------------------------------------------------------------ refusals

    def report(self) -> DataReport:
        refused = dict(Counter(list(self._refused.values())))  # copy the list first: another thread may be reading rows
        return DataReport(len(self), self._seen, refused, tuple(self._refusals), len(self._truncated))

    @property
    def _seen(self) -> int:
        """Return how many distinct rows were seen, except those that a resumed first epoch leaves to the second."""
        return min(self._tried, len(self))

    def excess(self) -> str:
        """Explain why a run stops at the refusals so far; empty if it continues."""
        share = self.options.data.max_refused_share
        counted = max(self._seen, min(len(self), MIN_ROWS_FOR_SHARE))
        too_many = len(self._refused) > share * counted
        return f"more than {share:.2%} of the rows were refused (data.max_refused_share)" if too_many else ""

    def _check_refused(self) -> None:
        if excess := self.excess():
            raise DataError(f"{excess}. {self._refusals_text()}")

    def _nothing_usable(self) -> DataError:
        return DataError(f"none of the {len(self)} rows can be used. {self._refusals_text()}")

    def _refusals_text(self) -> str:
        return "\n  - ".join([f"{self.report()}. The first:", *map(str, self._refusals)])

    # ------------------------------------------------------------------ cursor

    def state(self) -> dict[str, Any]:
        """Return the position of `take` as plain JSON values, with everything that the order depends on."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError if this source has another order of rows."""
        identity = self._identity()
        if differing := differences(state, identity):
            what = "the saved position belongs to other data, or to another order of them:"
            raise DataError("\n  - ".join([what, *differing, WHAT_TO_DO]))
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        files = [list(pair) for pair in zip(self._store.names, self._store.rows_of_files, strict=True)]
        options = self.options
        return {
            "files": files,
            "contents": self._store.content_marks,
            "seed": options.seed,
            "shuffle": options.shuffle,
            "order": self._order.fingerprint(),
        }

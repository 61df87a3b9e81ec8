"""Number the rows of several files consecutively, order them for each epoch, and read them in bounded memory.

    file ──▶ blocks (about 16 MiB of consecutive rows) ──▶ loaded one at a time, the latest ones cached ──▶ row
    epoch ─▶ blocks, shuffled ──▶ windows of about 256 MiB ──▶ rows of a window, shuffled

Only the index of blocks is in memory for the whole data set (a few numbers per 16 MiB), and the blocks of one window.
"""

from __future__ import annotations

import glob
import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from rollout.data.elsewhere import not_here
from rollout.data.formats import DataError, JsonlRows, Loaded, Row, RowFile, open_json
from rollout.data.parquet_rows import ParquetRows

FORMATS: dict[str, Callable[[Path], RowFile]] = {
    ".parquet": ParquetRows,
    ".jsonl": JsonlRows,
    ".json": open_json,
}

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are digested whole."""
SAMPLES, SAMPLE_BYTES = 256, 2**16
"""Number and size of the pieces of a larger file that are digested."""
SHOWN = 80
"""The most characters of a value that a message quotes."""
MAX_REASON = 300
"""The most characters of a reason. A row may contain megabytes, but a message about it stays one line."""


def shown(value: object) -> str:
    """Return a value of a row, shortened for a message."""
    text = repr(value if not isinstance(value, str) else value[:SHOWN])
    whole = len(text) <= SHOWN + 2 and (not isinstance(value, str) or len(value) <= SHOWN)
    return text if whole else f"{text[:SHOWN]}..."


class RowRefusedError(ValueError):
    """A row cannot be used. `kind` is a short fixed phrase to count by; the message has the details."""

    def __init__(self, kind: str, reason: str) -> None:
        if len(reason) > MAX_REASON:
            reason = f"{reason[: MAX_REASON - 4]} ..."
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


def content_mark(path: Path) -> str:
    """Return a digest of a file's size and contents, by which a change is noticed: of all of it up to WHOLE_BYTES, of
    SAMPLES pieces of a larger file, its beginning and its end among them."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def open_files(patterns: Sequence[str], problems: list[str]) -> list[RowFile]:
    """Open the files behind paths and glob patterns, in order. Files that cannot be opened are added to `problems`, and
    so are files that have no rows altogether."""
    before = len(problems)
    opened = [_open(path, problems) for path in _resolve(patterns, problems)]
    files = [file for file in opened if file is not None]
    if len(problems) == before and not any(file.columns for file in files):
        problems.append(f"no rows in {', '.join(patterns) or 'an empty list of files'}")
    return files


class RowStore:
    """All rows of several files, numbered consecutively in the order of the files."""

    def __init__(self, files: Sequence[RowFile], columns: Sequence[str], cache_bytes: int) -> None:
        """Read the columns `columns`. The cached blocks take at most `cache_bytes`."""
        self.files = tuple(files)
        self.names = _short_names([file.path for file in self.files])
        blocks = [file.select(columns) for file in self.files]
        self.blocks = [block for own in blocks for block in own]
        self.rows_of_files = [sum(block.rows for block in own) for own in blocks]
        self._file_starts = [0, *accumulate(self.rows_of_files)]
        self._block_starts = [0, *accumulate(block.rows for block in self.blocks)]
        self._file_of_block = [n for n, own in enumerate(blocks) for _ in own]
        self._cache: OrderedDict[int, Loaded] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes
        self.blocks_loaded = 0
        """Blocks read from disk so far. A block that is read again counts again."""

    @cached_property
    def content_marks(self) -> list[str]:
        """The `content_mark` of each file, as of when it was asked for first."""
        return [content_mark(file.path) for file in self.files]

    def __len__(self) -> int:
        return self._file_starts[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """Return `(file number, row within the file)`."""
        if not 0 <= row < len(self):
            raise DataError(f"there is no row {row}: the data have {len(self)} rows")
        file = bisect_right(self._file_starts, row) - 1
        return file, row - self._file_starts[file]

    def uid(self, row: int) -> str:
        file, within = self.locate(row)
        return f"{self.names[file]}:{within}"

    def read(self, row: int) -> Row:
        """Return the row's columns as Python values. Raises RowRefusedError if the row is damaged, and DataError if its
        file is."""
        number = bisect_right(self._block_starts, row) - 1
        loaded = self._cache.get(number)
        if loaded is None:
            loaded = self._load(number)
        self._cache.move_to_end(number)
        try:
            return loaded(row - self._block_starts[number])
        except ValueError as error:
            raise RowRefusedError("unreadable row", f"the row cannot be decoded: {error}") from error

    def _load(self, number: int) -> Loaded:
        block = self.blocks[number]
        while self._cache and self._cached_bytes + block.nbytes > self._cache_bytes:
            evicted, _ = self._cache.popitem(last=False)
            self._cached_bytes -= self.blocks[evicted].nbytes
        loaded = self.files[self._file_of_block[number]].load(block)
        self._cache[number] = loaded
        self._cached_bytes += block.nbytes
        self.blocks_loaded += 1
        return loaded


@dataclass(frozen=True)
class _Plan:
    """One epoch: the blocks of each window, and the position at which each window starts."""

    windows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


class EpochOrder:
    """`row(epoch, position)` is a permutation of all rows for each epoch. It is a pure function of seed and block
    sizes, and never held in memory as a whole. Data smaller than a window are shuffled uniformly."""

    def __init__(self, rows: Sequence[int], nbytes: Sequence[int], *, seed: int, shuffle: bool, window_bytes: int):
        """Take `rows` and `nbytes` of each block, in file order."""
        self._rows, self._nbytes = tuple(rows), tuple(nbytes)
        self._first = np.concatenate([[0], np.cumsum(self._rows, dtype=np.int64)])
        self._seed, self._shuffle, self._window_bytes = seed, shuffle, window_bytes
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __len__(self) -> int:
        return int(self._first[-1])

    def row(self, epoch: int, position: int) -> int:
        """Return the row at `position` (0 to the number of rows - 1) of epoch `epoch`."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside of an epoch of {len(self)} rows")
        if not self._shuffle:
            return position
        plan = self._plan(epoch)
        window = bisect_right(plan.starts, position) - 1
        return int(self._window(epoch, window)[position - plan.starts[window]])

    def fingerprint(self) -> str:
        """Return a fingerprint. Two are equal exactly if the order of every epoch is equal."""
        layout = (self._rows, self._nbytes, self._window_bytes, self._seed) if self._shuffle else len(self)
        return hashlib.sha256(repr(layout).encode()).hexdigest()[:16]

    def _generator(self, *which: int) -> np.random.Generator:
        text = "/".join(map(str, (self._seed, *which)))
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))

    def _make_plan(self, epoch: int) -> _Plan:
        windows: list[tuple[int, ...]] = []
        starts: list[int] = []
        current: list[int] = []
        size = position = 0
        for block in self._generator(epoch).permutation(len(self._rows)).tolist():
            if current and size + self._nbytes[block] > self._window_bytes:
                windows.append(tuple(current))
                current, size = [], 0
            if not current:
                starts.append(position)
            current.append(block)
            size, position = size + self._nbytes[block], position + self._rows[block]
        windows.append(tuple(current))
        return _Plan(tuple(windows), tuple(starts))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        blocks = self._plan(epoch).windows[window]
        rows = np.concatenate([np.arange(self._first[b], self._first[b + 1]) for b in blocks])
        return self._generator(epoch, window).permutation(rows)


def _resolve(patterns: Sequence[str], problems: list[str]) -> list[Path]:
    """Return the files behind paths and globs, in order. Patterns without a match and files named twice are added to
    `problems`."""
    found: dict[Path, str] = {}
    named: list[Path] = []
    for pattern in patterns:
        name = str(Path(pattern).expanduser())
        is_file = Path(name).exists()
        matches = [name] if is_file else sorted(glob.glob(name, recursive=True))
        if not matches:
            why = not_here(pattern)
            matching = " (nothing matches)" if glob.has_magic(name) and not why else ""
            problems.append(f"{pattern}: no such file{matching}" + (f"; {why}" if why else ""))
        for match in matches:
            path = Path(match).absolute()  # links are not resolved: the name tells the format
            if path.resolve() in found:
                problems.append(f"{match}: named twice, by {found[path.resolve()]!r} and {pattern!r}")
                continue
            found[path.resolve()] = pattern
            named.append(path)
    return named


def _open(path: Path, problems: list[str]) -> RowFile | None:
    if path.is_dir():
        problems.append(f"{path}: this is a directory; name its files, as in {path}/*.parquet")
        return None
    opener = FORMATS.get(path.suffix.lower())
    if opener is None:
        problems.append(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(FORMATS)}")
        return None
    try:
        return opener(path)
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{path}: unreadable: {error}")
    except DataError as error:
        problems.append(str(error))
    return None


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the file names, each with as many parent folders as are needed to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names

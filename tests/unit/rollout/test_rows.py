"""Rows by number from Parquet, JSONL and JSON, whatever way files are cut; and the order an epoch visits them in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.data import formats as row_files
from rollout.data import json_array as json_elements
from rollout.data.formats import DataError
from rollout.data.rows import EpochOrder, RowRefusedError, RowStore, open_files

ROOT = Path(__file__).resolve().parents[3]
FOLDER_IS_SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def store(*files: Path, columns: tuple[str, ...] = ("text",), cache_bytes: int = 2**20) -> RowStore:
    problems: list[str] = []
    opened = open_files([str(file) for file in files], problems)
    if problems:
        raise DataError("; ".join(problems))
    return RowStore(opened, columns, cache_bytes)


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------------- reading


@FOLDER_IS_SHARED
@given(st.lists(st.text(max_size=30), min_size=1, max_size=40), st.integers(1, 200), st.booleans(), st.integers(0, 3))
def test_jsonl_rows_are_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], block: int, newline: bool, blank: int
) -> None:
    monkeypatch.setattr(row_files, "BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n" * (newline + newline * blank))
    reader = store(path, cache_bytes=3 * block)
    assert len(reader) == len(texts)
    for i in (*range(len(texts)), *reversed(range(len(texts)))):
        assert reader.read(i) == {"text": texts[i]}


def test_jsonl_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    assert len(store(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, "\n", " \n"]))) == 1


def test_jsonl_damaged_lines_are_refused_alone(tmp_path: Path) -> None:
    lines = [{"text": "x"}, "{'text': 1}\n", "\n", "[1]\n", '{"text": "y"}\r\n', "[" * 100_000 + "\n", '"\\ud800']
    reader = store(write_jsonl(tmp_path / "a.jsonl", lines))
    assert len(reader) == 7
    for row in (1, 2, 3, 5, 6):
        with pytest.raises(RowRefusedError, match="the row cannot be decoded"):
            reader.read(row)
    assert reader.read(4) == {"text": "y"}


def test_jsonl_without_line_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b"x" * 5000)
    monkeypatch.setattr(row_files, "BLOCK_BYTES", 100)
    with pytest.raises(DataError, match="expected one object per line"):
        store(tmp_path / "a.jsonl")


@FOLDER_IS_SHARED
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=60), st.integers(1, 30), st.integers(1, 4000), st.data())
def test_parquet_rows_are_the_tables_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[bytes], group: int, block: int, data: st.DataObject
) -> None:
    """Small row groups are joined and large ones cut: the rows stay the same, also when read against the order."""
    monkeypatch.setattr(row_files, "BLOCK_BYTES", block)
    path = tmp_path / "a.parquet"
    structs = [{"bytes": v, "path": None} for v in values]
    table = pa.table({"n": range(len(values)), "image": structs, "unused": ["u"] * len(values)})
    pq.write_table(table, path, row_group_size=group, use_dictionary=False)
    reader = store(path, columns=("n", "image"), cache_bytes=2 * block)
    assert sum(b.rows for b in reader.blocks) == len(values) == len(reader)
    for i in data.draw(st.permutations(range(len(values)))):
        assert reader.read(i) == {"n": i, "image": structs[i]}


READ_SHUFFLED = """
import sys
import pyarrow as pa
from rollout.data import formats as row_files
from rollout.data.rows import EpochOrder, RowStore, open_files

row_files.BLOCK_BYTES = 2**19
for path in sys.argv[1:]:
    reader = RowStore(open_files([path], []), ("data",), 3 * 2**20)
    sizes = [b.rows for b in reader.blocks], [b.nbytes for b in reader.blocks]
    order = EpochOrder(*sizes, seed=0, shuffle=True, window_bytes=3 * 2**20)
    for position in range(0, len(reader), 5):
        row = order.row(0, position)
        assert reader.read(row)["data"][:2] == row.to_bytes(2, "big"), row
    assert 20 < reader.blocks_loaded <= len(reader.blocks), "a block is read once an epoch"
print(pa.default_memory_pool().max_memory())
"""


def test_a_file_larger_than_the_bound_is_never_in_memory_whole(tmp_path: Path) -> None:
    """24 MB, as one row group and as eight, read in shuffled order with 3 MB of cache: Arrow's peak stays near it."""
    payload = [n.to_bytes(2, "big") + os.urandom(32 * 1024) for n in range(750)]
    files = []
    for group in (750, 100):
        files.append(str(tmp_path / f"{group}.parquet"))
        pq.write_table(
            pa.table({"data": payload}), files[-1], row_group_size=group, data_page_size=2**17, write_batch_size=8
        )
    command = [sys.executable, "-c", READ_SHUFFLED, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 3 * 2**20 < int(done.stdout) < 8 * 2**20


def test_a_file_that_shrank_is_an_error_not_a_wrong_row(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}] * 9)
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["abc"] * 9}), parquet)
    reader = store(jsonl, parquet)
    write_jsonl(jsonl, [{"text": "abc"}] * 4)
    parquet.write_bytes(parquet.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a\.jsonl: expected 9 lines, read 4"):
        reader.read(0)
    with pytest.raises(DataError, match=r"a\.parquet: row groups 0 to 0 unreadable"):
        reader.read(9)


# ---------------------------------------------------------------------- JSON arrays

ELEMENTS = st.lists(
    st.fixed_dictionaries({"text": st.text(max_size=30)}) | st.integers() | st.floats(allow_nan=False) | st.just([]),
    min_size=1,
    max_size=40,
)


@FOLDER_IS_SHARED
@given(ELEMENTS, st.integers(1, 200), st.integers(1, 50), st.sampled_from([None, 3]), st.booleans())
def test_json_rows_are_the_elements(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elements: list[Any],
    block: int,
    chunk: int,
    indent: int | None,
    ascii: bool,
) -> None:
    """Wherever blocks and pieces of reading end: in a number, in a text, in a character."""
    monkeypatch.setattr(row_files, "BLOCK_BYTES", block)
    monkeypatch.setattr(json_elements, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    elements = [{"text": "first"}, *elements]
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=ascii) + "\n" * block)
    reader = store(path, cache_bytes=3 * block)
    assert len(reader) == len(elements)
    for i in (*range(len(elements)), *reversed(range(len(elements)))):
        if isinstance(elements[i], dict):
            assert reader.read(i) == elements[i]
        else:
            with pytest.raises(RowRefusedError, match="a row must be a JSON object"):
                reader.read(i)


def test_json_is_read_with_a_byte_order_mark_and_damaged_text_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"text": "x"}, {"text": "\xff"}, {"text": "\xc3\xa9"}]')
    reader = store(tmp_path / "a.json")
    assert (reader.read(0), reader.read(2)) == ({"text": "x"}, {"text": "é"})
    with pytest.raises(RowRefusedError, match="the row cannot be decoded"):
        reader.read(1)


def test_json_lines_under_the_other_name_are_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [store(tmp_path / "a.json").read(n)["text"] for n in range(2)] == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "x"}, {"text": ]', "not a readable JSON array: byte 25: Expecting value"),
        ('[{"text": "x"}', "not a readable JSON array: byte 14: expected , or ]"),
        ('[{"text": "x"} {"text": "y"}]', "byte 15: expected , or ]"),
        ('[{"text": "x"},]', "byte 15: Expecting value"),
        ('[{"text": "x"}] []', "byte 16: there is something after the end of the array"),
        ("[" * 100_000, "nested too deeply"),
        ('{\n  "data": [{"text": "x"}]\n}', "no JSON object with keys among the first lines"),
        ("[1, 2]", "no JSON object with keys among the first elements"),
    ],
)
def test_json_that_is_no_array_of_objects_is_an_error(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as caught:
        store(tmp_path / "a.json")
    assert expected in str(caught.value)


def test_json_with_an_endless_element_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_elements, "MAX_ELEMENT_BYTES", 1000)
    monkeypatch.setattr(json_elements, "CHUNK_BYTES", 100)
    (tmp_path / "a.json").write_text('["' + "x" * 5000 + '"]')
    with pytest.raises(DataError, match="byte 1: an element longer than"):
        store(tmp_path / "a.json")


READ_JSON = """
import sys, tracemalloc
from rollout.data import json_array as json_elements
from rollout.data import formats as row_files
from rollout.data.rows import RowStore, open_files

row_files.BLOCK_BYTES = json_elements.CHUNK_BYTES = 2**18
tracemalloc.start()
reader = RowStore(open_files([sys.argv[1]], []), ("data",), 2**20)
for row in range(0, len(reader), 7):
    assert reader.read(row)["data"].startswith(f"{row} "), row
print(tracemalloc.get_traced_memory()[1])
"""


def test_a_json_file_larger_than_the_bound_is_never_in_memory_whole(tmp_path: Path) -> None:
    """16 MB of small objects, which would be more in Python, with 1 MB of cache."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"data": f"{n} " + "x" * 1000} for n in range(16_000)]))
    command = [sys.executable, "-c", READ_JSON, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 2**20 < int(done.stdout) < 4 * 2**20


# ---------------------------------------------------------------------- files


def test_all_problems_with_files_are_reported_at_once(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "x", "pictures": "y", "n": 1}])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "data.csv").write_text("a,b")
    patterns = [good, good, tmp_path, tmp_path / "bad.parquet", tmp_path / "no.jsonl", tmp_path / "*.xyz"]
    problems: list[str] = []
    files = open_files([*map(str, patterns), str(tmp_path / "data.csv")], problems)
    assert [file.columns for file in files] == [("text", "pictures", "n")]
    assert len(problems) == 6
    message = "\n".join(problems)
    for expected in (
        "named twice",
        f"{tmp_path}: this is a directory",
        "bad.parquet: unreadable",
        "no.jsonl: no such file",
        "*.xyz: no such file (nothing matches)",
        "cannot read .csv; known: .parquet, .jsonl, .json",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "\n"), ("a.json", "[ ]")]
)
def test_files_without_rows_are_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match="no rows in"):
        store(path)


def test_a_link_has_the_name_it_is_called_by(tmp_path: Path) -> None:
    """Caches of downloaded files keep contents under their hash, and links with the names."""
    (tmp_path / "blobs").mkdir()
    write_jsonl(tmp_path / "blobs" / "0a1b2c", [{"text": "x"}])
    (tmp_path / "train.jsonl").symlink_to("blobs/0a1b2c")
    assert store(tmp_path / "train.jsonl").uid(0) == "train.jsonl:0"
    (tmp_path / "again.jsonl").symlink_to("train.jsonl")
    with pytest.raises(DataError, match="named twice"):
        store(tmp_path / "train.jsonl", tmp_path / "again.jsonl")


def test_globs_come_in_sorted_order_and_names_tell_files_apart(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", [{"text": folder}, {"text": folder}])
    reader = store(tmp_path / "*" / "x.jsonl")
    assert [reader.uid(i) for i in range(4)] == ["a/x.jsonl:0", "a/x.jsonl:1", "b/x.jsonl:0", "b/x.jsonl:1"]
    assert [reader.read(i)["text"] for i in range(4)] == ["a", "a", "b", "b"]
    with pytest.raises(DataError, match="there is no row 4: the data have 4 rows"):
        reader.uid(4)


def test_a_key_that_comes_late_is_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 500 + [{"text": "x", "image": "p"}])
    (file,) = open_files([str(path)], [])
    assert file.columns == ("text", "image")


# ---------------------------------------------------------------------- order

BLOCKS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), min_size=1, max_size=20)


def epoch_order(blocks: list[tuple[int, int]], seed: int = 0, window: int = 100, shuffle: bool = True) -> EpochOrder:
    return EpochOrder(
        [rows for rows, _ in blocks], [size for _, size in blocks], seed=seed, shuffle=shuffle, window_bytes=window
    )


@given(BLOCKS, st.integers(-5, 5), st.integers(0, 5), st.integers(1, 200), st.randoms())
def test_every_epoch_is_a_permutation_and_a_pure_function(
    blocks: list[tuple[int, int]], seed: int, epoch: int, window: int, random: Any
) -> None:
    order = epoch_order(blocks, seed, window)
    visited = [order.row(epoch, position) for position in range(len(order))]
    assert sorted(visited) == list(range(sum(rows for rows, _ in blocks)))
    again = epoch_order(blocks, seed, window)
    where = [(e, p) for e in (epoch, epoch + 1) for p in range(len(order))]
    random.shuffle(where)
    found = {(e, p): again.row(e, p) for e, p in where}
    assert [found[epoch, p] for p in range(len(order))] == visited


@given(BLOCKS, st.integers(1, 200))
def test_a_window_holds_no_more_than_its_bytes(blocks: list[tuple[int, int]], window: int) -> None:
    """A cache of the window's size therefore loads each block once an epoch."""
    order = epoch_order(blocks, window=window)
    block_of = [n for n, (rows, _) in enumerate(blocks) for _ in range(rows)]
    last_use = {block_of[order.row(0, position)]: position for position in range(len(order))}
    open_blocks: set[int] = set()
    for position in range(len(order)):
        open_blocks.add(block_of[order.row(0, position)])
        assert len(open_blocks) == 1 or sum(blocks[b][1] for b in open_blocks) <= window
        open_blocks = {b for b in open_blocks if last_use[b] > position}


def test_epochs_and_seeds_differ_and_small_data_are_shuffled_uniformly() -> None:
    orders = Counter(
        tuple(epoch_order([(2, 1), (2, 1)], seed).row(epoch, p) for p in range(4))
        for seed in range(20)
        for epoch in range(36)
    )
    assert len(orders) == 24  # all 4! of them, each about 30 times in 720: chi-squared with 23 degrees of freedom
    assert sum((n - 30) ** 2 / 30 for n in orders.values()) < 49.7  # 0.999 quantile


def test_without_shuffle_rows_come_as_they_stand() -> None:
    order = epoch_order([(3, 1), (2, 1)], shuffle=False)
    assert [order.row(7, p) for p in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError, match="position 5 is outside of an epoch of 5 rows"):
        order.row(0, 5)


def test_the_fingerprint_tells_orders_apart() -> None:
    same = epoch_order([(3, 1), (2, 1)]).fingerprint()
    assert same == epoch_order([(3, 1), (2, 1)]).fingerprint()
    others = [
        epoch_order([(2, 1), (3, 1)]),
        epoch_order([(3, 1), (2, 1)], seed=1),
        epoch_order([(3, 1), (2, 1)], window=1),
        epoch_order([(3, 1), (2, 1)], shuffle=False),
    ]
    assert len({same, *(order.fingerprint() for order in others)}) == 5

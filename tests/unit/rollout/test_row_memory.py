"""What files unpack to does not decide how much memory reading them takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data import parquet_rows
from rollout.data.parquet_rows import dictionary_bytes
from rollout.data.rows import RowRefusedError, RowStore, open_files
from tests.helpers.data_helpers import source

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20
BY_DIFFERENCES = "what differs from the text before"
"""Of such a file nothing says what it unpacks to: its rows are read until they take too much."""

READ = """
import json, resource, sys
from rollout.data.rows import RowRefusedError, RowStore, open_files

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

found = {}
for path in sys.argv[1:]:
    before = peak()
    store = RowStore(open_files([path], []), ("prompt", "tags"), 256 * 2**20)
    lengths = []
    for row in (0, len(store) // 2, len(store) - 1):
        try:
            lengths.append(sum(map(len, store.read(row)["prompt"])))
        except RowRefusedError as error:
            lengths.append(error.reason)
    found[path] = (peak() - before, lengths)
print(json.dumps(found))
"""


def bombs(folder: Path) -> dict[str, Path]:
    """Files of a few kilobytes that unpack to 75 to 750 MB, by where it comes from."""
    text = "a" * (MIB // 2)
    tables: dict[str, tuple[Any, dict[str, Any]]] = {
        "one text for all rows": (pa.DictionaryArray.from_arrays(pa.repeat(0, 1500).cast(pa.int32()), [text]), {}),
        "one row": ([text * 1000, "q"], {}),
        "many texts": ([f"{n}{text}" for n in range(150)], {}),
        BY_DIFFERENCES: (
            [f"{text}{n}" for n in range(600)],
            {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
        ),
        "a list in each row": ([["b" * 1000] * 20_000, ["c" * 1000] * 20_000] * 15, {}),
    }
    made = {}
    for n, (name, (prompts, options)) in enumerate(tables.items()):
        made[name] = folder / f"{n}.parquet"
        pq.write_table(pa.table({"prompt": prompts}), made[name], compression="zstd", **options)
        assert made[name].stat().st_size < 200_000
    return made


def test_a_small_file_that_unpacks_to_much_is_read_in_little_or_refused_by_row(tmp_path: Path) -> None:
    files = bombs(tmp_path)
    command = [sys.executable, "-c", READ, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    found = {name: answers[str(path)] for name, path in files.items()}
    assert {name: peak for name, (peak, _) in found.items() if peak > 60 + 300 * (name == BY_DIFFERENCES)} == {}
    lengths = {name: of for name, (_, of) in found.items()}
    assert lengths["one text for all rows"] == [MIB // 2] * 3
    assert lengths["a list in each row"] == [2 * 10**7] * 3
    for name in ("one row", "many texts"):
        assert all(
            "more than the limit of 64 MiB and 100 times the packed size" in str(reason) for reason in lengths[name]
        )
    block = "the row cannot be decoded: its block of 600 rows takes more than 256 MiB"
    assert lengths[BY_DIFFERENCES] == [block] * 3


def test_rows_of_what_is_not_unpacked_are_refused_and_counted_beside_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "UNPACKED_BYTES", MIB)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"prompt": pa.string()}), compression="zstd") as writer:
        for texts in (["a", "b"], ["c" * 2 * MIB, "d"], ["e"]):
            writer.write_table(pa.table({"prompt": texts}))
    data = source(tmp_path / "a.parquet", shuffle=False, max_refused_share=1.0)
    assert [prompt.ref.row for prompt in data.one_epoch()] == [0, 1, 4]
    assert data.report().refused == {"unreadable row": 2}
    assert "'prompt' of row group 1 unpacks from" in data.report().first_refusals[0].reason


def test_good_data_in_a_row_group_that_is_not_unpacked_are_read_once_written_as_the_refusal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long system prompt before every question, stored without a dictionary, packs as well as a bomb does."""
    monkeypatch.setattr(parquet_rows, "UNPACKED_BYTES", MIB)
    words = " ".join(f"{n * n % 977:x}" for n in range(1000))
    path, smaller = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table = pa.table(
        {"prompt": [[{"role": "system", "content": words}, {"role": "user", "content": f"{n}?"}] for n in range(2000)]}
    )
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(RowRefusedError) as refused:
        RowStore(open_files([str(path)], []), ("prompt",), MIB).read(0)
    found = re.search(r"pq\.write_table\(pq\.read_table\(FILE\), NEW, row_group_size=(\d+)\)$", refused.value.reason)
    assert found is not None and "'prompt.list.element.content' of row group 0" in refused.value.reason
    pq.write_table(pq.read_table(path), smaller, row_group_size=int(found[1]), compression="zstd", use_dictionary=False)
    store = RowStore(open_files([str(smaller)], []), ("prompt",), MIB)
    assert [store.read(n)["prompt"] for n in (0, 1999)] == [table["prompt"][n].as_py() for n in (0, 1999)]


def test_a_value_over_the_limit_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "DECODED_BYTES", 1000)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [["a" * 400] * 3, ["a" * 400], None]}), path)
    store = RowStore(open_files([str(path)], []), ("prompt",), MIB)
    with pytest.raises(RowRefusedError, match=r"takes 1,2\d\d bytes; the limit of a row is"):
        store.read(0)
    assert [store.read(1), store.read(2)] == [{"prompt": ["a" * 400]}, {"prompt": None}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_text_of_more_characters_than_tokenizers_bear_is_refused_before_one_sees_it(
    tmp_path: Path, suffix: str
) -> None:
    long = "a" * (MIB + 1)
    rows = [
        {"prompt": long, "answer": "a"},
        {"prompt": "q", "answer": long},
        {"prompt": "q", "answer": "a", "note": long},
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in ("prompt", "answer", "note")}), path)
    options = {"extra_columns": ("note",)}
    data = source(path, options=options, shuffle=False, overlong_prompts="truncate", max_refused_share=1.0)
    assert [prompt.ref.row for prompt in data.one_epoch()] == [2]
    assert [r.reason for r in data.report().first_refusals] == [
        f"{column!r} has 1,048,577 characters, the limit is 1,048,576" for column in ("prompt", "answer")
    ]
    assert data.report().refused == {"text too long": 2}


KINDS = [
    (pa.string(), ["abc", "abc", None]),
    (pa.large_string(), ["abc", "abc", None]),
    (pa.string_view(), ["abc", "abc", None]),
    (pa.large_binary(), [b"abc", b"abc", None]),
    (pa.binary(3), [b"abc", b"abc", None]),
    (pa.dictionary(pa.int8(), pa.string()), ["abc", "abc", None]),
    (pa.dictionary(pa.int8(), pa.int64()), [7, 7, None]),
    (pa.list_(pa.struct({"role": pa.large_string(), "n": pa.null()})), [[{"role": "user", "n": None}] * 2, [], None]),
    (pa.map_(pa.string(), pa.string()), [[("a", "b")], [], None]),
    (pa.list_(pa.float32(), 2), [[1.0, 2.0], [1.0, 2.0], None]),
]


@pytest.mark.parametrize(("kind", "values"), KINDS, ids=[str(kind) for kind, _ in KINDS])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}], ids=["dictionary", "plain"])
def test_values_of_every_kind_are_what_was_written(
    tmp_path: Path, kind: pa.DataType, values: Sequence[Any], options: dict[str, Any]
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": pa.array(values, kind)}), path, **options)
    store = RowStore(open_files([str(path)], []), ("prompt",), MIB)
    assert [store.read(i)["prompt"] for i in (0, 1, 2)] == list(values)


def test_the_size_of_a_dictionary_is_read_from_its_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a" * 1000, "b" * 500] * 9}), path, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert dictionary_bytes(path, chunk) == 1000 + 500 + 2 * 4

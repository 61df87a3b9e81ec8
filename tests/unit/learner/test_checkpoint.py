"""The checkpoint directory: whole or not at all, in files of bounded size, refused when it is not what it should be."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.durable import (
    StorageError,
    append,
    atomic_directory,
    atomic_file,
    clear_leftovers,
    damage,
    sync_file,
)
from learner.engines import checkpoint
from learner.engines.checkpoint import CheckpointError, load_checkpoint, read_weights, save_checkpoint
from learner.engines.protocol import ReadTensor


class HeldState:
    """The part of a TrainEngine that a checkpoint needs, over tensors in memory."""

    rank, world_size = 0, 1

    def __init__(self, tensors: dict[str, Tensor], steps: int = 0) -> None:
        self.tensors, self.steps = tensors, steps

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()

    def state_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def load_state_tensors(self, read: ReadTensor, steps: int) -> None:
        self.tensors, self.steps = {name: read(name, value.shape) for name, value in self.tensors.items()}, steps

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def some_state() -> dict[str, Tensor]:
    return {f"param/{i}": torch.randn(3, i + 1) for i in range(5)}


@pytest.mark.parametrize("file_bytes", [1, 60, 2**30])
def test_what_is_saved_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    saved = HeldState(some_state(), steps=7)
    save_checkpoint(saved, tmp_path / "c")  # type: ignore[arg-type]
    state = torch.get_rng_state()
    torch.rand(5)
    loaded = HeldState({name: torch.empty_like(value) for name, value in saved.tensors.items()})
    load_checkpoint(loaded, tmp_path / "c")  # type: ignore[arg-type]
    assert loaded.steps == 7 and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(loaded.tensors[name], value) for name, value in saved.tensors.items())
    files = list((tmp_path / "c").glob("tensors-*"))
    # 12, 24, 36, 48 and 60 bytes: a file is full once it reaches its size
    assert len(files) == {1: 5, 60: 2, 2**30: 1}[file_bytes]


def test_half_precision_is_kept_in_full(tmp_path: Path):
    save_checkpoint(HeldState({"param/x": torch.ones(1, dtype=torch.bfloat16)}), tmp_path / "c")  # type: ignore[arg-type]
    loaded = HeldState({"param/x": torch.empty(1)})
    load_checkpoint(loaded, tmp_path / "c")  # type: ignore[arg-type]
    assert loaded.tensors["param/x"].dtype == torch.float32


def test_an_error_while_writing_leaves_the_former_checkpoint(tmp_path: Path):
    save_checkpoint(HeldState({"param/x": torch.ones(1)}, steps=1), tmp_path / "c")  # type: ignore[arg-type]

    class Dying(HeldState):
        def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
            yield "param/x", torch.zeros(1)
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        save_checkpoint(Dying({}, steps=2), tmp_path / "c")  # type: ignore[arg-type]
    loaded = HeldState({"param/x": torch.empty(1)})
    load_checkpoint(loaded, tmp_path / "c")  # type: ignore[arg-type]
    assert loaded.steps == 1 and loaded.tensors["param/x"].item() == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_an_error_while_taking_its_place_puts_the_former_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "d"
    target.mkdir()
    (target / "former").touch()
    rename = Path.rename

    def fail_for_partial(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OSError, match="no"), atomic_directory(target) as partial:
        (partial / "new").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and (target / "former").exists()


def test_a_new_directory_replaces_the_former_whole(tmp_path: Path):
    for name in ("a", "b"):
        with atomic_directory(tmp_path / "deep" / "d") as partial:
            (partial / name).touch()
            assert not (tmp_path / "deep" / "d" / name).exists()
    assert [p.name for p in (tmp_path / "deep" / "d").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["d"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    engine = HeldState({"param/x": torch.empty(1)})
    with pytest.raises(CheckpointError, match="is not a learner checkpoint"):
        load_checkpoint(engine, tmp_path / "nothing")  # type: ignore[arg-type]
    save_checkpoint(HeldState({"param/y": torch.ones(1)}), tmp_path / "c")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="has no param/x"):
        load_checkpoint(engine, tmp_path / "c")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"param/y of shape \(1,\), but the model's is \(2,\)"):
        load_checkpoint(HeldState({"param/y": torch.empty(2)}), tmp_path / "c")  # type: ignore[arg-type]
    path = tmp_path / "c" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        load_checkpoint(engine, tmp_path / "c")  # type: ignore[arg-type]
    path.write_text("{ half a file")
    with pytest.raises(CheckpointError, match="is not a learner checkpoint"):
        load_checkpoint(engine, tmp_path / "c")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["cut", "missing", "changed"])
@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "rng.safetensors", "state.json", "digests.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str):
    save_checkpoint(HeldState(some_state()), tmp_path / "c")  # type: ignore[arg-type]
    assert damage(tmp_path / "c") is None
    path = tmp_path / "c" / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if how == "cut" else content.replace(b"0", b"1"))
    assert name in (damage(tmp_path / "c") or "") or how == "changed"
    with pytest.raises(CheckpointError, match="damaged"):
        list(read_weights(tmp_path / "c"))


def test_a_file_that_the_system_refuses_to_write_is_said_and_the_former_checkpoint_stays(tmp_path: Path):
    """A limit on the size of files is a real error of the system, like a full disk."""
    save_checkpoint(HeldState({"param/x": torch.ones(1)}, steps=1), tmp_path / "c")  # type: ignore[arg-type]
    state = HeldState({f"param/{i}": torch.ones(100_000) for i in range(3)}, steps=2)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    try:
        with pytest.raises(StorageError, match=r"c.* cannot be written: File too large .*GiB free"):
            save_checkpoint(state, tmp_path / "c")  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and damage(tmp_path / "c") is None


@pytest.fixture
def no_folder_sync(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """A file system that syncs files and answers an error where a folder is to be. What was synced, in order."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if os.path.isdir(synced[-1]):
            raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


@pytest.mark.parametrize(
    "no_folder_sync", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], indirect=True, ids=errno.errorcode.get
)
def test_where_folders_cannot_be_synced_everything_is_saved_all_the_same(tmp_path: Path, no_folder_sync: list[str]):
    save_checkpoint(HeldState(some_state()), tmp_path / "c")  # type: ignore[arg-type]
    assert damage(tmp_path / "c") is None
    atomic_file(tmp_path / "f", "content")
    append(tmp_path / "f", "s")
    sync_file(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "contents"
    assert no_folder_sync[-2:] == [str(tmp_path / "f"), str(tmp_path)]


@pytest.mark.parametrize("no_folder_sync", [errno.EIO], indirect=True)
def test_a_folder_that_is_damaged_is_an_error(tmp_path: Path, no_folder_sync: list[str]):
    with pytest.raises(StorageError, match="Input/output error"):
        atomic_file(tmp_path / "f", "content")


def test_a_file_that_cannot_be_synced_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "f").write_text("former")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no"):
        atomic_file(tmp_path / "f", "content")
    assert (tmp_path / "f").read_text() == "former" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("no_folder_sync", [errno.EINVAL], indirect=True)
def test_folders_that_are_new_are_synced_from_where_they_are_named(tmp_path: Path, no_folder_sync: list[str]):
    with atomic_directory(tmp_path / "a/b/c"):
        pass
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} < set(no_folder_sync)


def test_where_nothing_can_be_put_back_the_first_error_is_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(HeldState({"param/x": torch.ones(1)}, steps=1), tmp_path / "c")  # type: ignore[arg-type]
    rename, refused = Path.rename, iter((errno.EIO, errno.EROFS))

    def fail(self: Path, to: Path) -> Path:
        if to.name == "c":
            raise OSError(number := next(refused), os.strerror(number))
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            save_checkpoint(HeldState({"param/x": torch.zeros(1)}, steps=2), tmp_path / "c")  # type: ignore[arg-type]
    clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and damage(tmp_path / "c") is None


def test_a_leftover_that_cannot_be_removed_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As with NFS, where a file that somebody reads stays under another name."""
    for name in (".c.partial-01234567", ".d.former-01234567"):
        (tmp_path / name).mkdir()
    (tmp_path / ".f.partial-01234567").touch()

    def busy(path: Any, **options: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    for name in ("rmdir", "unlink"):
        monkeypatch.setattr(os, name, busy)
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.partial-01234567", ".f.partial-01234567", "d"]


def test_what_cannot_be_cut_back_hides_no_error(tmp_path: Path):
    """A device that is always full, and cannot be cut."""
    with pytest.raises(StorageError, match="/dev/full cannot be written: No space left on device"):
        append(Path("/dev/full"), "content")


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path):
    state = HeldState({"param/x": torch.ones(1)})
    state.state_bytes = lambda: 2**60  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=r"needs 1073741824.00 GiB, and .* free"):
        save_checkpoint(state, tmp_path / "c")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_or_put_back(tmp_path: Path):
    for name in (".a.partial-0123abcd", ".a.former-0123abcd", ".b.former-0123abcd", "a"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

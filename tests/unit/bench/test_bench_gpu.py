"""bench.gpu: its parts exist and run, and whatever becomes of one is reported as that."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_parts.common import Setting
from bench.gpu_parts.flex import groups_of

SMALL = Setting("cpu", small=True)


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_part_has_a_module_that_runs_it(part: gpu.GpuPart) -> None:
    assert callable(importlib.import_module(f"bench.gpu_parts.{part.name}").run)


def test_the_parts_that_come_first_fit_fifteen_minutes_with_the_start_of_a_machine() -> None:
    assert [part.name for part in gpu.PARTS[:4]] == ["flex", "step", "head", "gap"]
    assert sum(part.seconds for part in gpu.PARTS[:4]) <= 10 * 60


def test_a_part_is_written_as_json_and_decides_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_apart", lambda part, setting: gpu.run_here(part.name, setting))
    given = ["--device", "cpu", "--small", "--part", "head", "--json", str(tmp_path)]
    assert gpu.main(given) == 0
    written = json.loads((tmp_path / "head.json").read_text())
    assert written["status"] == "ok" and all(written["checks"].values())
    assert written["errors"]["chunked"]["logprobs"] < 1e-5
    assert written["machine"]["torch"] and written["small"]

    monkeypatch.setattr("bench.gpu_parts.head._near", lambda errors, kind: False)
    assert gpu.main(given) == 1
    assert json.loads((tmp_path / "head.json").read_text())["status"] == "wrong"


def test_a_part_without_its_packages_is_skipped_and_says_which() -> None:
    part = replace(gpu.PARTS[0], needs=("no_such_package",))
    assert gpu.run_apart(part, SMALL) == {
        "part": "flex",
        "status": "skipped",
        "reason": "not installed: no_such_package",
    }


def test_a_part_that_raises_has_failed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("bench.gpu_parts.head.run", broken)
    result = gpu.run_here("head", SMALL)
    assert result == {"part": "head", "status": "failed", "reason": "RuntimeError: no such kernel"}
    assert gpu.brief(result) == "head     failed: RuntimeError: no such kernel"


@pytest.mark.parametrize("length", [1, 700, 2048, 9000, 16_384])
def test_groups_fill_the_row_exactly(length: int) -> None:
    assert sum(prompt + sum(completions) for prompt, completions in groups_of(length)) == length

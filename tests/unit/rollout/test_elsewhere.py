"""Addresses and names of a hub in place of paths: what is said, in one line, tells how to get the data here."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.data.elsewhere import address_problem, not_here
from rollout.data.rows import open_files
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.opening import open_run
from tests.unit.saccade.test_config import MINIMAL
from vlm.errors import AdapterError
from vlm.families.registry import load_adapter

FETCH = "download it with `hf download BytedTsinghua-SIA/DAPO-Math-17k --repo-type dataset --local-dir DAPO-Math-17k`"
ADDRESSES = {
    "s3://bucket/train.parquet": "this is a URL (s3), and only files on this machine can be used; download or mount it",
    "gs://bucket/*.parquet": "this is a URL (gs), and only files on this machine",
    "https://example.com/train.jsonl": "this is a URL (https), and only files on this machine",
    "https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k/resolve/main/data/train.parquet": FETCH,
    "hf://datasets/BytedTsinghua-SIA/DAPO-Math-17k@main/data/*.parquet": FETCH,
    "hf://datasets/BytedTsinghua-SIA/DAPO-Math-17k": FETCH,
    "BytedTsinghua-SIA/DAPO-Math-17k": FETCH,
    "lmms-lab/OneVision-1.5": "download it with `hf download lmms-lab/OneVision-1.5 --repo-type dataset",
    "file:///data/train.parquet": "by their path; remove file://",
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_data_that_are_elsewhere_are_told_how_to_get_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problems: list[str] = []
    assert open_files([name], problems) == []
    (problem,) = problems
    assert problem.startswith(f"{name}: no such file; ") and "\n" not in problem
    assert ADDRESSES[name] in problem and " this machine" in problem


def test_paths_that_lead_nowhere_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("gone.parquet", "data/gone", "gone/train.parquet", "/gone/train", "./gone/train", "../gone", "a/b/c"):
        assert not_here(name) == address_problem(name) == "", name


def test_folders_of_a_run_are_no_addresses_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path, the address of a bucket would be made a folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="give a folder on this machine or a name on the Hugging Face hub"):
        load_adapter("s3://bucket/model")
    tree = {**MINIMAL, "output_dir": "s3://bucket/run", "model": {"path": "gs://bucket/model"}}
    tree["data"] = {"train": ["s3://bucket/train.parquet"], "media_from": "gs://bucket/images"}
    with pytest.raises(ConfigError) as caught:
        open_run(parse_config(tree), resume=False, address=None, display=None).__enter__()
    text = str(caught.value)
    for said in (
        "output_dir=s3://bucket/run: this is a URL",
        "data.media_from: no folder gs://bucket/images; this is a URL",
        "s3://bucket/train.parquet: no such file; this is a URL",
        "no usable model at 'gs://bucket/model'",
    ):
        assert said in text
    assert not list(tmp_path.iterdir())

"""The runtime environment with which a run joins Ray."""

from __future__ import annotations

from typing import Any

import pytest

from saccade.config.load import parse_config
from saccade.fleet import connect


@pytest.mark.parametrize(("folders", "hooked"), [([], False), (["/home/me"], True)])
def test_workers_run_our_hook_only_where_a_folder_hides_a_package_of_ours(
    monkeypatch: pytest.MonkeyPatch, folders: list[str], hooked: bool
) -> None:
    """The hook is imported before Ray knows the driver's path, so in a bare clone it would end every worker."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(connect, "hiding", lambda: folders)
    monkeypatch.setattr(connect.ray, "init", lambda **options: given.update(options))
    tree = {"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["t.parquet"]}}
    connect._init(parse_config(tree), "ray://head:1")
    assert given["runtime_env"].get(connect.HOOK_KEY) == (connect.HOOK if hooked else None)

"""The files that take longest come first, so that two processes end at about the same time."""

from __future__ import annotations

import pytest

LONGEST = ("test_end_to_end.py", "test_learner_ranks.py", "test_weight_sync_e2e.py", "test_ray_job.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))

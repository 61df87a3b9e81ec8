"""What a rank keeps between two calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from learner.worker import Fetched, LearnerWorker


def test_a_batch_that_was_trained_is_not_kept():
    worker: Any = LearnerWorker.__new__(LearnerWorker)
    worker._fetched = Fetched(("group",), {"digest": b"png"}, 2.0)  # type: ignore[arg-type]
    worker._updater = SimpleNamespace(update=lambda share, version, timer: (share.groups, share.media, timer.seconds))
    groups, media, seconds = worker.update([(0.5,)], [0], 3)
    assert (groups, media, seconds["fetch"]) == (("group",), {"digest": b"png"}, 2.0)
    assert (worker._fetched.groups, worker._fetched.media) == ((), {})

"""The ledger: exactly once, whatever the order of events."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.types import PromptRef
from saccade.pipeline.ledger import Ledger, LedgerError


def ref(row: int, epoch: int = 0) -> PromptRef:
    return PromptRef(f"train.parquet:{row}", epoch, 0, row)


def test_a_group_is_trained_once_and_only_if_issued():
    ledger = Ledger()
    with pytest.raises(LedgerError, match="never issued"):
        ledger.train([ref(1)])
    ledger.issue(ref(1), batch=0)
    with pytest.raises(LedgerError, match="already outstanding for batch 0"):
        ledger.issue(ref(1), batch=1)
    ledger.issue(ref(1, epoch=1), batch=1)  # another epoch is another unit of work
    ledger.train([ref(1)])
    with pytest.raises(LedgerError):
        ledger.drop(ref(1), "late")
    assert ledger.trained == 1
    assert ledger.outstanding() == [(1, ref(1, epoch=1))]


def test_retry_keeps_identity_and_batch():
    ledger = Ledger()
    ledger.issue(ref(3), batch=7)
    again = ledger.retry(ref(3))
    assert (again.uid, again.epoch, again.attempt) == ("train.parquet:3", 0, 1)
    assert ledger.outstanding() == [(7, again)]
    ledger.train([ref(3)])  # an older attempt's reference names the same unit
    assert ledger.outstanding() == []


@given(st.lists(st.tuples(st.sampled_from(["issue", "train", "drop", "retry"]), st.integers(0, 5)), max_size=40))
def test_nothing_is_lost_or_counted_twice(events):
    ledger, issued, done = Ledger(), Counter(), 0
    live: set[int] = set()
    for action, row in events:
        if action == "issue" and row not in live:
            ledger.issue(ref(row), 0)
            live.add(row)
            issued[row] += 1
        elif action != "issue" and row in live:
            if action == "train":
                ledger.train([ref(row)])
            elif action == "drop":
                ledger.drop(ref(row), "why")
            else:
                ledger.retry(ref(row))
            if action != "retry":
                live.discard(row)
                done += 1
        ledger = Ledger.from_state(json.loads(json.dumps(ledger.state())))  # any moment can be a checkpoint
        assert {r.row for _, r in ledger.outstanding()} == live
        assert ledger.trained + sum(ledger.dropped.values()) == done == sum(issued.values()) - len(live)

"""The ledger: exactly once, whatever the order of events."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.types import PromptRef, StoredPrompt
from saccade.pipeline.groups import DropReason, Group, GroupBuffer, LedgerError, State


def prompt(row: int, epoch: int = 0) -> StoredPrompt:
    return StoredPrompt(PromptRef(f"train.parquet:{row}", epoch, 0, row), None)


def restore(groups: GroupBuffer, saved: GroupBuffer) -> None:
    """What was saved of `saved` becomes `groups`."""
    state = json.loads(json.dumps(saved.state()))
    refs = [PromptRef(**entry["ref"]) for entry in state["outstanding"]]
    groups.load_state(state, 0, [StoredPrompt(ref, None) for ref in refs])


def sealed(groups: GroupBuffer, batch: int, *issued: StoredPrompt) -> list[Group]:
    entered = groups.issue(batch, issued)
    for group in entered:
        groups.score(group)
    groups.seal(batch, entered)
    return entered


def test_a_group_is_trained_once_and_only_if_issued():
    groups, one, again = GroupBuffer(), prompt(1), prompt(1, epoch=1)
    with pytest.raises(LedgerError, match="never issued"):
        groups.train(one.ref)
    (group,) = sealed(groups, 0, one)
    with pytest.raises(LedgerError, match="already outstanding for batch 0"):
        groups.issue(1, [one])
    groups.issue(1, [again])  # another epoch is another unit of work
    groups.train(one.ref)
    with pytest.raises(LedgerError):
        groups.drop(one.ref, DropReason.STALE)
    assert (groups.trained, group.state, group.step) == (1, State.TRAINED, 0)
    assert groups.outstanding() == [(1, again.ref)]


def test_transitions_that_the_picture_does_not_have_are_refused():
    groups = GroupBuffer()
    (group,) = groups.issue(0, [prompt(3)])
    for refused in (lambda: groups.train(group.ref), lambda: groups.seal(0, [group])):
        with pytest.raises(LedgerError, match="is issued, where it should be"):
            refused()
    groups.score(group)
    for refused in (lambda: groups.retry(group), lambda: groups.score(group), lambda: groups.train(group.ref)):
        with pytest.raises(LedgerError, match="is scored, where it should be"):
            refused()


def test_retry_keeps_identity_and_batch():
    groups = GroupBuffer()
    (group,) = groups.issue(7, [prompt(3)])
    groups.retry(group)
    assert (group.ref.uid, group.ref.epoch, group.ref.attempt) == ("train.parquet:3", 0, 1)
    assert groups.outstanding() == [(7, group.ref)]
    groups.score(group)
    groups.seal(9, [group])
    groups.train(prompt(3).ref)  # an older attempt's reference names the same unit
    assert groups.outstanding() == []


def test_a_batch_is_read_in_the_order_of_its_places_and_resumed_without_gaps():
    groups = GroupBuffer()
    groups.issue(0, [prompt(1), prompt(2), prompt(3)])
    groups.issue(1, [prompt(4)])
    with pytest.raises(LedgerError, match=r"place 0 of batch 0 belongs to train.parquet:1"):
        groups.issue(0, [prompt(5)], [0])
    groups.drop(prompt(1).ref, DropReason.NO_SIGNAL)
    groups.issue(0, [prompt(5)], [0])
    assert [group.ref.row for group in groups.of(0)] == [5, 2, 3]
    groups.drop(prompt(2).ref, DropReason.NO_SIGNAL)
    again = GroupBuffer()
    restore(again, groups)
    assert [(g.ref.row, g.slot) for g in again.of(0)] == [(3, 0), (5, 1)] and again.dropped == {
        (DropReason.NO_SIGNAL, ""): 2
    }


ACTIONS = ("issue", "retry", "score", "seal and train", "drop", "resume")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=40))
def test_nothing_is_lost_or_counted_twice(events):
    groups, issued, done = GroupBuffer(), Counter(), 0
    live: dict[int, Group] = {}
    for action, row in events:
        if action == "issue" and row not in live:
            live[row] = groups.issue(row, [prompt(row)])[0]
            issued[row] += 1
        elif action == "resume":  # any moment can be a checkpoint
            restore(groups, groups)
            live = {r: groups.of(r)[0] for r in live}
        elif row in live:
            group = live[row]
            if action == "drop":
                groups.drop(group.ref, DropReason.FAILED, "why")
            elif action == "retry" and group.state is State.ISSUED:
                groups.retry(group)
            elif action == "score" and group.state is State.ISSUED:
                groups.score(group)
            elif action == "seal and train" and group.state is State.SCORED:
                groups.seal(row, [group])
                groups.train(group.ref)
            if group.state in (State.DROPPED, State.TRAINED):
                del live[row]
                done += 1
        assert {r.row for _, r in groups.outstanding()} == set(live)
        assert groups.trained + sum(groups.dropped.values()) == done == sum(issued.values()) - len(live)

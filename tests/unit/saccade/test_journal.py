"""The journal says what was trained, whatever ended the run in between."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from saccade.observe.journal import JOURNAL, Journal, read_journal, trained


def test_what_was_trained_after_the_step_at_which_a_run_begins_anew_is_void(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add("begin", step=0)
    for step, uids in ((1, "ab"), (2, "cd"), (3, "ef")):
        for uid in uids:
            journal.add("group", state="trained", uid=uid, epoch=0, step=step, detail="")
    journal.add("group", state="dropped", uid="x", epoch=0, step=None, detail="too long")
    journal.write()
    assert trained(tmp_path) == Counter([(uid, 0) for uid in "abcdef"])
    again = Journal(tmp_path)
    again.add("begin", step=2)
    again.add("group", state="trained", uid="f", epoch=0, step=3, detail="")
    again.add("group", state="trained", uid="a", epoch=1, step=4, detail="")
    again.write()
    expected = Counter([("a", 0), ("b", 0), ("c", 0), ("d", 0), ("f", 0), ("a", 1)])
    assert trained(tmp_path) == expected
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"kind": "gro')
    assert trained(tmp_path) == expected and len(read_journal(tmp_path)) == 11


def test_entries_wait_for_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "full")
    journal.add("begin", step=0)
    journal.write()
    (tmp_path / "full").mkdir()
    journal.add("fleet", text="rollout-0 serves")
    journal.write()
    assert [entry["kind"] for entry in read_journal(tmp_path / "full")] == ["begin", "fleet"]

"""Whatever dies whenever: each prompt that was handed out is trained once, or is in the ledger. In milliseconds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.fleet.pool import EnginePool, Member, MemberState, Pool
from saccade.pipeline.groups import DropReason
from tests.helpers.fake_fleet import ActorLost, Driven, FakeData, FakeEngine, FakeRewards, make_pipeline

MOST_KILLS = 7
"""Engines and reward actors that are killed. With four for each group, a batch could be quarantined altogether, which
ends the run."""
ACTIONS = (
    *("release", "release", "release", "step", "step", "kill engine", "revive engine", "kill rewards", "kill data"),
    *("lose contents", "recover"),
)


class Fleet:
    """A pipeline with two engines, two reward actors and a data actor that die and come back as told. The test is the
    loop of `saccade/loop.py`: it trains what is sealed."""

    def __init__(self, windowed: bool, staleness: int) -> None:
        self.windowed, self.staleness = windowed, staleness
        self.trained: list[tuple[int, tuple[str, int]]] = []
        """Step, uid and epoch of what is in the weights."""
        self.version, self.kills, self.saved = 0, 0, None
        self.pipeline = make_pipeline(windowed=windowed, staleness=staleness)
        self.engines = [FakeEngine(name=f"rollout-{i}") for i in range(2)]
        self.rewards = [FakeRewards(held=range(10_000), name=f"reward-{i}") for i in range(2)]
        dispatcher = self.pipeline.dispatcher
        dispatcher.pool, dispatcher.rewards = EnginePool(self.engines, by_load=windowed), Pool(self.rewards)
        dispatcher.pool.on_loss = lambda member, how: None
        dispatcher.rewards.on_loss = self._revive_rewards
        self.pipeline.prompts.data.on_loss = self._revive_data
        dispatcher.read = self.pipeline.prompts.read
        self.driven = Driven(self.pipeline)
        self.save()
        self.driven.admit(0)

    # ------------------------------------------------------------------ what happens

    def waiting(self) -> list[tuple[FakeRewards, int]]:
        return [(rewards, row) for rewards in self.rewards for row in sorted(rewards.waiting)]

    def do(self, action: str, pick: int) -> None:
        """Let one thing happen; `pick` chooses whom."""
        pool = self.pipeline.dispatcher.pool
        if action == "release" and (waiting := self.waiting()):
            rewards, row = waiting[pick % len(waiting)]
            rewards.release(row)
        elif action == "kill engine" and self.kills < MOST_KILLS and (serving := list(pool.serving)):
            self.kills += 1
            self._kill_engine(serving[pick % len(serving)])
        elif action == "revive engine":
            for member in pool.members:
                if member.state is MemberState.DEAD:
                    engine = FakeEngine(name=member.name, version=self.version)
                    pool.put(Member(member.place, engine, MemberState.SERVING))
        elif action == "kill rewards" and self.kills < MOST_KILLS:
            self.kills += 1
            self._kill_rewards(self.rewards[pick % 2])
        elif action == "kill data":
            self.pipeline.prompts.data.actors[0].kill()
        elif action == "recover" and self.saved is not None:
            self._recover()
        self.driven.settle()
        if action in ("step", "lose contents"):
            self._step(lose=pick if action == "lose contents" else None)

    def _kill_engine(self, member: Member) -> None:
        member.actor.kill()
        sent = {g.ref.row: g.sent for g in self.pipeline.groups.all() if g.sent is not None}
        for rewards, row in self.waiting():
            if row in sent and sent[row].member is member:
                rewards.waiting.pop(row)[0].set_exception(ActorLost(member.actor.id))

    def _kill_rewards(self, rewards: FakeRewards) -> None:
        rewards.kill()
        for row in list(rewards.waiting):
            rewards.waiting.pop(row)[0].set_exception(ActorLost(rewards.id))

    def _revive_rewards(self, member: Member, how: str) -> None:
        fresh = FakeRewards(held=range(10_000), name=member.name)
        self.rewards[member.place] = fresh
        self.pipeline.dispatcher.rewards.put(Member(member.place, fresh, MemberState.SERVING))

    def _revive_data(self, member: Member, how: str) -> None:
        cursor = self.pipeline.prompts.cursor
        fresh = FakeData(0 if cursor is None else cursor["row"])
        self.pipeline.prompts.data.put(Member(0, fresh, MemberState.SERVING))

    def _step(self, lose: int | None) -> None:
        try:
            batch = self.driven.batch(self.version, 0.001)
        except TimeoutError:
            return
        if lose is not None:
            lost = batch.summaries[lose % len(batch.summaries)].ref
            self.driven.run(self.pipeline.give_back(batch, [lost]))
            self.driven.settle()
            return
        self.pipeline.book(batch, ())
        self.trained += [(self.version, (s.ref.uid, s.ref.epoch)) for s in batch.summaries]
        assert all(0 <= self.version - s.oldest_version <= self.staleness for s in batch.summaries)
        self.version += 1
        for member in self.pipeline.dispatcher.pool.serving:
            member.actor.commit(self.version)
        if self.version % 2 == 0:
            self.save()
        self.driven.admit(self.version)

    def save(self) -> None:
        self.saved = json.dumps({"version": self.version, **self.driven.state()})

    def _recover(self) -> None:
        """What `Run.recover` does: the loops end, and the newest checkpoint is read."""
        state = json.loads(self.saved)  # type: ignore[arg-type]
        self.driven.end()
        self.version = state["version"]
        self.trained = [(step, prompt) for step, prompt in self.trained if step < self.version]
        for rewards in self.rewards:
            rewards.waiting.clear()
        for member in self.pipeline.dispatcher.pool.serving:
            member.actor.commit(self.version)
        self.driven.run(self.pipeline.load_state(state, self.version))
        self.driven.begin()
        self.driven.admit(self.version)

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        counted = Counter(prompt for _, prompt in self.trained)
        assert not counted or max(counted.values()) == 1
        ledger = self.pipeline.groups
        assert ledger.trained == len(self.trained)
        open_ = {(ref.uid, ref.epoch) for _, ref in ledger.outstanding()}
        apart = set(ledger.quarantined)
        assert not open_ & set(counted) and not apart & (open_ | set(counted))
        cursor = self.pipeline.prompts.cursor
        handed_out = {(f"d:{row}", 0) for row in range(0 if cursor is None else cursor["row"])}
        assert set(counted) | open_ | apart == handed_out
        assert {reason for reason, _ in ledger.dropped} <= {DropReason.STALE, DropReason.LOST}

    def finish(self) -> None:
        """Everything that is awaited comes, and the run goes on."""
        before = self.version
        for _ in range(8):
            self.do("revive engine", 0)
            while self.waiting():
                self.do("release", 0)
            self.do("step", 0)
        assert self.version > before + 4, "it goes on"
        self.check()


@pytest.mark.parametrize(("windowed", "staleness"), [(False, 0), (False, 2), (True, 1), (True, 3)])
@settings(max_examples=30, deadline=None)
@given(events=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), max_size=40))
def test_every_prompt_is_trained_once_or_in_the_ledger(windowed: bool, staleness: int, events: list[Any]) -> None:
    fleet = Fleet(windowed, staleness)
    try:
        for action, pick in events:
            fleet.do(action, pick)
            fleet.check()
        fleet.finish()
    finally:
        fleet.driven.close()

"""Each send is exactly one pass over the source, whatever fails and whenever: the other learner ranks make one too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.weight_engines import ThreadEngine, fail
from weight_sync import gloo
from weight_sync import sender as sender_module
from weight_sync.protocols import ParamMeta
from weight_sync.sender import WeightSender
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightReport, WeightSyncError

NAMES = ("a", "b", "c", "d", "e")
NBYTES = 16
"""Of each tensor: four float32."""


class CountingSource:
    """Five tensors, and a note of every gather: the name for each one, "end" where a pass is complete."""

    def __init__(self) -> None:
        self.gathered: list[str] = []

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, torch.float32, (4,)) for name in NAMES]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in NAMES:
            self.gathered.append(name)
            yield name, torch.full((4,), float(ord(name)))
        self.gathered.append("end")


ONE_PASS = [*NAMES, "end"]


def make_sender(source: CountingSource, rank: int = 0) -> WeightSender:
    return WeightSender(source, backend="gloo", rank=rank, bucket_bytes=NBYTES, timeout=2.0)


def test_a_send_is_one_pass_on_every_rank() -> None:
    for rank in (0, 1):
        source = CountingSource()
        sender = make_sender(source, rank)
        sender.form_group([ThreadEngine("x")])
        for sends in (1, 2):
            sender.send()
            assert source.gathered == ONE_PASS * sends


@pytest.mark.parametrize("bucket", range(len(NAMES)))
def test_an_engine_that_dies_at_any_bucket(bucket: int) -> None:
    """The survivor may hear of it first. Only the dead one is named, and the survivor takes part in the next send."""
    source = CountingSource()
    sender = make_sender(source)
    survivor, dead = ThreadEngine("survivor"), ThreadEngine("dead", dies_at=bucket)
    sender.form_group([survivor, dead])
    with pytest.raises(WeightSyncError, match="receiving the weights: dead: RuntimeError: out of order") as caught:
        sender.send()
    assert caught.value.engines == ("dead",)
    assert source.gathered == ONE_PASS
    sender.form_group([survivor])
    report = sender.send()
    assert report is not None and report.received["survivor"].digests == report.sent
    assert source.gathered == ONE_PASS * 2


def wrong_name(source: CountingSource, engine: ThreadEngine) -> None:
    source.metadata = lambda: [ParamMeta(name.upper(), torch.float32, (4,)) for name in NAMES]  # type: ignore[method-assign]


def too_few(source: CountingSource, engine: ThreadEngine) -> None:
    source.metadata = lambda: [ParamMeta(name, torch.float32, (4,)) for name in NAMES[:3]]  # type: ignore[method-assign]


def ill(source: CountingSource, engine: ThreadEngine) -> None:
    engine.faults["health"] = fail


def unwilling(source: CountingSource, engine: ThreadEngine) -> None:
    engine.faults["receive"] = fail


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (ill, "at x while checking its health before the transfer"),
        (unwilling, "at x while receiving the weights"),
        (wrong_name, "declared .*'A'.* but yielded a"),
        (too_few, "more tensors than it declared"),
    ],
)
def test_other_failures(spoil: Callable[[CountingSource, ThreadEngine], None], message: str) -> None:
    source, engine = CountingSource(), ThreadEngine("x")
    sender = make_sender(source)
    sender.form_group([engine])
    spoil(source, engine)
    with pytest.raises((WeightSyncError, ValueError), match=message):
        sender.send()
    assert source.gathered == ONE_PASS
    with pytest.raises(WeightSyncError, match="no weight-transfer group"):
        sender.send()
    assert source.gathered == ONE_PASS * 2


def test_a_group_that_is_not_formed_leaves_the_ranks_aligned() -> None:
    """Rank 0 fails to form it, the other rank does not know: the next send is a pass on both."""
    sources = [CountingSource(), CountingSource()]
    senders = [make_sender(source, rank) for rank, source in enumerate(sources)]
    living, dead = ThreadEngine("living"), ThreadEngine("dead", {"health": fail, "init": fail})
    with pytest.raises(WeightSyncError, match="at dead while checking its health before joining"):
        senders[0].form_group([living, dead])
    senders[1].form_group([living, dead])
    with pytest.raises(WeightSyncError, match="no weight-transfer group"):
        senders[0].send()
    assert senders[1].send() is None
    for sender in senders:
        sender.form_group([living])
    report = senders[0].send()
    assert report is not None and list(report.received) == ["living"]
    assert senders[1].send() is None
    assert [source.gathered for source in sources] == [ONE_PASS * 2] * 2
    assert living.ranks == [1]


def test_other_ranks_hold_no_engine() -> None:
    """So that the actor of an engine that was dropped can end."""
    sender = make_sender(CountingSource(), rank=1)
    sender.form_group([ThreadEngine("x", {"init": fail, "health": fail})])
    assert sender._client is None and sender._transport is None


def test_an_engine_that_dies_while_joining_is_named_alone() -> None:
    source = CountingSource()
    living, dying = ThreadEngine("living"), ThreadEngine("dying")

    def die() -> None:
        dying.faults["health"] = fail
        fail()

    dying.faults["init"] = die
    sender = make_sender(source)
    with pytest.raises(WeightSyncError, match="joining the transfer group") as caught:
        sender.form_group([living, dying])
    assert caught.value.engines == ("dying",)
    sender.form_group([living])
    sync_weights(SimpleLearner(sender), [living], 3, timeout=5.0)
    assert living.held_version == 3 and source.gathered == ONE_PASS


def test_an_engine_that_hangs_is_named_alone() -> None:
    release = threading.Event()
    living, hung = ThreadEngine("living"), ThreadEngine("hung")
    sender = make_sender(CountingSource())
    sender.form_group([living, hung])
    hung.faults["receive"] = release.wait
    with pytest.raises(WeightSyncError, match="no answer to a health check within 2 s") as caught:
        sender.send()
    assert caught.value.engines == ("hung",)
    release.set()


class SimpleLearner:
    def __init__(self, sender: WeightSender) -> None:
        self.send_weights = sender.send
        self.form_weight_group = sender.form_group


def test_gathering_hashing_and_sending_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the parts move on: a gather by 1 s, a digest by 10 s, the transport by 100 s a tensor."""
    now = [0.0]

    def moves(seconds: float, act: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*given: Any) -> Any:
            now[0] += seconds
            return act(*given)

        return moved

    monkeypatch.setattr(sender_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sender_module, "hash_words", moves(10.0, sender_module.hash_words))
    source = CountingSource()
    source.gathered = SimpleNamespace(append=moves(1.0, lambda name: None))  # type: ignore[assignment]
    monkeypatch.setattr(gloo, "view_in", moves(100.0, gloo.view_in))
    sender = make_sender(source)
    engine = ThreadEngine("x")
    sender.form_group([engine])
    monkeypatch.setattr(engine, "_receive", lambda info: WeightReport({}))
    monkeypatch.setattr(gloo, "broadcast", lambda group, buffer: None)
    monkeypatch.setattr(gloo, "finish", lambda work: None)
    report = sender.send()
    assert report is not None
    times = (report.gather_seconds, report.verify_seconds, report.transfer_seconds)
    assert times == (6.0, 50.0, 500.0)  # five tensors, and the end of the pass

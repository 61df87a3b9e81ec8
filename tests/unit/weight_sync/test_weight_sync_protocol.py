"""The protocol over fakes that fail in each phase, and the gloo transport between threads. No vLLM, no Ray."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.weight_engines import FakeEngine, LocalLearner, ThreadEngine, fail
from weight_sync import sync
from weight_sync.client import WeightSyncClient, await_all
from weight_sync.protocols import EngineHandle, SyncTimes, TransferReport
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightMismatchError, WeightReport, WeightSyncError

DOING = {"pause": "pausing", "commit": "committing the version", "resume": "resuming"}


class FakeLearner:
    def __init__(self, journal: list[str], received: Mapping[str, WeightReport]) -> None:
        self.journal, self.received = journal, received

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.journal.append("learner.form")

    def send_weights(self) -> TransferReport:
        self.journal.append("learner.send")
        return TransferReport({"w": "1"}, self.received)


def good(*names: str) -> dict[str, WeightReport]:
    return {name: WeightReport({"w": "1"}) for name in names}


def test_order_of_the_phases() -> None:
    journal: list[str] = []
    engines = [FakeEngine("a", journal), FakeEngine("b", journal)]
    sync_weights(FakeLearner(journal, good("a", "b")), engines, 7, timeout=5.0)
    stage = {"pause": 0, "send": 1, "commit": 2, "resume": 3}
    assert [stage[entry.split(".")[1]] for entry in journal] == [0, 0, 1, 2, 2, 3, 3]
    assert [e.held_version for e in engines] == [7, 7] and not any(e.paused for e in engines)


def test_times_of_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pausing begins at 10, the weights are sent at 13, compared at 13.5; all have resumed at 15."""
    clock = iter((10.0, 13.0, 13.5, 15.0))
    monkeypatch.setattr(sync, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    received = {
        "a": WeightReport({"w": "1"}, load_seconds=0.75, verify_seconds=1.0),
        "b": WeightReport({"w": "1"}, load_seconds=0.5, verify_seconds=2.0),
    }
    learner = FakeLearner([], received)
    report = TransferReport({"w": "1"}, received, gather_seconds=0.25, transfer_seconds=1.5, verify_seconds=0.125)
    learner.send_weights = lambda: report  # type: ignore[method-assign]
    times = sync_weights(learner, [FakeEngine("a", []), FakeEngine("b", [])], 7, timeout=5.0)
    assert times == SyncTimes(pause=5.0, gather=0.25, transfer=1.5, load=0.75, verify=0.125 + 2.0 + 0.5)


@pytest.mark.parametrize("phase", ["pause", "commit", "resume"])
def test_a_failing_engine_is_named_with_its_phase_and_stays_paused(phase: str) -> None:
    journal: list[str] = []
    engines = [FakeEngine("a", journal), FakeEngine("b", journal, {phase: fail})]
    with pytest.raises(
        WeightSyncError, match=f"failed at b while {DOING[phase]}: b: RuntimeError: out of order"
    ) as caught:
        sync_weights(FakeLearner(journal, good("a", "b")), engines, 7, timeout=5.0)
    assert caught.value.phase == DOING[phase] and caught.value.engines == ("b",)
    assert engines[1].paused or phase == "pause"
    assert "b.resume" not in journal


@pytest.mark.parametrize("phase", ["pause", "commit", "resume"])
def test_a_hanging_engine_is_named_after_the_deadline(phase: str) -> None:
    journal: list[str] = []
    release = threading.Event()
    engines = [FakeEngine("a", journal), FakeEngine("b", journal, {phase: release.wait})]
    with pytest.raises(WeightSyncError, match=r"no answer within 0\.2 s") as caught:
        sync_weights(FakeLearner(journal, good("a", "b")), engines, 7, timeout=0.2)
    assert caught.value.engines == ("b",)
    release.set()


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (WeightReport({"w": "2"}), r"w \(sent 1, received 2\)"),
        (WeightReport({}), "1 never arrived: w"),
        (WeightReport({"w": "1", "x": "1"}), "1 never sent: x"),
        (WeightReport({"w": "1"}, unconsumed=("w",)), "no parameter of the engine took"),
        (WeightReport({"w": "1"}, uncovered=("head (0 of 8 elements)",)), "head"),
    ],
)
def test_wrong_weights_are_never_committed(report: WeightReport, message: str) -> None:
    journal: list[str] = []
    engines = [FakeEngine("a", journal), FakeEngine("b", journal)]
    with pytest.raises(WeightMismatchError, match=message) as caught:
        sync_weights(FakeLearner(journal, {**good("a"), "b": report}), engines, 7, timeout=5.0)
    assert caught.value.phase == "comparing the weights with those sent" and caught.value.engines == ("b",)
    assert all(e.paused and e.held_version == 0 for e in engines)


def test_an_engine_outside_the_group_is_no_mismatch() -> None:
    """Its weights are not wrong: a new one in its place would do."""
    engines = [FakeEngine("a", []), FakeEngine("b", [])]
    with pytest.raises(WeightSyncError, match="b: it did not take part") as caught:
        sync_weights(FakeLearner([], good("a")), engines, 7, timeout=5.0)
    assert not isinstance(caught.value, WeightMismatchError) and caught.value.engines == ("b",)
    assert all(e.paused and e.held_version == 0 for e in engines)


def differ() -> None:
    raise WeightMismatchError("receiving the weights", (), "worker 1 and worker 0 received different bytes: w")


class RemoteError(Exception):
    """As Ray raises it: with the error of the other process as its cause."""

    cause = WeightMismatchError("receiving the weights", (), "w differs")


def test_a_mismatch_that_an_engine_finds_stays_one() -> None:
    failed: dict[str, Future[None]] = {name: Future() for name in ("dead", "wrong", "remote")}
    failed["dead"].set_exception(RuntimeError("gone"))
    failed["wrong"].set_exception(WeightMismatchError("receiving", (), "v differs"))
    failed["remote"].set_exception(RemoteError())
    with pytest.raises(WeightMismatchError) as caught:
        await_all("receiving the weights", failed, 5.0)
    assert caught.value.engines == ("wrong", "remote")
    assert caught.value.reason == "wrong: v differs; remote: w differs"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is WeightMismatchError and str(copy) == str(caught.value)


def test_workers_that_differ_end_the_transfer_as_a_mismatch(model: nn.Module) -> None:
    learner, engine = LocalLearner(model, timeout=2.0), ThreadEngine("a", {"receive": differ})
    learner.form_weight_group([engine])
    with pytest.raises(WeightMismatchError, match="at a while receiving the weights: a: worker 1 and worker 0"):
        sync_weights(learner, [engine], 1, timeout=5.0)
    assert engine.paused and engine.held_version == 0


def test_a_failing_learner_leaves_engines_paused() -> None:
    journal: list[str] = []
    engine = FakeEngine("a", journal)
    learner = FakeLearner(journal, good("a"))
    learner.send_weights = fail  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="out of order"):
        sync_weights(learner, [engine], 7, timeout=5.0)
    assert engine.paused and engine.held_version == 0


def test_first_failure_ends_the_wait() -> None:
    slow: Future[None] = Future()
    failed: Future[None] = Future()
    failed.set_exception(RuntimeError("gone"))
    with pytest.raises(WeightSyncError, match="gone"):
        await_all("pausing", {"slow": slow, "failed": failed}, 1e6)


def test_engine_names_must_differ() -> None:
    with pytest.raises(ValueError, match="distinct names"):
        WeightSyncClient([FakeEngine("a", []), FakeEngine("a", [])], 1.0)


# ---------------------------------------------------------------------------------------------------- gloo


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 2))


def test_gloo_delivers_every_tensor_to_every_engine(model: nn.Module) -> None:
    engines = [ThreadEngine("a"), ThreadEngine("b")]
    learner = LocalLearner(model)
    learner.form_weight_group(engines)
    for version in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        sync_weights(learner, engines, version, timeout=20.0)
        assert list(learner.sent) == [name for name, _ in model.named_parameters()]
        for engine in engines:
            assert engine.held_version == version
            assert all(torch.equal(engine.values[n], p) for n, p in model.named_parameters())
    assert [e.ranks for e in engines] == [[1], [2]]


def test_a_corrupted_byte_is_found_and_named(model: nn.Module) -> None:
    engines = [ThreadEngine("a"), ThreadEngine("b", corrupt=True)]
    learner = LocalLearner(model)
    learner.form_weight_group(engines)
    with pytest.raises(WeightMismatchError, match=r"at b while .*differ: 0\.weight"):
        sync_weights(learner, engines, 1, timeout=20.0)
    assert all(e.held_version == 0 and e.paused for e in engines)


def test_after_a_failed_transfer_the_group_is_formed_again(model: nn.Module) -> None:
    broken = ThreadEngine("b", {"receive": fail})
    engines = [ThreadEngine("a"), broken]
    learner = LocalLearner(model, timeout=3.0)
    learner.form_weight_group(engines)
    with pytest.raises(WeightSyncError, match="failed at b while receiving the weights: b: RuntimeError: out of order"):
        sync_weights(learner, engines, 1, timeout=10.0)
    with pytest.raises(WeightSyncError, match="no weight-transfer group"):
        learner.send_weights()
    assert engines[0].paused and engines[0].held_version == 0
    broken.faults.clear()
    learner.form_weight_group(engines)
    sync_weights(learner, engines, 1, timeout=20.0)
    assert all(torch.equal(e.values["2.bias"], model[2].bias) for e in engines)
    assert all(e.held_version == 1 and not e.paused for e in engines)


def test_an_engine_that_never_joins_is_named_in_time(model: nn.Module) -> None:
    release = threading.Event()
    learner = LocalLearner(model, timeout=1.0)
    with pytest.raises(WeightSyncError, match="while joining the transfer group"):
        learner.form_weight_group([ThreadEngine("a"), ThreadEngine("b", {"init": release.wait})])
    release.set()


def test_a_dead_engine_is_found_before_anything_is_broadcast(model: nn.Module) -> None:
    engines = [ThreadEngine("a"), ThreadEngine("b")]
    learner = LocalLearner(model)
    learner.form_weight_group(engines)
    engines[1].faults["health"] = fail
    with pytest.raises(WeightSyncError, match="at b while checking its health before the transfer"):
        learner.send_weights()
    assert engines[0].values == {}


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown transport 'smoke'; known: gloo, nccl"):
        WeightSender(PolicySource(nn.Linear(1, 1)), backend="smoke", rank=0)


def test_other_ranks_only_gather(model: nn.Module) -> None:
    sender = WeightSender(PolicySource(model), backend="gloo", rank=1)
    sender.form_group([FakeEngine("a", [], {"init": fail})])  # would fail if rank 1 called an engine
    assert sender.send() is None

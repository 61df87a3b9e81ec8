"""The protocol over fakes that fail in each phase, and the gloo transport between threads. No vLLM, no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weight_sync.client import WeightSyncClient, await_all
from weight_sync.gloo import GlooInitInfo, broadcast, join_group, plan_buckets, view_in
from weight_sync.protocols import EngineHandle, ParamMeta, TransferReport
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightReport, WeightSyncError, tensor_digest

DOING = {"pause": "pausing", "commit": "committing the version", "resume": "resuming"}


class FakeEngine:
    """Records what it was told; one phase of it can be replaced."""

    def __init__(self, name: str, journal: list[str], faults: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self.name, self.workers = name, 1
        self.journal, self.faults = journal, dict(faults or {})
        self.paused, self.held_version = False, 0
        self._pool = ThreadPoolExecutor(1)

    def _do(self, phase: str, act: Callable[[], Any]) -> Future[Any]:
        def run() -> Any:
            if phase in self.faults:
                return self.faults[phase]()
            self.journal.append(f"{self.name}.{phase}")
            return act()

        return self._pool.submit(run)

    def check_health(self) -> Future[None]:
        return self._do("health", lambda: None)

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self._do("init", lambda: None)

    def pause(self) -> Future[None]:
        return self._do("pause", lambda: setattr(self, "paused", True))

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self._do("receive", lambda: WeightReport({"w": "1"}))

    def commit(self, version: int) -> Future[None]:
        return self._do("commit", lambda: setattr(self, "held_version", version))

    def resume(self) -> Future[None]:
        return self._do("resume", lambda: setattr(self, "paused", False))


class FakeLearner:
    def __init__(self, journal: list[str], received: Mapping[str, WeightReport]) -> None:
        self.journal, self.received = journal, received

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.journal.append("learner.form")

    def send_weights(self) -> TransferReport:
        self.journal.append("learner.send")
        return TransferReport({"w": "1"}, self.received)


def fail() -> None:
    raise RuntimeError("out of order")


def good(*names: str) -> dict[str, WeightReport]:
    return {name: WeightReport({"w": "1"}) for name in names}


def test_order_of_the_phases() -> None:
    journal: list[str] = []
    engines = [FakeEngine("a", journal), FakeEngine("b", journal)]
    sync_weights(FakeLearner(journal, good("a", "b")), engines, 7, timeout=5.0)
    stage = {"pause": 0, "send": 1, "commit": 2, "resume": 3}
    assert [stage[entry.split(".")[1]] for entry in journal] == [0, 0, 1, 2, 2, 3, 3]
    assert [e.held_version for e in engines] == [7, 7] and not any(e.paused for e in engines)


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
    ("reports", "message"),
    [
        (good("a"), "b: it did not take part"),
        ({**good("a"), "b": WeightReport({"w": "2"})}, r"w \(sent 1, received 2\)"),
        ({**good("a"), "b": WeightReport({})}, "1 never arrived: w"),
        ({**good("a"), "b": WeightReport({"w": "1"}, unconsumed=("w",))}, "no parameter of the engine took"),
        ({**good("a"), "b": WeightReport({"w": "1"}, uncovered=("head (0 of 8 elements)",))}, "head"),
    ],
)
def test_wrong_weights_are_never_committed(reports: dict[str, WeightReport], message: str) -> None:
    journal: list[str] = []
    engines = [FakeEngine("a", journal), FakeEngine("b", journal)]
    with pytest.raises(WeightSyncError, match=message) as caught:
        sync_weights(FakeLearner(journal, reports), engines, 7, timeout=5.0)
    assert caught.value.phase == "comparing the weights with those sent" and caught.value.engines == ("b",)
    assert all(e.paused and e.held_version == 0 for e in engines)


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


class ThreadEngine(FakeEngine):
    """Receives over gloo in a thread, as `workers` ranks one after another would in processes."""

    def __init__(self, name: str, faults: Mapping[str, Callable[[], Any]] | None = None, corrupt: bool = False) -> None:
        super().__init__(name, [], faults)
        self.corrupt = corrupt
        self.ranks: list[int] = []
        self.values: dict[str, Tensor] = {}

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self._do("init", lambda: self._join(GlooInitInfo(**init_info)))

    def _join(self, info: GlooInitInfo) -> None:
        self.ranks.append(info.rank_offset)
        self.info, self.group = info, join_group(info, info.rank_offset)

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self._do("receive", lambda: self._receive(update_info))

    def _receive(self, info: Mapping[str, Any]) -> WeightReport:
        rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        metadata = [ParamMeta(n, getattr(torch, d), tuple(s)) for n, d, s in rows]
        for bucket in plan_buckets(metadata, self.info.bucket_bytes):
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
            broadcast(self.group, buffer).wait()
            if self.corrupt:
                buffer[0] ^= 1
            for meta, offset in zip(metadata[bucket.start : bucket.stop], bucket.offsets, strict=True):
                self.values[meta.name] = view_in(buffer, offset, meta).clone()
        return WeightReport({name: tensor_digest(value) for name, value in self.values.items()})


class LocalLearner:
    """A learner of one rank in this process."""

    def __init__(self, model: nn.Module, timeout: float = 20.0, bucket_bytes: int = 256) -> None:
        source = PolicySource(model, bucket_bytes=bucket_bytes)
        self.sender = WeightSender(source, backend="gloo", rank=0, bucket_bytes=bucket_bytes, timeout=timeout)

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.sender.form_group(engines)

    def send_weights(self) -> TransferReport:
        report = self.sender.send()
        assert report is not None
        self.sent = report.sent
        return report


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
    with pytest.raises(WeightSyncError, match=r"at b while .*differ: 0\.weight"):
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

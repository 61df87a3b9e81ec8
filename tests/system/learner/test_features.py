"""The store that ranks share features through, in a real Ray."""

from __future__ import annotations

import os
import signal
from types import ModuleType

import pytest

from learner.features.cache import FeatureCache, Packed
from learner.features.store_actor import ObjectStore
from tests.unit.learner.test_features import assert_equal, features


def test_rays_object_store_is_shared_and_bounded(local_ray: ModuleType) -> None:
    one, other = (ObjectStore("features-test", 150, 60.0) for _ in range(2))
    packed = {key: Packed.of(features(key)) for key in range(3)}
    one.put({0: packed[0], 1: packed[1]})
    assert_equal(other.get([0])[0].unpack(), features(0))
    other.put({2: packed[2]})  # 1 was used least recently
    found = one.get([0, 1, 2])
    assert [*found] == [0, 2]
    assert_equal(found[2].unpack(), features(2))
    assert local_ray.get(one._directory.held.remote()) == 128


def test_a_run_goes_on_without_a_store_that_is_lost(local_ray: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(2**20, ObjectStore("features-lost", 2**20, 60.0))
    cache.put({0: features(0)})
    local_ray.kill(local_ray.get_actor("features-lost"))
    assert_equal(cache.put({1: features(1)})[1], features(1))
    assert [*cache.get([0, 1, 2])] == [0, 1]  # from the rank's own memory
    assert [record.message for record in caplog.records if "object store are lost" in record.message] == [
        "the features that learner ranks share in Ray's object store are lost (ActorDiedError: The actor died "
        "unexpectedly before finishing this task.); from now on this rank computes those that are not in its own "
        "memory again"
    ]


def test_a_store_that_hangs_is_waited_for_once(local_ray: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(2**20, ObjectStore("features-hanging", 2**20, 3.0))
    cache.put({0: features(0)})
    actor = local_ray.get_actor("features-hanging")
    pid = local_ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert [*cache.get([0, 1])] == [0]
        assert [*cache.get([0, 1])] == [0]
    finally:
        os.kill(pid, signal.SIGCONT)
        local_ray.kill(actor)
    lost = [record.message for record in caplog.records if "object store are lost" in record.message]
    assert len(lost) == 1 and "GetTimeoutError" in lost[0]

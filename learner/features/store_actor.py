"""Share cached values of media between the ranks in Ray's object store. A small actor holds the references.

rank ── ray.put(features) ──▶ object store ◀── ray.get ── another rank, or the same one later
   └── put(key, reference, size) ──▶ FeatureDirectory ◀── find(keys) ──┘
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError

from learner.features.cache import BoundedLRU, Key, Packed

logger = logging.getLogger(__name__)


class FeatureDirectory:
    """References by key. An object lives as long as its reference is here, or in use; all of them take at most `limit`
    bytes."""

    def __init__(self, limit: int) -> None:
        self._known: BoundedLRU[ray.ObjectRef] = BoundedLRU(limit)

    def put(self, entries: Sequence[tuple[Key, list[ray.ObjectRef], int]]) -> None:
        # References come in lists, because Ray would hand over the object itself for a bare reference.
        for key, (reference,), size in entries:
            self._known.put(key, reference, size)

    def find(self, keys: Sequence[Key]) -> dict[Key, ray.ObjectRef]:
        found = {key: self._known.get(key) for key in keys}
        return {key: reference for key, reference in found.items() if reference is not None}

    def held(self) -> int:
        """Bytes."""
        return self._known.held


class ObjectStore:
    """Implements `learner.features.cache.Store`."""

    def __init__(self, name: str, limit: int, timeout: float) -> None:
        """Connect to the directory called `name`, or start it: it lives as long as the process that started it.
        `timeout` is the limit, in seconds, for each of its answers."""
        actor = ray.remote(FeatureDirectory).options(name=name, get_if_exists=True, num_cpus=0)
        self._directory, self._timeout = actor.remote(limit), timeout
        self._lost = False

    def put(self, items: Mapping[Key, Packed]) -> None:
        if self._lost:
            return
        try:
            entries = [(key, [ray.put(packed)], packed.data.nbytes) for key, packed in items.items()]
            ray.get(self._directory.put.remote(entries), timeout=self._timeout)
        except RayError as error:
            self._leave(error)

    def get(self, keys: Sequence[Key]) -> Mapping[Key, Packed]:
        if self._lost:
            return {}
        try:
            found = ray.get(self._directory.find.remote(list(keys)), timeout=self._timeout)
            values = ray.get(list(found.values()), timeout=self._timeout)
        except RayError as error:
            self._leave(error)
            return {}
        return dict(zip(found, values, strict=True))

    def _leave(self, error: RayError) -> None:
        """Go on without the store: what was in it can be computed again, and the run waits for it only once."""
        self._lost = True
        logger.warning(
            "the features that learner ranks share in Ray's object store are lost (%s: %s); from now on this rank "
            "computes those that are not in its own memory again",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no reason given",
        )

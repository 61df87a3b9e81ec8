"""Asks all processes of a run whether they live, and all nodes how full their object stores are."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import suppress

import ray
from ray._private.internal_api import node_stats


def silent(questions: Mapping[str, Future[None]], seconds: float) -> list[str]:
    """The names whose answer is not there within `seconds`. Whoever is dead has answered: it is lost by another way."""
    wait(questions.values(), seconds)
    return [name for name, question in questions.items() if not question.done()]


def store_shares() -> dict[str, float]:
    """The used share of the object store by node (its address). A node that does not answer is left out."""
    shares = {}
    for node in ray.nodes():
        if node["Alive"]:
            with suppress(Exception):  # a private interface of Ray, for a remark
                stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
                shares[node["NodeManagerAddress"]] = stats.object_store_bytes_used / stats.object_store_bytes_avail
    return shares

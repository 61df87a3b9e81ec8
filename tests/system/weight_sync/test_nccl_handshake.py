"""Our client with vLLM's NCCL engine, as far as that goes without GPUs."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource


def test_nccl_gives_every_engine_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake of vLLM's own NCCL engine through our client; the communicator itself needs GPUs."""
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=lambda: None))
    joined: dict[str, dict[str, Any]] = {}

    def engine(name: str, workers: int) -> Any:
        def init_weight_transfer(info: dict[str, Any]) -> Future[None]:
            joined[name] = nccl_engine.NCCLWeightTransferInitInfo(**info).__dict__
            return check_health()

        def check_health() -> Future[None]:
            done: Future[None] = Future()
            done.set_result(None)
            return done

        return SimpleNamespace(
            name=name, workers=workers, init_weight_transfer=init_weight_transfer, check_health=check_health
        )

    sender = WeightSender(PolicySource(nn.Linear(2, 2)), backend="nccl", rank=0, bucket_bytes=123, host="10.0.0.1")
    sender.form_group([engine("a", 2), engine("b", 4), engine("c", 1)])
    assert [joined[n]["rank_offset"] for n in "abc"] == [1, 3, 7]
    for info in joined.values():
        assert (info["world_size"], info["master_address"], info["packed"]) == (8, "10.0.0.1", True)
        assert info["packed_buffer_size_bytes"] == 123
    sender.close()

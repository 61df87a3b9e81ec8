"""Two learner ranks under ZeRO-3, in processes of their own: what the source gathers, and that a failed transfer leaves
the ranks aligned. An engine is a process that receives over gloo (bench/weight_receiver.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

LAYERS, WIDTH = 6, 32
WORLD = 2
BUCKET_BYTES = 4 * WIDTH * (WIDTH + 1)
"""One layer: six buckets."""
RANK_TIMEOUT = 100.0


def trained_engine(settings: dict[str, Any] | None = None) -> Any:
    """A stack of linear layers after two steps under ZeRO-3, with LoRA of these `settings`, if given."""
    import deepspeed
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(0)
    deepspeed.init_distributed(dist_backend="gloo")
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    if settings is not None:
        model = get_peft_model(model, LoraConfig(**settings))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    for _ in range(2):  # B starts at zero: A moves from the second step on
        step(engine)
    return engine


def step(engine: Any) -> None:
    import torch

    engine.backward(engine(torch.randn(4, WIDTH)).square().mean())
    engine.step()


def full_parameters(engine: Any) -> dict[str, Any]:
    import deepspeed

    full = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            full[name] = parameter.detach().clone()
    return full


def lora() -> None:
    """One rank: compare every tensor of the source with full parameters merged by hand."""
    import torch
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from weight_sync.source import PolicySource

    engine = trained_engine({"r": 4, "lora_alpha": 8, "target_modules": ["1", "4"]})
    full: dict[str, Any] = {name: value.double() for name, value in full_parameters(engine).items()}
    source = PolicySource(engine.module, bucket_bytes=3 * 4 * WIDTH * WIDTH)
    declared = [(m.name, m.shape) for m in source.metadata()]
    seen = []
    for name, tensor in source:
        gathered = [p for p in engine.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
        assert sum(p.numel() for p in gathered) <= 3 * (WIDTH * WIDTH + 8 * WIDTH) + 6 * WIDTH, len(gathered)
        layer, leaf = name.split(".")
        base = f"base_model.model.{layer}"
        expected = full.get(f"{base}.{leaf}", full.get(f"{base}.base_layer.{leaf}"))
        if leaf == "weight" and layer in "14":
            a, b = (full[f"{base}.lora_{x}.default.weight"] for x in "AB")
            assert b.abs().max() > 0.01
            expected = expected + 2.0 * b @ a
        assert expected is not None
        assert torch.allclose(tensor.double(), expected, atol=1e-5), name
        seen.append((name, tuple(tensor.shape)))
    assert seen == declared and len(seen) == 2 * LAYERS
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())


def death() -> None:
    """One rank: an engine is killed in the middle of a transfer. The next one, to the other engine, succeeds; so does
    the update between them, which needs all ranks in the same collectives."""
    from bench.weight_receiver import ProcessEngine
    from weight_sync.sender import WeightSender
    from weight_sync.source import PolicySource
    from weight_sync.verify import WeightSyncError, tensor_digest

    rank = int(os.environ["RANK"])
    engine = trained_engine()
    source = PolicySource(engine.module, bucket_bytes=BUCKET_BYTES)
    sender = WeightSender(source, backend="gloo", rank=rank, bucket_bytes=BUCKET_BYTES, timeout=20.0)
    living, dying = [ProcessEngine("living"), ProcessEngine("dying", dies_at=2)] if rank == 0 else ["living", "dying"]
    sender.form_group([living, dying])  # type: ignore[list-item]
    for failing in (sender.send, lambda: sender.form_group([living, dying])):
        with nullcontext() if rank else pytest.raises(WeightSyncError, match="the process of dying is gone") as caught:
            failing()
        assert rank or caught.value.engines == ("dying",)
    step(engine)
    sender.form_group([living])  # type: ignore[list-item]
    report = sender.send()
    expected = {name: tensor_digest(value) for name, value in full_parameters(engine).items()}
    if report is not None:
        assert dict(report.sent) == expected and report.received["living"].digests == expected
        living.close()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "death"])
def test_ranks_agree(case: str, repository: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, case],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=RANK_TIMEOUT)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"rank {rank} agrees" in output, output


if __name__ == "__main__":
    {"lora": lora, "death": death}[sys.argv[1]]()
    sys.stdout.write(f"rank {os.environ['RANK']} agrees\n")

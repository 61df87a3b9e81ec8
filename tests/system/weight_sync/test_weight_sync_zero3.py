"""PolicySource under ZeRO-3 with LoRA, on two ranks: merged values, and never more than a bucket gathered at a time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, WIDTH = 6, 32
WORLD = 2


def main() -> None:
    """One rank: train a step, then compare every tensor of the source with full parameters merged by hand."""
    import deepspeed
    import torch
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from weight_sync.source import PolicySource

    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(dist_backend="gloo")
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["1", "4"])
    model = get_peft_model(nn.Sequential(*layers), lora)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    for _ in range(2):  # B starts at zero: A moves from the second step on
        engine.backward(engine(torch.randn(4, WIDTH)).square().mean())
        engine.step()

    full: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            full[name] = parameter.detach().double().clone()
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
        assert torch.allclose(tensor.double(), expected, atol=1e-5), name
        seen.append((name, tuple(tensor.shape)))
    assert seen == declared and len(seen) == 2 * LAYERS
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())
    sys.stdout.write(f"rank {rank} agrees\n")


@pytest.mark.slow
def test_lora_under_zero3_is_merged_bucket_by_bucket(repository: Path) -> None:
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
            [sys.executable, __file__],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"rank {rank} agrees" in output, output


if __name__ == "__main__":
    main()

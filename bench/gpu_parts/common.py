"""Common helpers of the parts: the device, its time, memory and rate of matrix products, and models of real shapes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.tiny import TinySizes, build_tiny

RESERVED = 16
"""How many tokens of a word-level vocabulary are not words."""


@dataclass(frozen=True)
class Setting:
    """The device and the size of a part."""

    device: Literal["cuda", "cpu"]
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 5) -> float:
        """Return the seconds of one call: the median of several, after an unmeasured one."""
        work()
        self.wait()
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2]

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """Return the peak of bytes that a call allocates in addition to those held before. None on a CPU, which does
        not count them."""
        if not self.cuda:
            work()
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def matmul_flops(self) -> float:
        """Measure the FLOP/s of a plain matrix product in the part's precision."""
        size = 8192 if self.cuda else 512
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)


@dataclass(frozen=True)
class RealShape:
    """A Qwen2.5-VL with the published widths, cut to as many language layers as one GPU can train with AdamW."""

    sizes: TinySizes
    layers: int
    """Number of layers of the published model."""
    full_attention: tuple[int, ...] = (7, 15, 23, 31)
    """Layers of the tower without windows."""
    vocabulary: int = 151_936

    def build(self, folder: Path, device: str) -> Path:
        words = [f"w{i}" for i in range(self.vocabulary - RESERVED)]
        with torch.device(device):
            build_tiny("qwen2_5_vl", folder, words=words, sizes=self.sizes)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["fullatt_block_indexes"] = list(self.full_attention)
        (folder / "config.json").write_text(json.dumps(config))
        return folder


_TOWER: dict[str, Any] = {
    "vision_hidden": 1280,
    "vision_intermediate": 3420,
    "vision_depth": 32,
    "vision_heads": 16,
    "max_image_tokens": 2048,
    "max_positions": 32_768,
    "initializer_range": 0.02,
}
REAL = {
    "3B": RealShape(TinySizes(hidden=2048, intermediate=11008, layers=12, heads=16, kv_heads=2, **_TOWER), 36),
    "7B": RealShape(TinySizes(hidden=3584, intermediate=18944, layers=4, heads=28, kv_heads=4, **_TOWER), 28),
}
SMALL = {
    "3B": RealShape(TinySizes(max_image_tokens=256, vision_depth=2), 3, full_attention=(1,), vocabulary=2048),
    "7B": RealShape(TinySizes(hidden=192, heads=6, max_image_tokens=256), 3, full_attention=(1,), vocabulary=2048),
}


def shapes(setting: Setting) -> dict[str, RealShape]:
    return SMALL if setting.small else REAL


def join_alone(options: Any) -> None:
    """Make a default process group with only this process: NCCL on a GPU, gloo on a CPU."""
    from learner.engines.process_group import join, open_store

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store, port = open_store("127.0.0.1", 60.0)
    join(options, 0, "127.0.0.1", port, store)


def error_of(value: Tensor, exact: Tensor) -> float:
    """Return the largest |difference|, as a share of the largest |exact value|."""
    return float((value.double() - exact.double()).abs().max() / exact.double().abs().max())

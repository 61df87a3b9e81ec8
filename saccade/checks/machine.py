"""Checks of what a configuration needs on this machine: weight files, packages, a folder to write to, a port."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from rollout.data.elsewhere import address_problem
from saccade.config.run_config import RunConfig


def missing_weights(config: RunConfig) -> list[str]:
    """Find weight files that a local model folder lacks. The hub delivers models whole."""
    path = config.model.path
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)):
        return []
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        try:
            shards = set(json.loads((folder / name).read_text())["weight_map"].values())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return [f"model.path: {folder / name} cannot be read: {error}"]
        missing = sorted(shard for shard in shards if not (folder / str(shard)).is_file())
        if not missing:
            return []
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return [f"model.path: {len(missing)} of {len(shards)} weight files are missing in {path}: {few}"]
    return [f"model.path: {path} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"]


def quantization(config: RunConfig) -> list[str]:
    quantize = config.model.lora.quantize if config.model.lora else "none"
    if quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return [f"model.lora.quantize={quantize} needs bitsandbytes: pip install -e '.[qlora]'"]
    return []


def output_folder(config: RunConfig) -> list[str]:
    directory = Path(config.output_dir)
    if problem := address_problem(config.output_dir):  # as a path, it would be made in the working directory
        return [f"output_dir={config.output_dir}: {problem}"]
    if directory.exists() and not directory.is_dir():
        return [f"output_dir: {directory} exists and is not a folder"]
    if file := next((p for p in directory.parents if p.exists() and not p.is_dir()), None):
        return [f"output_dir: {directory} cannot be created: {file} is a file"]
    return []


def metrics_port(config: RunConfig) -> list[str]:
    port = config.cluster.metrics_port
    if not port:
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return [
                f"cluster.metrics_port={port} cannot be used on this machine ({error.strerror}); another run may have "
                "it: choose another port, or 0 (Ray serves the metrics too)"
            ]
    return []

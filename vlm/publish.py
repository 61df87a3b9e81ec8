"""Saved models must load wherever published checkpoints of the family load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from vlm.adapter import MultimodalAdapter


def publish_saved_model(directory: Path, adapter: MultimodalAdapter, model: Any) -> None:
    """Rename what `model.save_pretrained(directory)` wrote: the weight names and configuration of published models."""
    rename_saved_weights(directory, adapter.published_weight_name)
    config = adapter.published_config(model)
    if config is not None:
        config.save_pretrained(directory)


def rename_saved_weights(directory: Path, rename: Callable[[str], str]) -> None:
    """Rename tensors in the safetensors files of `directory`, which nobody else reads yet, and in their index."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            if all(rename(name) == name for name in names):
                continue
            renamed = {rename(name): tensors.get_tensor(name) for name in names}
            metadata = tensors.metadata()
        partial = file.with_suffix(".partial")
        save_file(renamed, partial, metadata=metadata)
        partial.replace(file)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")

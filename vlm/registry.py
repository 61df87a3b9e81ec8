"""model_type -> adapter. A family of a user's own is named in the config as `model.adapter: package.module:Class`."""

from __future__ import annotations

import importlib
from pathlib import Path

from transformers import AutoConfig

from vlm.adapter import AdapterError, MultimodalAdapter
from vlm.qwen_vl import QwenVLAdapter

ADAPTERS: dict[str, type[MultimodalAdapter]] = {
    "qwen2_vl": QwenVLAdapter,
    "qwen2_5_vl": QwenVLAdapter,
}


def load_adapter(path: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> MultimodalAdapter:
    """The adapter of the model at `path` (a directory or hub name).

    Raises AdapterError when there is no model at `path` or no adapter for its type."""
    if adapter is not None:
        module, _, name = adapter.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise AdapterError(f"model.adapter {adapter!r} cannot be imported: {error}") from error
    else:
        if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
            raise AdapterError(f"no usable model at {path!r}: there is no such folder")
        try:
            model_type = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).model_type
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise AdapterError(f"no usable model at {path!r}: {reason}") from error
        if model_type not in ADAPTERS:
            known = ", ".join(sorted(ADAPTERS))
            raise AdapterError(
                f"no adapter for model type {model_type!r} of {path!r}; known: {known}. "
                "Write one and name it as model.adapter: 'package.module:Class'"
            )
        cls = ADAPTERS[model_type]
    return cls.load(path, trust_remote_code=trust_remote_code)

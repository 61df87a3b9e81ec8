"""Find the adapter of a model by its model_type. The configuration names a user's own family as `model.adapter`:
package.module:Class, or path/file.py:Class."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from vlm.adapter import MultimodalAdapter
from vlm.errors import AdapterError
from vlm.families.aria import AriaAdapter
from vlm.families.gemma3 import Gemma3Adapter
from vlm.families.idefics3 import Idefics3Adapter
from vlm.families.internvl import InternVLAdapter
from vlm.families.llava import LlavaAdapter
from vlm.families.llava_next import LlavaNextAdapter, LlavaOnevisionAdapter
from vlm.families.pixtral import PixtralAdapter
from vlm.families.qwen_omni import QwenOmniAdapter
from vlm.families.qwen_vl import Qwen3VLAdapter, QwenVLAdapter
from vlm.families.text import TextAdapter
from vlm.user_code import UserCodeError, find

ADAPTERS: dict[str, type[MultimodalAdapter]] = {
    "aria": AriaAdapter,
    "gemma3": Gemma3Adapter,
    "idefics3": Idefics3Adapter,
    "internvl": InternVLAdapter,
    "llama": TextAdapter,
    "llava": LlavaAdapter,
    "llava/pixtral": PixtralAdapter,
    "llava_next": LlavaNextAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "mistral3": PixtralAdapter,
    "qwen2": TextAdapter,
    "qwen2_5_omni": QwenOmniAdapter,
    "qwen2_5_vl": QwenVLAdapter,
    "qwen2_vl": QwenVLAdapter,
    "qwen3": TextAdapter,
    "qwen3_vl": Qwen3VLAdapter,
    "smolvlm": Idefics3Adapter,
}
"""`model_type` -> adapter, or `model_type/vision tower's model_type` -> adapter if one model type stands for several
families."""


def load_adapter(
    path: str,
    adapter: str | None = None,
    *,
    trust_remote_code: bool = False,
    max_image_tokens: int | None = None,
) -> MultimodalAdapter:
    """Load the adapter of the model at `path` (a directory or hub name), with images limited to `max_image_tokens`.

    Raises AdapterError if there is no model at `path`, no adapter for its type, or the limit cannot be kept."""
    cls = _own(adapter) if adapter is not None else _known(path, trust_remote_code)
    try:
        loaded = cls.load(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise AdapterError(f"no usable tokenizer or processor at {path!r}: {str(error).splitlines()[0]}") from error
    if max_image_tokens is not None:
        try:
            loaded.limit_images(max_image_tokens)
        except AdapterError as error:
            raise AdapterError(f"model.max_image_tokens={max_image_tokens} cannot be kept: {error}") from error
    return loaded


def _own(adapter: str) -> type[MultimodalAdapter]:
    try:
        cls = find(adapter)
    except UserCodeError as error:
        raise AdapterError(f"model.adapter: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, MultimodalAdapter)):
        raise AdapterError(f"model.adapter {adapter!r} is not a subclass of vlm.adapter.MultimodalAdapter")
    return cls


def _known(path: str, trust_remote_code: bool) -> type[MultimodalAdapter]:
    here = Path(path)
    names_a_folder = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if "://" in path:
        raise AdapterError(
            f"no usable model at {path!r}: give a folder on this machine or a name on the Hugging Face hub "
            "(org/name); download or mount anything else"
        )
    if names_a_folder and not here.is_dir():
        raise AdapterError(f"no usable model at {path!r}: there is no such folder")
    hint = (
        f"Model types with an adapter: {', '.join(sorted(ADAPTERS))}. For another type, write an adapter and set "
        "model.adapter: 'package.module:Class' (docs/adapters.md)"
    )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the files may be anything: configurations fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if not here.is_dir():
            reason = f"there is no such folder, and loading it from the Hugging Face hub failed: {reason}"
            raise AdapterError(f"no usable model at {path!r}: {reason}") from error
        raise AdapterError(f"no usable model at {path!r}: {reason}. {hint}") from error
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    found = ADAPTERS.get(f"{config.model_type}/{tower}") or ADAPTERS.get(config.model_type)
    if found is None:
        raise AdapterError(f"no adapter for model type {config.model_type!r} of {path!r}. {hint}")
    return found

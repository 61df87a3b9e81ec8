"""Adapters: what docs/adapters.md says, batches of one prompt each and of many, names that both sides know."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.adapter import MultimodalAdapter
from vlm.encoding import concatenate_padded
from vlm.errors import AdapterError
from vlm.families.registry import ADAPTERS, load_adapter
from vlm.media.types import Media
from vlm.tiny import build_tiny
from vlm.user_code import name_of


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_the_worked_example_of_the_docs_works(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repository / "docs/adapters.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_family.py").write_text(code)
    # As the installed command starts: the working directory is not on the import path.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    model = build_tiny("llava", tmp_path / "model")
    adapter = load_adapter(str(model), "my_family:MyAdapter")
    assert type(adapter).__name__ == type(load_adapter(str(model), "my_family.py:MyAdapter")).__name__ == "MyAdapter"
    assert name_of(type(adapter)) == f"{tmp_path}/my_family.py:MyAdapter"
    with pytest.raises(AdapterError, match=r"model\.adapter: no_family:A: importing no_family failed"):
        load_adapter(str(model), "no_family:A")
    text = adapter.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    encoded = adapter.encode(text, [picture(60, 80)])
    assert len(encoded.input_ids) == adapter.expanded_length(adapter.tokenize(text), [Media("image", "", b"", 60, 80)])


def test_the_docs_name_every_family(repository: Path) -> None:
    text = (repository / "docs/adapters.md").read_text()
    assert [name for name in ADAPTERS if f"`{name.partition('/')[0]}`" not in text] == []


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> MultimodalAdapter:
    return load_adapter(str(build_tiny("llava_next", tmp_path_factory.mktemp("llava_next"))))


def test_joining_pads_tiles_and_sides_at_their_ends() -> None:
    joined = concatenate_padded([torch.ones(1, 2, 3), torch.full((2, 1, 5), 2.0)])
    assert joined.shape == (3, 2, 5)
    assert joined[0].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert joined[2].tolist() == [[2, 2, 2, 2, 2], [0, 0, 0, 0, 0]]


def test_the_towers_missing_level_is_added_once(llava_next: MultimodalAdapter) -> None:
    ours = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    theirs = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert llava_next.engine_weight_name(ours) == theirs
    assert llava_next.engine_weight_name(theirs) == theirs
    assert llava_next.engine_weight_name("model.language_model.norm.weight") == "model.language_model.norm.weight"


def test_a_layer_behind_the_one_whose_features_are_used_is_not_sent_but_saved(llava_next: MultimodalAdapter) -> None:
    # Three layers, of which the last but one gives the features.
    used, unused = (f"model.vision_tower.encoder.layers.{i}.layer_norm1.bias" for i in (1, 2))
    assert llava_next.engine_weight_name(used) is not None
    assert llava_next.engine_weight_name(unused) is None
    assert "vision_model.encoder.layers.2" in llava_next.published_weight_name(unused)


def test_an_expanded_prompt_is_not_given_to_the_engine(llava_next: MultimodalAdapter) -> None:
    image = llava_next.placeholder_ids["image"]
    with pytest.raises(AdapterError, match=r"image, image, image, but its media are image; was it expanded already"):
        llava_next.engine_prompt([1, image, image, image, 2], [Media("image", "d", b"", 1, 1)])

"""YAML as configurations are written: a key that appears twice in one mapping is refused."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self.twice: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    self.twice.append(f"line {key.start_mark.line + 1}: the key {key.value!r} appears twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, name: str) -> tuple[Any, list[str]]:
    """The content, and a text for each key that appears twice. `name`: of the file, for errors. Raises
    yaml.YAMLError."""
    loader = _Loader(text, name)
    try:
        return loader.get_single_data(), list(dict.fromkeys(loader.twice))
    finally:
        loader.dispose()

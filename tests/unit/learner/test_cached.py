"""The table of what is cached of frozen towers, against the function that decides it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from learner.model import cached
from learner.model.cached import what_is_cached

ARCHITECTURE = Path(__file__).resolve().parents[3] / "docs" / "architecture.md"


def table(text: str) -> dict[tuple[bool, bool, bool], str]:
    """(tower trained, projector trained, end known) -> what is cached, as the table says."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] in ("frozen", "trained"):
            allowed = [
                ("trained" in cells[0],),
                _choices(cells[1], "frozen", "trained"),
                _choices(cells[2], "no", "yes"),
            ]
            found |= dict.fromkeys(product(*allowed), cells[3])
    return found


def _choices(cell: str, no: str, yes: str) -> tuple[bool, ...]:
    return tuple(value for value, word in ((False, no), (True, yes)) if word in cell.split())


@pytest.mark.parametrize("text", [cached.__doc__ or "", ARCHITECTURE.read_text()], ids=["module", "architecture.md"])
def test_the_table_says_what_is_cached(text: str) -> None:
    said = table(text)
    assert said.keys() == set(product((False, True), repeat=3))
    for (tower, projector, end), what in said.items():
        found = what_is_cached(tower_trained=tower, projector_trained=projector, knows_tower_end=end)
        assert (found or "nothing") == what

"""The one table of what is cached of each tower, for each item of media.

| tower | its projector | the adapter knows where the tower ends | cached | runs in every pass |
|---|---|---|---|---|
| frozen | frozen | yes or no | features | nothing |
| frozen | trained | yes | tower outputs | the projector |
| frozen | trained | no | nothing | tower and projector |
| trained | frozen or trained | yes or no | nothing | tower and projector |

*Tower outputs* are what a tower gives to its projector; *features* are what the projector gives to the language model.
The tower of sounds has no projector of its own: it counts as one whose projector is frozen.
"""

from __future__ import annotations

from typing import Literal

Cached = Literal["features", "tower outputs"]


def what_is_cached(*, tower_trained: bool, projector_trained: bool, knows_tower_end: bool) -> Cached | None:
    """Return what is cached of a tower according to the table. None: nothing."""
    if tower_trained:
        return None
    if not projector_trained:
        return "features"
    return "tower outputs" if knows_tower_end else None

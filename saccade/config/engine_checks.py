"""Check `rollout.engine_options` against the lists of vLLM's options in engine_fields.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from saccade.config.engine_fields import ALLOWED, INSTEAD, REFUSED, RENDERED_HERE


def engine_option_problems(options: Mapping[str, Any]) -> list[str]:
    """One text for each option that may not stand in `rollout.engine_options`."""
    found = []
    for name in options:
        where = f"rollout.engine_options.{name}"
        if name in INSTEAD:
            found.append(f"{where}: only the engine would see this option; use {INSTEAD[name]}")
        elif name in REFUSED:
            found.append(
                f"{where}: it changes what the engine computes or how it is reached; the learner would not follow"
            )
        elif name in RENDERED_HERE:
            found.append(
                f"{where}: the engine receives tokens, so it renders no template; the template is "
                "chat_template.jinja in the folder of model.path"
            )
        elif name not in ALLOWED:
            nearest = difflib.get_close_matches(name, [*ALLOWED, *INSTEAD], n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            found.append(f"{where}: vLLM has no such option{hint}")
    return found

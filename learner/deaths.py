"""An actor's death in words: what is worth knowing of Ray's account of it."""

from __future__ import annotations

import re


def how_it_died(text: str) -> str:
    """Ray's account of an actor's death, as far as it says something: which process, where, how."""
    field = {name: m[1] for name in ("pid", "ip", "actor_id") if (m := re.search(rf"^\s*{name}: (\S+)", text, re.M))}
    if not field:
        return f": {text.strip()}"
    place = f" (process {field.get('pid', '?')} at {field.get('ip', '?')}, Ray's actor {field.get('actor_id', '?')})"
    told = [line.strip() for line in text.splitlines() if line and not line[0].isspace()][1:]
    reason = " ".join(told).partition("Worker exit detail: ")
    told_by_ray = reason[2] or reason[0]
    detail = re.split(r" (?:Some common|There are some potential)", told_by_ray)[0].strip()
    if "connection error code 2" in detail:
        detail = "it was killed or crashed; where memory ran out, dmesg of that machine says so"
    return f"{place}: {detail or 'Ray does not say how'}"

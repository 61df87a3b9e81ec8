"""`saccade data inspect`: show how a run would read data files, with or without a model.

files, knobs ──▶ PromptSource without a limit on length ──▶ sizes and lengths of all ──▶ text
                                       └─ too long ──▶ PromptSource with the limit ──▶ refused, truncated
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
from rich.console import Console

from rollout.data.source import PromptSource, Refusal
from rollout.types import Prompt
from saccade.config.options import config_adapter, data_options
from saccade.config.run_config import RunConfig
from saccade.observe.screen import say
from vlm.adapter import Modality, MultimodalAdapter
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import SOUND_RATE

SAMPLES = 3
SHOWN = 600
"""How many characters of a sample are shown."""
BARS = " ▁▂▃▄▅▆▇█"


class PlainText:
    """Replaces the adapter when no model is given: it leaves roles and texts unchanged and counts each character as a
    token."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ()
    control_tokens: ClassVar[Mapping[int, str]] = {}
    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>"),
        "video": Modality("<video>"),
        "audio": Modality("<audio>"),
    }

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        def content(message: Mapping[str, Any]) -> str:
            return "".join(p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in message["content"])

        return "".join(f"{message['role']}: {content(message)}\n" for message in messages)

    def tokenize(self, text: str) -> list[int]:
        kinds = {f"<{kind}>": -1 - n for n, kind in enumerate(self.modalities)}
        return [kinds.get(piece) or ord(piece) for piece in re.findall("|".join([*kinds, "."]), text, re.DOTALL)]

    def media_order(self, token_ids: Sequence[int]) -> list[MediaKind]:
        return [list(self.modalities)[-1 - token] for token in token_ids if token < 0]

    def expanded_length(self, token_ids: Sequence[int], media: Sequence[Media]) -> int:
        return len(token_ids) - len(media)


@dataclass
class Findings:
    """Counts and samples from the rows that were read."""

    rows: int = 0
    media: Counter[MediaKind] = field(default_factory=Counter)
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Name of a quantity -> its values."""
    samples: list[Prompt] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    first_refusals: tuple[Refusal, ...] = ()
    truncated: int = 0

    def add(self, prompt: Prompt, unit: str) -> None:
        self.figures.setdefault(f"prompt, in {unit}", []).append(prompt.expanded_length)
        self.media.update(m.kind for m in prompt.media)
        for media in prompt.media:
            for name, value in _sizes(media):
                self.figures.setdefault(f"{media.kind} {name}", []).append(value)


def inspect_data(config: RunConfig, model: str | None, rows: int, console: Console) -> None:
    """Print a summary of the first `rows` rows of a shuffled epoch of `data.train`. Without a model, lengths are in
    characters.

    Raises AdapterError, DataError."""
    adapter = config_adapter(config) if model is not None else cast("MultimodalAdapter", PlainText())
    options = data_options(config, config.data.train, train=False)
    options = replace(options, data=replace(options.data, max_refused_share=1.0))
    unlimited = PromptSource(replace(options, data=replace(options.data, max_prompt_length=sys.maxsize)), adapter)
    limited = PromptSource(options, adapter) if model is not None else unlimited
    findings = look(unlimited, limited, rows, "tokens" if model is not None else "characters")
    for line in [*_summary(unlimited, findings), *_table(findings.figures), *_rest(findings, config, model)]:
        say(console, line)


def look(unlimited: PromptSource, limited: PromptSource, rows: int, unit: str) -> Findings:
    """Read `rows` rows. Both sources hold the same rows; `unlimited` has no length limit, so it can measure prompts of
    any length."""
    found = Findings(min(rows, len(unlimited)))
    for prompt in unlimited.look(rows):
        if prompt is None:
            continue
        found.add(prompt, unit)
        usable: Prompt | None = prompt
        if prompt.expanded_length > limited.options.data.max_prompt_length:
            usable = limited.attempt(prompt.ref.row)
        if usable is not None and len(found.samples) < SAMPLES:
            found.samples.append(usable)
    reports = [unlimited.report(), *([limited.report()] if limited is not unlimited else [])]
    for report in reports:
        found.refused.update(report.refused)
        found.first_refusals += report.first_refusals
        found.truncated += report.truncated
    return found


def _sizes(media: Media) -> Iterator[tuple[str, float]]:
    if media.kind == "audio":
        yield "seconds", media.samples / SOUND_RATE
        return
    yield "width", media.width
    yield "height", media.height
    if media.kind == "video":
        yield "seconds", media.total_frames / media.fps
        yield "frames shown", len(media.frames)


def _summary(source: PromptSource, found: Findings) -> Iterator[str]:
    yield f"columns  {source.columns}" + (f"  (not used: {', '.join(source.unused)})" if source.unused else "")
    refused = found.refused.total()
    media = "".join(f"; {n:,} {kind}(s)" for kind, n in found.media.items())
    looked_at = f"{found.rows - refused:,} usable, {refused:,} refused{media}"
    yield f"rows     {len(source):,}, {found.rows:,} read: {looked_at}"


def _table(figures: Mapping[str, Sequence[float]]) -> Iterator[str]:
    width = max((len(name) for name in figures), default=0)
    if figures:
        yield f"\n{'':{width}}  {'min':>8} {'p50':>8} {'p99':>8} {'max':>8}  from min to max"
    for name, values in figures.items():
        marks = np.percentile(values, [0, 50, 99, 100], method="higher")
        yield f"{name:{width}}  {' '.join(f'{mark:8,.5g}' for mark in marks)}  {bars(values)}"


def bars(values: Sequence[float], bins: int = 24) -> str:
    """Draw a histogram in one line. The tallest bar is the fullest of `bins` equal ranges; an empty range is blank."""
    counts, _ = np.histogram(values, bins if min(values) < max(values) else 1)
    return "".join(BARS[int(np.ceil(n / counts.max() * (len(BARS) - 1)))] for n in counts)


def _rest(found: Findings, config: RunConfig, model: str | None) -> Iterator[str]:
    if model is None:
        yield "\nLengths are in characters. Pass --model PATH to count tokens and to find prompts that are too long."
    if found.truncated:
        yield f"\ntruncated to data.max_prompt_length={config.data.max_prompt_length}: {found.truncated}"
    if found.refused:
        yield "\nrefused  " + ", ".join(f"{n} {kind}" for kind, n in found.refused.most_common())
        yield from (f"  {refusal}" for refusal in found.first_refusals)
    for prompt in found.samples:
        yield f"\n{prompt.ref.uid}"
        yield from (f"  | {line}" for line in _beginning(prompt.text).splitlines())
        yield f"  answer: {_beginning(prompt.answer)}" if prompt.answer is not None else "  no answer"


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"

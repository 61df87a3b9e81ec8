"""RewardActor in a real Ray: chained on a rollout's reference, two return values, images fetched, children that end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.config import RewardSpec
from rollout.types import Completion, Prompt, PromptRef, RolloutGroup, Segment
from vlm.media.types import Media

PATIENCE = 180.0

SOURCE = """
import os, time

def length(completions, level, **columns):
    if completions[0] == "hang":
        time.sleep(10_000)
    if completions[0] == "exit":
        os._exit(3)
    if completions[0] == "hold pipe":
        pipe = open(columns["fifo"][0], "w")
        print("open", file=pipe, flush=True)
        time.sleep(10_000)
    return [len(text) + value for text, value in zip(completions, level)]

def none(completions):
    return [None for _ in completions]

def image_bytes(request):
    from rollout.types import Verdict
    return [Verdict.scored(len(request.media[0].data) + c.num_tokens) for c in request.raw]
"""


def make_group(*texts: str, media: tuple[Media, ...] = (), **columns: Any) -> RolloutGroup:
    completions = tuple(
        Completion(
            (Segment(np.arange(k + 1, dtype=np.int32), np.zeros(k + 1, np.float32), np.full(k + 1, 5, np.int32)),),
            text,
            "stop",
            seed=k,
        )
        for k, text in enumerate(texts)
    )
    columns = {"level": 1, **columns}
    prompt = Prompt(PromptRef("rows:0"), "what?", np.arange(3, dtype=np.int32), 3, media, answer="red", columns=columns)
    return RolloutGroup(prompt, np.arange(3, dtype=np.int32), completions, engine="rollout-0")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_the_excerpts_of_a_report_leave_the_trace_out(source: Path) -> None:
    """The shell without Ray around it."""
    from rewards.actor import RewardActor

    for trace, excerpt in (("visible", "<think>secret</think>short"), ("internal", "short"), ("stripped", "short")):
        actor = RewardActor([RewardSpec(f"{source}:none")], PATIENCE, trace=trace)  # type: ignore[arg-type]
        _, summary = actor.score(make_group("<think>secret</think>short", "x" * 1000))
        actor.shutdown()
        assert summary.invalid_excerpts == (excerpt, "x" * 200)


def test_a_group_whose_media_are_lost_is_to_be_sampled_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell without Ray around it."""
    import ray

    from rewards.actor import RewardActor
    from rewards.process.worker import Traits

    def lost(self: RewardActor, media: Media) -> Media:
        raise ray.exceptions.OwnerDiedError("00", None, "")

    actor = RewardActor([RewardSpec(f"{source}:none")], PATIENCE)
    monkeypatch.setattr(RewardActor, "_fetch", lost)
    monkeypatch.setattr(actor._worker, "traits", Traits(needs_media=True, separable=False))
    verdicts, summary = actor.score(make_group("a", "b", media=(Media("image", "0", b"png"),)))
    actor.shutdown()
    assert verdicts == () and summary.failure is not None
    assert summary.failure.retryable and not summary.failure.engine_dead
    assert summary.failure.ref == PromptRef("rows:0") and "media are lost: OwnerDiedError" in summary.failure.reason

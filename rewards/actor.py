"""RewardActor: a thin Ray shell around a RewardWorker.

    group_ref ──▶ score ──▶ (K verdicts, GroupSummary)

The driver reads the summary alone. The learner is handed references to the group and to its verdicts, and joins them: a
group crosses the object store once.

    actor = ray.remote(RewardActor).options(num_cpus=0.5).remote(specs, timeout=30.0)
    ray.get(actor.start.remote())
    verdicts_ref, summary_ref = actor.score.remote(group_ref)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import ray

from rewards.base import ScoringRequest, Service
from rewards.compose import Scores
from rewards.config import RewardSpec
from rewards.functions.format import Trace, shown
from rewards.process.worker import START_TIMEOUT, RewardWorker
from rollout.types import GroupSummary, RolloutFailure, RolloutGroup, Verdict
from vlm.media.types import Media

EXCERPT = 200
"""Characters of a completion without a score that go into the summary."""


class RewardActor:
    """Scores one group at a time (leave `max_concurrency` at 1); more actors score more groups at once."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout: float,
        *,
        start_timeout: float = START_TIMEOUT,
        services: Mapping[str, Service] | None = None,
        trace: Trace = "visible",
        name: str = "reward",
    ) -> None:
        """Begins to load the rewards.

        Args:
            timeout: seconds that one call on one group may take.
            start_timeout: seconds that importing the rewards and warming them up may take.
            services: what rewards may call upon, by name (rewards/base.py).
            trace: how completions are shown in reports.
            name: in the dashboard and in front of what is printed here.
        """
        self._worker = RewardWorker(specs, timeout, start_timeout=start_timeout, services=services)
        self._timeout = timeout
        self._trace = trace
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Return when the rewards are loaded and warm.

        Raises:
            RewardSetupError: they cannot be loaded; says why.
        """
        self._worker.start()

    @ray.method(num_returns=2)
    def score(self, group: RolloutGroup | RolloutFailure) -> tuple[tuple[Verdict, ...], GroupSummary]:
        """Return the K verdicts of a group, and its summary. A failure has no verdicts, and nor has a group whose media
        are lost."""
        if isinstance(group, RolloutFailure):
            return (), GroupSummary.of_failure(group)
        start = time.perf_counter()
        try:
            scores = self._scores(group)
        except ray.exceptions.ObjectLostError as error:  # with the actor that kept them: the prompt is read again
            reason = f"the prompt's media are lost: {type(error).__name__}: {error}"[:500]
            return (), GroupSummary.of_failure(RolloutFailure(group.prompt.ref, reason, group.engine, retryable=True))
        seconds = time.perf_counter() - start
        invalid = [c.text for c, v in zip(group.completions, scores.verdicts, strict=True) if not v.valid]
        summary = replace(
            GroupSummary.of(replace(group, verdicts=scores.verdicts)),
            reward_seconds=seconds,
            invalid_excerpts=tuple(shown(text, self._trace)[:EXCERPT] for text in invalid),
            part_seconds=scores.seconds,
        )
        return scores.verdicts, summary

    def check_health(self) -> None:
        """Answered as long as this process runs."""

    def set_service(self, name: str, service: Service) -> None:
        """Let rewards call upon `service` from now on under `name`."""
        self._worker.set_service(name, service)

    def shutdown(self) -> None:
        """Ends the child process; score nothing afterwards."""
        self._worker.close()

    def _scores(self, group: RolloutGroup) -> Scores:
        request = ScoringRequest.of(group)
        if not self._worker.traits.needs_media:
            sizes = tuple(replace(item, data=b"") for item in request.media)
            return self._worker.score(replace(request, media=sizes, raw=()))
        try:
            media = tuple(self._fetch(item) for item in request.media)
        except ray.exceptions.ObjectLostError:
            raise
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = f"the prompt's media could not be fetched: {type(error).__name__}: {error}"[:500]
            return Scores((Verdict("error", reason=reason),) * len(request.completions), {})
        return self._worker.score(replace(request, media=media))

    def _fetch(self, media: Media) -> Media:
        """With its bytes in place of a reference to them: the child process is not part of the Ray cluster."""
        if not isinstance(media.data, ray.ObjectRef):
            return media
        return replace(media, data=ray.get(media.data, timeout=self._timeout))

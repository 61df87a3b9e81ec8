"""Finds who died, and so which of the errors that one death brings about to show.

    error ends the run ─▶ explain: does Ray's head answer? which actors are dead, which engines?
                              └▶ DeathError("learner rank 1 died (process 4711 at 10.0.0.7, ...)"), or the error itself

A killed process shows first wherever somebody waited for it: as a closed connection of gloo or NCCL in another actor,
as a lost object, as a missed deadline. So every actor is asked, and the error names those that are dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray

from learner.deaths import how_it_died
from learner.types import LearnerError, LearnerTimeoutError
from rollout.engines.protocol import EngineDeadError
from saccade.errors import RunError, RunStopped
from saccade.fleet.head import HeadLostError, HeadWatch
from saccade.fleet.waiting import first_lines

ASKING_SECONDS = 5.0
"""Seconds within which Ray knows that an actor is dead. One that computes does not answer, and is not dead."""
HIDDEN_SECONDS = 1.0
"""Seconds to wait for the other answers once one was found dead: a node takes all its actors with it."""

Questions = Mapping[str, Callable[[], ray.ObjectRef]]
"""By the name of a process for the user: a call that it answers while it lives."""


class DeathError(RunError):
    """Processes of the run died."""

    def __init__(self, dead: Mapping[str, str], noticed: str) -> None:
        deaths = "; ".join(f"{who} died{how}" for who, how in dead.items())
        super().__init__(
            f"{deaths}\nIt was first noticed as: {noticed}\n"
            "Use --resume to continue from the newest checkpoint, if there is one."
        )
        self.dead = tuple(dead)


def explain(error: Exception, questions: Questions, head: HeadWatch) -> Exception:
    """The error to show for `error`: the death that it comes from, or itself."""
    if isinstance(error, DeathError | HeadLostError | RunStopped):
        return error
    if head.gone():
        return HeadLostError(head.text)
    dead = find_dead(questions)
    return DeathError(dead, first_lines(error)) if dead else error


def learner_lost(error: Exception) -> bool:
    """Whether `error` says that a rank of the learner died or hangs."""
    if isinstance(error, DeathError):
        return any(who.startswith("learner") for who in error.dead)
    died = isinstance(error, LearnerError) and isinstance(error.__cause__, ray.exceptions.RayActorError)
    return died or isinstance(error, LearnerTimeoutError)


def find_dead(questions: Questions, limit: float = ASKING_SECONDS) -> dict[str, str]:
    """Return who is dead, and how it died, in words. Who does not answer within `limit` seconds counts as at work."""
    asked: dict[ray.ObjectRef, str] = {ask(): who for who, ask in questions.items()}
    dead: dict[str, str] = {}
    deadline = time.monotonic() + limit
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        who = asked.pop(ready[0])
        try:
            ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineDeadError):
                dead[who] = f": {error.cause}"
        except ray.exceptions.RayActorError as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError):
                dead[who] = how_it_died(str(error))
        except ray.exceptions.RayError:
            continue  # no answer: it says nothing of who is dead
        if dead:
            deadline = min(deadline, time.monotonic() + HIDDEN_SECONDS)
    return {who: dead[who] for who in questions if who in dead}

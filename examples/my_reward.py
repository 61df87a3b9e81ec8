"""A reward of your own: a function of one prompt and its K completions that returns K verdicts, in order.

    reward:
      functions:
        - {name: accuracy}
        - {name: "examples/my_reward.py:short_answer", weight: 0.2, options: {limit: 300}}

`request` also has the gold `answer`, the further `columns` and the images (rewards/base.py). What cannot be judged
is `Verdict("unscorable", reason="...")`; an exception makes the group's verdicts `error`. Neither counts as a zero.
"""

from collections.abc import Sequence

from rewards.base import ScoringRequest
from rollout.types import Verdict


def short_answer(request: ScoringRequest, limit: int = 200) -> Sequence[Verdict]:
    """1 for a completion of at most `limit` characters, falling to 0 at twice that."""
    return [Verdict.scored(min(1.0, max(0.0, 2 - len(text) / limit))) for text in request.completions]

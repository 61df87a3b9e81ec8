"""A reward of your own: a function of the K completions of one prompt that returns K numbers, in order.

    reward:
      functions:
        - {name: accuracy}
        - {name: "examples/my_reward.py:short_answer", weight: 0.2, options: {limit: 300}}

It is called with what its parameters name: `completions`, `prompts`, `answer` and columns of the data (each a list of
K), and its options. None instead of a number says that a completion cannot be scored; an exception, a wrong count or a
NaN makes the verdicts `error`, silence makes them `timeout`; none of these counts as a zero. A function that takes
`request` gets the ScoringRequest of rewards/base.py instead, images and token ids included, and returns Verdicts.
"""

from collections.abc import Sequence


def short_answer(completions: Sequence[str], limit: int = 200) -> list[float]:
    """1 for a completion of at most `limit` characters, falling to 0 at twice that."""
    return [min(1.0, max(0.0, 2 - len(text) / limit)) for text in completions]

"""Your own reward: a function that takes the K completions of one prompt and returns K numbers, in order.

    reward:
      functions:
        - {name: accuracy}
        - {name: "examples/my_reward.py:short_answer", weight: 0.2, options: {limit: 300}}

The function gets the arguments that its parameters name: `completions`, `prompts`, `answer` and columns of the data
(each a list of K), and its options. It returns None for a completion that cannot be scored. An exception, a wrong count
or a NaN makes the verdicts `error`, and a time-out makes them `timeout`; neither counts as zero. A function that takes
`request` gets the ScoringRequest of rewards/base.py instead, with images and token ids, and returns Verdicts.
"""

from collections.abc import Sequence


def short_answer(completions: Sequence[str], limit: int = 200) -> list[float]:
    """1 for a completion of at most `limit` characters, falling to 0 at twice that."""
    return [min(1.0, max(0.0, 2 - len(text) / limit)) for text in completions]

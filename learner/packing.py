"""Which sample goes where: groups to ranks, completions behind a shared prompt, rows to micro-batches.

Pure functions of lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MICRO_BATCH_OVERHEAD = 256
"""What a micro-batch costs beyond its tokens, in tokens: its operators are launched, and its gradients added, once."""


def shard(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal groups of `tokens[i]` tokens out to ranks: indices of each rank's groups, ascending.

    Largest first, each to the rank with the least so far (ties to the lowest), which leaves no rank with more than
    4/3 of the best possible maximum."""
    if ranks < 1:
        raise ValueError(f"cannot deal groups out to {ranks} ranks")
    load = [0] * ranks
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shards[rank].append(index)
        load[rank] += tokens[index]
    return [sorted(members) for members in shards]


def share_prompt(prompt_length: int, lengths: Sequence[int], break_even: int, budget: int) -> list[list[int]]:
    """Which completions of `lengths[i]` tokens to lay behind one copy of their prompt, as the cheapest rows.

    A row of L tokens costs L (1 + L / break_even): linear layers, and attention over all pairs, which a mask does not
    spare; `break_even` is the length at which the two are equal. So long prompts are shared, and long completions are
    not. Completions of like length share a row; none has more than `budget` tokens unless a single completion has."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    before = np.cumsum([0, *(lengths[i] for i in order)])

    def cost(end: int) -> np.ndarray:
        tokens = prompt_length + before[end] - before[:end]
        tokens_cost = tokens * (1.0 + tokens / break_even)
        tokens_cost[:-1][tokens[:-1] > budget] = np.inf
        return tokens_cost

    return [[order[i] for i in run] for run in _cheapest_runs(len(order), cost)]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of rows of `lengths[i]` tokens, such that rows x longest <= `budget` in each.

    Rows are taken by descending length, so that neighbours need little padding, and cut where padding costs more than
    another micro-batch; rows of equal length keep their order, so that siblings stay together and share their images.
    Raises ValueError for a row over budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > budget:
        raise ValueError(
            f"a sample of {lengths[order[0]]} tokens does not fit a micro-batch of {budget} "
            "(learner.micro_batch_tokens): raise it, or lower the maximum lengths of prompts or completions"
        )
    longest = np.array([lengths[i] for i in order], np.int64)

    def cost(end: int) -> np.ndarray:
        padded = longest[:end] * np.arange(end, 0, -1)
        return np.where(padded <= budget, padded + MICRO_BATCH_OVERHEAD, np.inf)

    return [[order[i] for i in run] for run in _cheapest_runs(len(order), cost)]


def _cheapest_runs(count: int, cost: Callable[[int], np.ndarray]) -> list[range]:
    """0..count-1 cut into consecutive runs of the least total cost; `cost(end)[start]` is that of start..end-1."""
    best, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        total = best[:end] + cost(end)
        cut[end] = total.argmin()
        best[end] = total[cut[end]]
    runs, end = [], count
    while end:
        runs.append(range(int(cut[end]), end))
        end = int(cut[end])
    return runs[::-1]

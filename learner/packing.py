"""Which sample goes where: groups to ranks, samples to micro-batches. Pure functions of lengths."""

from __future__ import annotations

from collections.abc import Sequence


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


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of samples of `lengths[i]` tokens, such that samples x longest <= `budget` in each.

    Samples are taken by descending length, so that neighbours need little padding; samples of equal length keep
    their order, so that siblings stay together and share their images. Raises ValueError for a sample over budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > budget:
        raise ValueError(
            f"a sample of {lengths[order[0]]} tokens does not fit a micro-batch of {budget} "
            "(learner.micro_batch_tokens): raise it, or lower the maximum lengths of prompts or completions"
        )
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches

"""Decide which group goes where: groups to ranks, a rank's groups to micro-batches, a large group into parts.

    groups ─ shard ─▶ ranks ─ fewest_bins ─▶ micro-batches ─ balance ─▶ as many on every rank, of like cost

These are pure functions of sizes. Sizes are rows of an int array `[n, 4]`: language tokens, vision patches, logits rows
(tokens with a loss), and the bytes that these take. A micro-batch is a list of indices whose sizes sum up to at most
the limits, in each of the four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from learner.types import Size

EXACT_UP_TO = 10
"""Up to this many groups are packed by trying all ways."""
LOOKED_AT = 1000
"""This many groups are looked at to fill a micro-batch. Up to this many are packed in two ways, and dealt out to
micro-batches of like cost; the sums of more groups even out by themselves."""
MICRO_BATCH_OVERHEAD = 256
"""The cost of a micro-batch beyond its tokens, in tokens: launching its operators and adding its gradients."""
_DIMENSIONS = ("tokens", "patches", "logits rows", "bytes")


@dataclass(frozen=True, slots=True)
class GroupCost:
    """The time that a group takes, in tokens through the linear layers."""

    shares_prompts: bool
    break_even: int
    """A token that attends to this many tokens pays as much for attention as for its linear layers."""
    media: float = 0.0
    """The cost of the towers per token of an image, a video or a sound; 0 where they are cached."""

    def __call__(self, prompt: int, lengths: Sequence[int], media: float = 0.0) -> float:
        """The cost of a prompt with completions of `lengths`. `media` tokens of the prompt stand for media, which are
        encoded once. On average a token attends to half of its own sequence."""
        copies = 1 if self.shares_prompts else len(lengths)
        tokens = copies * prompt + sum(lengths)
        pairs = copies * prompt**2 / 2 + sum(n * prompt + n * n / 2 for n in lengths)
        return tokens + pairs / self.break_even + self.media * media


def shard(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal groups out to ranks. Returns the indices of each rank's groups, ascending.

    The largest goes first, each to the rank with the least so far (ties to the lowest), which leaves no rank with more
    than 4/3 of the best possible maximum (Graham, 1969)."""
    if ranks < 1:
        raise ValueError(f"cannot deal groups out to {ranks} ranks")
    load = [0.0] * ranks
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shards[rank].append(index)
        load[rank] += costs[index]
    return [sorted(members) for members in shards]


def split_group(prompt: Size, completions: Sequence[Size], limits: Size) -> list[list[int]]:
    """Split the completions of a group into parts that fit a micro-batch together with the prompt: one if possible.

    Raises ValueError where the prompt with a single completion does not fit."""
    if not completions:
        return []
    for completion in completions:
        _check_fits(Size(*np.add(prompt, completion)), limits)
    if (np.sum(completions, 0) + prompt <= limits).all():
        return [list(range(len(completions)))]
    room = Size(*np.subtract(limits, prompt))
    return fewest_bins(np.array(completions), room)


def fewest_bins(sizes: np.ndarray, limits: Size) -> list[list[int]]:
    """Pack groups into as few micro-batches as possible. The number is exact for up to 10 groups; for more, the better
    of two heuristics decides, and for thousands the faster one. Raises ValueError for a size over the limits."""
    if not len(sizes):
        return []
    for size in sizes[(sizes > limits).any(1)][:1]:
        _check_fits(size, limits)
    share = sizes / np.maximum(limits, 1)
    if len(sizes) <= EXACT_UP_TO:
        return _all_ways(share)
    if len(sizes) > LOOKED_AT:
        return _fill_one_by_one(share)
    return min(_best_fit(share), _fill_one_by_one(share), key=len)


def balance(
    bins: Sequence[Sequence[int]],
    sizes: np.ndarray,
    limits: Size,
    costs: Sequence[float],
    count: int,
    *,
    additive: bool = True,
) -> list[list[int]]:
    """Deal the groups of `bins` out to `count` micro-batches of like cost, the costliest first; `count` is no less than
    the number of bins. Ranks that each have `count` micro-batches then finish at about the same time. A micro-batch is
    empty only if there are fewer groups.

    If `additive`, any groups whose sizes sum up to no more than the limits may be together; if not (padding), only
    groups that are together in `bins`."""
    dealt = _deal(sizes, limits, costs, count) if additive and len(sizes) <= LOOKED_AT else None
    dealt = dealt or [list(members) for members in bins]
    while len(dealt) < count:
        dealt.sort(key=lambda members: (len(members) > 1, sum(costs[i] for i in members)))
        costliest = dealt.pop() if dealt and len(dealt[-1]) > 1 else []
        halves = shard([costs[i] for i in costliest], 2) if costliest else [[]]
        dealt += [[costliest[i] for i in half] for half in halves]
    return sorted((sorted(members) for members in dealt), key=lambda members: -sum(costs[i] for i in members))


def pack_padded(sizes: np.ndarray, limits: Size) -> list[list[int]]:
    """Pack rows that are padded to the longest among them: rows x longest stays within the limit of tokens.

    Rows are taken by descending length, so that neighbours need little padding, and cut where padding costs more than
    another micro-batch; rows of equal length keep their order, so that siblings stay together and share their images.
    Raises ValueError for a row over the limits."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i))
    for i in order:
        _check_fits(sizes[i], limits)
    ordered = np.array([sizes[i] for i in order], np.int64).reshape(-1, len(limits))
    before = np.cumsum(np.vstack([np.zeros((1, len(limits)), np.int64), ordered]), 0)

    def cost(end: int) -> np.ndarray:
        # No more rows than fit if all were as short as the last, which is the shortest.
        first = max(0, end - limits.tokens // max(1, int(ordered[end - 1, 0])))
        padded = ordered[first:end, 0] * np.arange(end - first, 0, -1)
        fits = (padded <= limits.tokens) & ((before[end] - before[first:end])[:, 1:] <= limits[1:]).all(1)
        return np.where(fits, padded + MICRO_BATCH_OVERHEAD, np.inf)

    return [[order[i] for i in run] for run in cheapest_runs(len(order), cost)]


def cheapest_runs(count: int, cost: Callable[[int], np.ndarray]) -> list[range]:
    """Cut 0..count-1 into consecutive runs of the least total cost. `cost(end)` gives the costs of start..end-1 for the
    last starts before `end`, as many as are worth trying."""
    best, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        costs = cost(end)
        first = end - len(costs)
        total = best[first:end] + costs
        cut[end] = first + total.argmin()
        best[end] = total[cut[end] - first]
    runs, end = [], count
    while end:
        runs.append(range(int(cut[end]), end))
        end = int(cut[end])
    return runs[::-1]


def _check_fits(size: Sequence[int], limits: Size) -> None:
    for name, has, limit in zip(_DIMENSIONS, size, limits, strict=True):
        if has > limit:
            raise ValueError(
                f"a prompt with one completion has {has} {name}, a micro-batch takes {limit}: raise "
                "learner.micro_batch, or lower the maximum lengths of prompts or completions"
            )


def _all_ways(share: np.ndarray) -> list[list[int]]:
    """Find the fewest bins of capacity 1 for shares `[n, d]`, by dynamic programming over all sets of groups."""
    everything = (1 << len(share)) - 1
    load = np.zeros((everything + 1, share.shape[1]))
    for i in range(len(share)):
        load[1 << i : 2 << i] = load[: 1 << i] + share[i]
    fits: list[bool] = np.all(load <= 1 + 1e-9, axis=1).tolist()
    bins, last = [0] + [len(share) + 1] * everything, [0] * (everything + 1)
    for members in range(1, everything + 1):
        lowest = members & -members
        rest = others = members ^ lowest
        while True:  # every set that holds the lowest of `members`
            chosen = others | lowest
            if fits[chosen] and bins[rest ^ others] + 1 < bins[members]:
                bins[members], last[members] = bins[rest ^ others] + 1, chosen
            if not others:
                break
            others = (others - 1) & rest
    found = []
    while everything:
        found.append([i for i in range(len(share)) if last[everything] >> i & 1])
        everything ^= last[everything]
    return found


def _best_fit(share: np.ndarray) -> list[list[int]]:
    """Put every group, by descending size, into the bin that it fills most, all dimensions summed up."""
    room = np.ones((len(share), share.shape[1]))
    bins: list[list[int]] = []
    for index in np.argsort(-share.max(1), kind="stable"):
        left = room[: len(bins)] - share[index]
        fitting = np.flatnonzero((left >= -1e-9).all(1))
        at = int(fitting[left[fitting].sum(1).argmin()]) if len(fitting) else len(bins)
        if at == len(bins):
            bins.append([])
        bins[at].append(int(index))
        room[at] -= share[index]
    return bins


def _fill_one_by_one(share: np.ndarray) -> list[list[int]]:
    """Fill one bin after the other, each with the group whose size points most where there is room: the largest dot
    product, with dimensions weighted by how much all groups take of them (Panigrahy et al., 2011, "Heuristics for
    vector bin packing"). Only LOOKED_AT groups are looked at, drawn at random."""
    queue = np.random.default_rng(0).permutation(len(share))
    seen, queue = queue[:LOOKED_AT], queue[LOOKED_AT:]
    weight = share.mean(0)
    bins: list[list[int]] = []
    while len(seen):
        candidates, room = share[seen], np.ones(share.shape[1])
        chosen: list[int] = []
        while (fits := (candidates <= room + 1e-9).all(1)).any():
            at = int(np.where(fits, candidates @ (weight * room), -1.0).argmax())
            chosen.append(at)
            room = room - candidates[at]
            candidates[at] = 2.0  # more than any bin has
        bins.append(seen[chosen].tolist())
        seen = np.concatenate([np.delete(seen, chosen), queue[: len(chosen)]])
        queue = queue[len(chosen) :]
    return bins


def _deal(sizes: np.ndarray, limits: Size, costs: Sequence[float], count: int) -> list[list[int]] | None:
    """Deal the costliest group first, each to the cheapest of `count` bins with room for it. Returns None if a group
    finds no room."""
    if len(sizes) < count:
        return None
    room, load = np.tile(np.array(limits), (count, 1)), np.zeros(count)
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = (room >= sizes[index]).all(1)
        if not fitting.any():
            return None
        at = int(np.where(fitting, load, np.inf).argmin())
        bins[at].append(index)
        room[at] -= sizes[index]
        load[at] += costs[index]
    return bins

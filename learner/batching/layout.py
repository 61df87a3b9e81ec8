"""The order of tokens in a packed row: each prompt, then its completions one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from vlm.batch import GroupLengths


def labels(groups: Sequence[GroupLengths]) -> tuple[Tensor, Tensor]:
    """Segment and group of each token, int64 `[T]`. The segment is 0 in prompts, and k in a group's k-th completion."""
    lengths = [[prompt, *completions] for prompt, completions in groups]
    segment = [np.repeat(np.arange(len(own)), own) for own in lengths]
    group = np.repeat(np.arange(len(lengths)), [sum(own) for own in lengths])
    return torch.from_numpy(np.concatenate(segment)), torch.from_numpy(group)


def predicting_position(groups: Sequence[GroupLengths]) -> Tensor:
    """int64 `[T]`: the place whose hidden state predicts the token at t: the place before t, but the prompt's last
    for the first token of each completion. For a prompt's first token, which nothing predicts, it means nothing."""
    before = np.arange(-1, sum(p + sum(c) for p, c in groups) - 1)
    for prompt, completions in spans(groups):
        for span in filter(len, completions):
            before[span.start] = prompt.stop - 1
    return torch.from_numpy(before).clamp(min=0)


def position_shift(groups: Sequence[GroupLengths]) -> Tensor:
    """int64 `[T]`: the lengths of the completions before a token's own. Subtracted from its distance from the start of
    the group, they let every completion follow the prompt directly."""
    shifts = [np.repeat([0, *accumulate((0, *own))][: len(own) + 1], [p, *own]) for p, own in groups]
    return torch.from_numpy(np.concatenate(shifts))


def spans(groups: Sequence[GroupLengths]) -> list[tuple[range, list[range]]]:
    """The places of each group's prompt and completions in the row."""
    found, at = [], 0
    for prompt, completions in groups:
        ends = list(accumulate((at + prompt, *completions)))
        found.append((range(at, ends[0]), [range(a, b) for a, b in pairwise(ends)]))
        at = ends[-1]
    return found

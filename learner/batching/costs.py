"""The time that groups and rows take, for dealing them out alike. Sizes, which limits hold for, are in `rows.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from learner.batching.packing import GroupCost
from learner.batching.rows import TrainingRow, shares_prompts
from vlm.adapter import MultimodalAdapter


def group_cost(adapter: MultimodalAdapter, media_cost: float) -> GroupCost:
    """The cost of groups for this model. `media_cost` is the engine's.

    A token attends to four times the model's width at the price of its linear layers: 6 H^2 + 9 H I multiplications
    against 2 H per token attended to and layer would say five to seven at equal rates, but attention's is the lower."""
    hidden = int(adapter.model_config.get_text_config().hidden_size)
    return GroupCost(shares_prompts(adapter), 4 * hidden, media_cost)


def row_costs(rows: Sequence[TrainingRow], adapter: MultimodalAdapter, media_cost: float) -> list[float]:
    """The cost of each row. `media_cost` is the engine's."""
    cost, places = group_cost(adapter, media_cost), list(adapter.placeholder_ids.values())
    # Padded siblings have their images encoded once.
    siblings = Counter({} if shares_prompts(adapter) else (id(row.prompt) for row in rows))
    return [
        cost(
            len(row.prompt.input_ids),
            [len(s) for s in row.samples],
            np.isin(row.prompt.input_ids, places).sum() / max(1, siblings[id(row.prompt)]),
        )
        for row in rows
    ]

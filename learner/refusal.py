"""Optimizer steps that were not taken, as the loss or the gradient was not finite: which, why, what to look at.

engine.train_step ─▶ StepResult(taken=False) ─▶ refused_step on every rank ─▶ joined ─▶ UpdateStats.refused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from learner.types import RefusedStep
from rollout.types import PromptRef

if TYPE_CHECKING:
    from learner.engines.protocol import StepResult


def refused_step(
    position: int, result: StepResult, tokens: float, prompts: Sequence[Sequence[PromptRef]]
) -> RefusedStep:
    """As one rank sees it. `tokens`: trained in the step, over all ranks; `prompts`: of this rank's micro-batches."""
    terms = {name for names in result.not_finite.values() for name in names}
    suspects = [ref for i in result.not_finite if i < len(prompts) for ref in prompts[i]]
    gap = result.sums.get("mismatch_mean", 0.0) / tokens
    return RefusedStep(
        position, tuple(sorted(terms)), tuple(dict.fromkeys(suspects)), result.loss, result.grad_norm, gap
    )


def joined(ranks: Sequence[Sequence[RefusedStep]], prompts: Sequence[Sequence[PromptRef]]) -> tuple[RefusedStep, ...]:
    """Join what all ranks saw of the same steps. `prompts` are those of each step of the update, over all ranks."""
    return tuple(
        replace(
            seen[0],
            terms=tuple(sorted({name for own in seen for name in own.terms})),
            suspects=tuple(dict.fromkeys(ref for own in seen for ref in own.suspects)),
            prompts=tuple(prompts[seen[0].position]),
        )
        for seen in zip(*ranks, strict=True)
    )

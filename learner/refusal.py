"""Optimizer steps that were not taken, as the loss or the gradient was not finite: which, why, what to look at.

engine.train_step ─▶ StepResult(taken=False) ─▶ refused_step on every rank ─▶ joined ─▶ UpdateStats.refused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rollout.types import PromptRef

if TYPE_CHECKING:
    from learner.engine import StepResult

MOST_NAMED = 8
"""Prompts that a description names."""


@dataclass(frozen=True, slots=True)
class RefusedStep:
    """Weights, moments and schedule are as they were before it, and none of its prompts was trained."""

    position: int
    """Which of the update's `optimizer_steps` it is."""
    terms: tuple[str, ...]
    """Terms of the loss that were not finite; empty: only the gradient was not."""
    suspects: tuple[PromptRef, ...]
    """Prompts of the micro-batches whose terms were not finite."""
    loss: float
    grad_norm: float
    mismatch: float
    """Mean |log-probability of the learner - of the engine|."""
    prompts: tuple[PromptRef, ...] = ()
    """All prompts of the step."""

    @property
    def reason(self) -> str:
        """Why its prompts were not trained, the same for all of a kind."""
        return f"its optimizer step was not taken: {', '.join(self.terms) or 'the gradient'} not finite"

    def __str__(self) -> str:
        named = ", ".join(map(str, (self.suspects or self.prompts)[:MOST_NAMED]))
        return (
            f"the gradient is not finite, so the step was not taken: weights, optimizer and schedule are unchanged. "
            f"Not finite: {', '.join(self.terms) or 'the norm of the gradient'} (loss {self.loss:g}, gradient norm "
            f"{self.grad_norm:g}). Look at scores and completions of the prompts {named}, and at mismatch_mean, "
            f"{self.mismatch:.3g} in this step: engine and learner should agree"
        )


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
    """What all ranks saw of the same steps. `prompts`: of each of the update's steps, over all ranks."""
    return tuple(
        replace(
            seen[0],
            terms=tuple(sorted({name for own in seen for name in own.terms})),
            suspects=tuple(dict.fromkeys(ref for own in seen for ref in own.suspects)),
            prompts=tuple(prompts[seen[0].position]),
        )
        for seen in zip(*ranks, strict=True)
    )

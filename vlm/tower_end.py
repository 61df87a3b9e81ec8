"""Where a tower ends and its projector begins: the tower outputs are collected there, and can stand in for the tower.

media ─▶ tower ─▶ tower outputs ─▶ projector        `collecting`: when an item is not cached yet
    (skipped) cached tower outputs ─▶ projector     `standing_in`: in every pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm.encoding import FeatureRow


@dataclass(frozen=True)
class TowerEnd:
    """The modules at the end of a tower, all called once and in this order."""

    sources: tuple[nn.Module, ...]
    """The modules whose outputs the projector takes."""
    skipped: tuple[nn.Module, ...] = ()
    """The modules between them. Each takes an output of the module before it and makes the input of the next."""
    layers: tuple[int, ...] | None = None
    """The layers whose hidden states are used, where an output has those of all layers; empty: the last hidden state is
    used. None: the output is one tensor."""

    def is_trained(self) -> bool:
        return any(p.requires_grad for module in (*self.sources, *self.skipped) for p in module.parameters())

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Yield a list that is filled with the tower outputs when the tower runs."""
        outputs: list[Tensor] = []

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            outputs.extend(tensor.detach() for tensor in self._used(output))

        handles = [module.register_forward_hook(collect) for module in self.sources]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def standing_in(self, outputs: FeatureRow) -> Iterator[None]:
        """Let the tower return `outputs` instead of running. Every module is still called, but not the modules inside
        it.

        When they are called, RuntimeError is raised if something before them is trained: it would get no gradient."""
        size = len(self.layers or (0,))
        with ExitStack() as stack:
            for module in self.skipped:
                stack.enter_context(_replaced(module, lambda hidden: hidden))
            for i, module in enumerate(self.sources):
                given = self._output(outputs[i * size : (i + 1) * size])
                stack.enter_context(_replaced(module, partial(_given, given)))
            yield

    def _used(self, output: Any) -> tuple[Tensor, ...]:
        if self.layers is None:
            return (output,)
        if not self.layers:
            return (output.last_hidden_state,)
        return tuple(output.hidden_states[layer] for layer in self.layers)

    def _output(self, used: FeatureRow) -> Any:
        """Return the output in the form that the family's code reads. Reading a part that was not collected raises an
        error."""
        if self.layers:
            states: Any = dict(zip(self.layers, used, strict=True))
            return BaseModelOutputWithPooling(hidden_states=states)
        (only,) = used
        return only if self.layers is None else BaseModelOutputWithPooling(last_hidden_state=only)


def _given(output: Any, hidden: Any) -> Any:
    return output


@contextmanager
def _replaced(module: nn.Module, forward: Callable[[Any], Any]) -> Iterator[None]:
    """`forward` takes the first positional argument, if there is one."""
    own = module.__dict__.get("forward")

    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
            raise RuntimeError(
                f"the input of {type(module).__name__} depends on a parameter that is trained, but its tower counts as "
                "frozen: the adapter's `roles` do not name that parameter as part of the tower"
            )
        return forward(args[0] if args else None)

    module.forward = checked
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

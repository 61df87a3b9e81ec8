"""Where a tower ends and the projector begins: what modules gave there is recorded, and given again in their place.

media ─▶ tower ─▶ recorded outputs ─▶ projector        once for each item
         (skipped) replayed outputs ─▶ projector        in every pass
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
    """The modules that a tower consists of from some point on, all of them called once and in this order."""

    recorded: tuple[nn.Module, ...]
    """Those whose outputs the projector takes."""
    skipped: tuple[nn.Module, ...] = ()
    """Those between them, called with one's output and giving the next one's input."""
    layers: tuple[int, ...] | None = None
    """What is used of an output with hidden states of all layers: those of these, or the last hidden state if there are
    none here. None: the output is one tensor."""

    def is_trained(self) -> bool:
        return any(p.requires_grad for module in (*self.recorded, *self.skipped) for p in module.parameters())

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """A list that has, once the tower ran, what `replaying` takes."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.extend(tensor.detach() for tensor in self._used(output))

        handles = [module.register_forward_hook(keep) for module in self.recorded]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, outputs: FeatureRow) -> Iterator[None]:
        """The tower gives `outputs` in place of running. Every module is still called, without those inside it.

        Raises RuntimeError, when they are called, if something before them is trained: it would get no gradient."""
        size = len(self.layers or (0,))
        with ExitStack() as stack:
            for module in self.skipped:
                stack.enter_context(_replaced(module, lambda hidden: hidden))
            for i, module in enumerate(self.recorded):
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
        """As the family's own code reads it: whoever asks for what was not recorded gets an error."""
        if self.layers:
            states: Any = dict(zip(self.layers, used, strict=True))
            return BaseModelOutputWithPooling(hidden_states=states)
        (only,) = used
        return only if self.layers is None else BaseModelOutputWithPooling(last_hidden_state=only)


def _given(output: Any, hidden: Any) -> Any:
    return output


@contextmanager
def _replaced(module: nn.Module, forward: Callable[[Any], Any]) -> Iterator[None]:
    """`forward`: of the first positional argument, if there is one."""
    own = module.__dict__.get("forward")

    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
            raise RuntimeError(
                f"what {type(module).__name__} takes depends on a parameter that is trained, but its tower counts as "
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

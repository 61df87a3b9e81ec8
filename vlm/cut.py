"""Where a tower ends and the projector begins: what modules gave there is recorded, and given again in their place.

media ─▶ tower ─▶ recorded outputs ─▶ projector        once for each item
         (skipped) replayed outputs ─▶ projector        in every pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm.encoded import FeatureRow


@dataclass(frozen=True)
class TowerEnd:
    """The modules that a tower consists of from some point on, all of them called once and in this order."""

    recorded: tuple[nn.Module, ...]
    """Those whose outputs the projector takes."""
    skipped: tuple[nn.Module, ...] = ()
    """Those between them, called with one's output and giving the next one's input."""
    layers: tuple[int, ...] = ()
    """Of an output that may have hidden states of all layers: those used. Empty: the output is one tensor."""

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
        """The tower gives `outputs` in place of running. Every module is still called, without those inside it."""
        size = len(outputs) // len(self.recorded)
        with ExitStack() as stack:
            for module in self.skipped:
                stack.enter_context(_replaced(module, lambda hidden, *_, **__: hidden))
            for i, module in enumerate(self.recorded):
                given = self._output(outputs[i * size : (i + 1) * size])
                stack.enter_context(_replaced(module, lambda *_, given=given, **__: given))
            yield

    def _used(self, output: Any) -> tuple[Tensor, ...]:
        if not self.layers:
            return (output,)
        if output.hidden_states is None:
            return (output.last_hidden_state,)
        return tuple(output.hidden_states[layer] for layer in self.layers)

    def _output(self, used: FeatureRow) -> Any:
        """As the family's own code reads it: whoever asks for a layer that was not recorded gets an error."""
        if not self.layers:
            return used[0]
        states: Any = dict(zip(self.layers, used, strict=True))
        return BaseModelOutputWithPooling(last_hidden_state=used[0], hidden_states=states)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

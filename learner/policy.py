"""PolicyModule: from a MultimodalBatch to the log-probabilities of its tokens. The one forward that engines wrap.

    batch ─▶ vision tower (each distinct image once) ─▶ language model ─▶ hidden rows of trained tokens ─▶ head

Everything happens inside `forward`, because a wrapper such as DeepSpeed gathers and releases parameters around it:
nobody calls an inner module past it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.attention import position_shift, predicting_position, shared_prompt_mask
from learner.logprobs import LogprobHead
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch


class PolicyModule(nn.Module):
    """A Hugging Face model (or a peft model around one) that gives log-probabilities instead of logits."""

    def __init__(self, model: Any, adapter: MultimodalAdapter, *, temperature: float, chunk_rows: int) -> None:
        """`temperature` and the adapter's banned tokens shape the distribution as the engine's sampler does.

        Raises ValueError for a model whose logits are not a plain linear projection of its hidden states."""
        super().__init__()
        self.model = model
        self.adapter = adapter
        head = self.base.get_output_embeddings()
        _check_head(self.base, head)
        self.head = LogprobHead(head, banned=adapter.banned_token_ids, temperature=temperature, chunk_rows=chunk_rows)
        self._dummy = adapter.dummy_prompt()
        # Kept here because ZeRO-3 gathers a parameter, collectively, whenever a forward as much as looks at it.
        self._dtype = head.weight.dtype

    @property
    def base(self) -> Any:
        """The Hugging Face model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: MultimodalBatch, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """`(log-probabilities, entropies)`, float32 `[B, L]`, aligned with `batch.input_ids`; 0 outside `loss_mask`.

        `reference`: with the LoRA adapter switched off. The result always hangs on every parameter that the model
        uses, vision tower included, be there an image, a trained token, or not."""
        rows, length = batch.input_ids.shape
        inputs = self._with_image(batch)
        off = self.model.disable_adapter() if reference and hasattr(self.model, "disable_adapter") else nullcontext()
        with off:
            backbone = self.base.base_model
            hidden = backbone(**self._model_kwargs(backbone, inputs), use_cache=False).last_hidden_state
            row, at = batch.loss_mask.nonzero(as_tuple=True)
            if batch.segments is None:
                source = at - 1
            else:
                source = predicting_position(batch.segments)[row, at]
            logprobs, entropy = self.head(hidden[row, source], batch.input_ids[row, at])
        place = (row, at)
        zeros = logprobs.new_zeros(rows, length)
        return zeros.index_put(place, logprobs), zeros.index_put(place, entropy)

    def _with_image(self, batch: MultimodalBatch) -> MultimodalBatch:
        """`batch` as it is, or with one more row, a small prompt with an image that nothing is trained on.

        Under ZeRO-3 every rank must run the vision tower in every pass, or the others wait for it for ever."""
        dummy = self._dummy
        if dummy is None or batch.pixel_values is not None:
            return batch
        extra = max(0, len(dummy.input_ids) - batch.input_ids.shape[1])
        device = batch.input_ids.device
        width = batch.input_ids.shape[1] + extra

        def extend(values: Tensor, fill: int, last: Tensor) -> Tensor:
            last = F.pad(last.to(device), (0, width - len(last)), value=fill)
            return torch.cat([F.pad(values, (0, extra), value=fill), last[None]])

        ones = torch.ones_like(dummy.input_ids)
        input_ids = extend(batch.input_ids, self.adapter.pad_token_id, dummy.input_ids)
        pixels, media = self.adapter.join([dummy])
        return MultimodalBatch(
            input_ids=input_ids,
            attention_mask=extend(batch.attention_mask, 0, ones),
            loss_mask=torch.zeros_like(input_ids, dtype=torch.bool),
            segments=None if batch.segments is None else extend(batch.segments, -1, 0 * ones),
            pixel_values=pixels,
            extra_model_kwargs={**media, **self.adapter.token_inputs(input_ids)},
        ).to(device, self._dtype)

    def _model_kwargs(self, backbone: Any, batch: MultimodalBatch) -> dict[str, Any]:
        """What the model's forward takes, with images encoded once each and with shared prompts laid out.

        The vision tower always runs first and apart: the order of modules must not differ between ranks either."""
        kwargs = batch.model_kwargs()
        if batch.pixel_values is not None:
            distinct = {key: kwargs[key] for key in self.adapter.image_kwargs}
            encoded = backbone.get_image_features(kwargs.pop("pixel_values"), **distinct, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": encoded}
            for key in distinct.keys() - set(self.adapter.position_kwargs):
                del kwargs[key]
            if batch.image_index is not None:
                self.adapter.repeat_features(encoded, batch.image_index)
                kwargs.update({key: distinct[key][batch.image_index] for key in self.adapter.position_kwargs})
        if batch.segments is not None:
            positions = self.adapter.position_ids(backbone, batch.input_ids, batch.attention_mask, kwargs)
            kwargs["position_ids"] = positions - position_shift(batch.segments)
            kwargs["attention_mask"] = shared_prompt_mask(batch.segments)
        return kwargs


def attention_break_even(model_config: Any) -> int:
    """Row length at which attention over all pairs costs as much as the linear layers: four times the width.

    The arithmetic says 1.15 H + 1.5 I for width H and intermediate size I; attention under an explicit mask runs at a
    fraction of a matrix product's rate, which brings the usual I = 2..5 H down to this."""
    return 4 * int(model_config.get_text_config().hidden_size)


def _check_head(model: Any, head: Any) -> None:
    if model.base_model is model or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no separate linear head, which log-probabilities come from")
    text = model.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        value = getattr(text, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"{type(model).__name__} transforms its logits ({name}={value}); the learner would compute other "
                "log-probabilities than the engine"
            )

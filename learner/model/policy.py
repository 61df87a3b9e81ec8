"""PolicyModule: from a MultimodalBatch to the log-probabilities of its tokens. The one forward that engines wrap.

    batch ─▶ vision tower (each prompt's images once) ─▶ language model ─▶ hidden rows of trained tokens ─▶ head

Everything happens inside `forward`, because a wrapper such as DeepSpeed gathers and releases parameters around it:
nobody calls an inner module past it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.batching.layout import predicting_position
from learner.model.attention import AttentionBackend, packed_kwargs
from learner.model.cached import Cached, what_is_cached
from learner.model.logprobs import LogprobHead
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from vlm.media_cost import patches_per_token
from vlm.parameter_names import THROUGH, part_of, tower_part


class PolicyModule(nn.Module):
    """A Hugging Face model (or a peft model around one) that gives log-probabilities instead of logits."""

    def __init__(
        self,
        model: Any,
        adapter: MultimodalAdapter,
        *,
        temperature: float,
        media_kinds: Sequence[MediaKind] = ("image",),
    ) -> None:
        """`temperature` and the adapter's banned tokens shape the distribution as the engine's sampler does.
        `media_kinds`: what batches of the run may hold, on any rank.

        Raises ValueError for a model whose logits are not a plain linear projection of its hidden states."""
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.attention: AttentionBackend = "auto"
        head = self.base.get_output_embeddings()
        _check_head(self.base, head, adapter)
        self.head = LogprobHead(head, banned=adapter.banned_token_ids, temperature=temperature)
        used = {adapter.modalities[kind].inputs[0] for kind in media_kinds if kind in adapter.modalities}
        self._dummies = {kind: _dummy(adapter, kind) for kind, m in adapter.towers().items() if m.inputs[0] in used}
        # Read now because ZeRO-3 gathers a parameter, collectively, whenever a forward as much as looks at it.
        self._dtype = head.weight.dtype
        self.cached: Mapping[MediaKind, Cached] = self._what_is_cached()
        """Kind of cached values for the media that the run may hold, by kind of tower."""

    @property
    def base(self) -> Any:
        """The Hugging Face model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self, batch: MultimodalBatch, *, reference: bool = False, towers_only: bool = False
    ) -> tuple[Tensor, Tensor] | dict[MediaKind, list[FeatureRow]]:
        """`(log-probabilities, entropies)`, float32 `[B, L]`, aligned with `batch.input_ids`; 0 outside `loss_mask`.

        `reference`: with the LoRA adapter switched off. The result always hangs on every parameter that the model
        uses, vision tower included, be there an image, a trained token, or not.

        `towers_only`: the language model does not run. The result is what will be cached of the batch's media, row by
        row. A batch whose tower outputs are wanted must hold exactly one item."""
        if towers_only:
            return self._run_towers(batch)
        rows, length = batch.input_ids.shape
        inputs = self._with_all_media(batch)
        off = self.model.disable_adapter() if reference and hasattr(self.model, "disable_adapter") else nullcontext()
        with off:
            hidden = self.adapter.hidden_states(self.base, **self._model_kwargs(inputs))
            row, at = batch.loss_mask.nonzero(as_tuple=True)
            source = at - 1 if batch.groups is None else predicting_position(batch.groups).to(at.device)[at]
            logprobs, entropy = self.head(hidden[row, source], batch.input_ids[row, at])
        place = (row, at)
        zeros = logprobs.new_zeros(rows, length)
        return zeros.index_put(place, logprobs), zeros.index_put(place, entropy)

    def media_features(self, batch: MultimodalBatch) -> dict[Any, Any]:
        """The features of the batch's distinct media by kind: cached ones, and those that are computed now.

        Every tower that the batch has inputs for runs once, in the adapter's order; where the batch has cached tower
        outputs, only the projector runs."""
        backbone = self.base.base_model
        features = {kind: self.adapter.join_features(rows) for kind, rows in batch.cached_features.items() if rows}
        for kind in self.adapter.towers():
            if own := self._inputs_of(kind, batch):
                with self._standing_in(batch.cached_tower_outputs.get(kind)):
                    features[kind] = self.adapter.media_features(backbone, kind, own)
        return features

    def _standing_in(self, outputs: Sequence[FeatureRow] | None) -> AbstractContextManager[None]:
        """Let cached tower outputs, if there are any, stand in for the tower."""
        if outputs is None:
            return nullcontext()
        end = self.adapter.tower_end(self.base.base_model)
        assert end is not None
        return end.standing_in(self.adapter.join_tower_outputs(outputs))

    def _run_towers(self, batch: MultimodalBatch) -> dict[MediaKind, list[FeatureRow]]:
        """Compute the values of the batch's media that will be cached."""
        kinds = [kind for kind, what in self.cached.items() if what == "tower outputs"]
        if wanted := [kind for kind in kinds if self._inputs_of(kind, batch)]:
            return {kind: [self._tower_outputs(batch)] for kind in wanted}
        features = self.media_features(batch)
        return {kind: self.adapter.cut_features(of_kind) for kind, of_kind in features.items()}

    def _inputs_of(self, kind: MediaKind, batch: MultimodalBatch) -> dict[str, Any]:
        """Return the inputs of the tower of a kind; empty if the batch has none of that kind."""
        given, names = batch.model_kwargs(), self.adapter.modalities[kind].inputs
        return {name: given[name] for name in names} if names[0] in given else {}

    @torch.no_grad()
    def _tower_outputs(self, batch: MultimodalBatch) -> FeatureRow:
        end = self.adapter.tower_end(self.base.base_model)
        assert end is not None
        with end.collecting() as outputs:
            self.media_features(batch)
        return tuple(outputs)

    @cached_property
    def media_cost(self) -> float:
        """Return the cost of the towers for a token of media, in tokens of the language model. It is estimated from the
        elements of their linear layers, for the costliest kind that the run may hold. Cached towers cost nothing."""
        passed: Counter[str] = Counter()
        for name, module in self.base.named_modules():
            if isinstance(module, nn.Linear) and module is not self.base.get_output_embeddings():
                passed[part_of(self.adapter.role(f"{name}.weight"))] += module.in_features * module.out_features
        kinds = set(self._dummies) - set(self.cached)
        costs = [passed[tower_part(k)] * patches_per_token(self.adapter, k) / passed["language"] for k in kinds]
        return max(costs, default=0.0)

    def _what_is_cached(self) -> dict[MediaKind, Cached]:
        """Decide what is cached of each kind of media that the run may hold, from what is trained of the model."""
        trained: dict[str, bool] = {}
        for name, parameter in self.base.named_parameters():
            part = self.adapter.role(name)
            trained[part] = trained.get(part, False) or parameter.requires_grad
        end = self.adapter.tower_end(self.base.base_model) if self._dummies else None
        found = {
            kind: what_is_cached(
                # A tower that no parameter is said to belong to may hide among those of the language model.
                tower_trained=trained.get(tower_part(kind), True),
                projector_trained=trained.get("projector", False) and kind in THROUGH["projector"],
                knows_tower_end=end is not None and not end.is_trained(),
            )
            for kind in self._dummies
        }
        return {kind: what for kind, what in found.items() if what is not None}

    def _with_all_media(self, batch: MultimodalBatch) -> MultimodalBatch:
        """`batch` as it is, or with more rows, small prompts with media that it lacks and that nothing is trained on.

        Under ZeRO-3 every rank must run the same towers in every pass, or the others wait for it for ever. No rank runs
        the tower of a kind whose features are cached."""
        given = batch.model_kwargs()
        for kind, (dummy, positions) in self._dummies.items():
            if self.adapter.modalities[kind].inputs[0] not in given and kind not in batch.cached_features:
                batch = _with_prompt(batch, dummy, positions, self.adapter).to(batch.input_ids.device, self._dtype)
        return batch

    def _model_kwargs(self, batch: MultimodalBatch) -> dict[str, Any]:
        """Return the inputs of the model's forward, with each item of media encoded once and shared prompts laid out.

        The towers always run first and separately: the order of modules must not differ between ranks either."""
        features = self.media_features(batch)
        for kind, index in batch.media_index.items():
            self.adapter.repeat_features(features[kind], index)
        consumed = {name for m in self.adapter.modalities.values() for name in (*m.inputs, *m.positions)}
        kwargs = {name: value for name, value in batch.model_kwargs().items() if name not in consumed}
        if features:
            kwargs["mm_encoder_outputs"] = features  # the name that transformers has for them
        if batch.groups is not None:
            kwargs |= packed_kwargs(batch.groups, batch.input_ids.device, self.attention)
        return kwargs


def _with_prompt(
    batch: MultimodalBatch, prompt: EncodedPrompt, positions: Tensor, adapter: MultimodalAdapter
) -> MultimodalBatch:
    """A prompt without completions more, with `positions` `[1, T]` or `[3, 1, T]`; what is not for the model is left
    out."""
    packed = batch.groups is not None
    extra = 0 if packed else max(0, len(prompt.input_ids) - batch.input_ids.shape[1])
    device = batch.input_ids.device
    width = batch.input_ids.shape[1] + extra

    def extend(values: Tensor, fill: int, last: Tensor) -> Tensor:
        if packed:
            return torch.cat([values, last.to(device)], dim=-1)
        last = F.pad(last.to(device), (0, width - last.shape[-1]), value=fill)
        return torch.cat([F.pad(values, (0, extra), value=fill), last], dim=-2)

    ids = prompt.input_ids[None]
    ones = torch.ones_like(ids)
    input_ids = extend(batch.input_ids, adapter.pad_token_id, ids)
    pixels = prompt.inputs.get("pixel_values", batch.pixel_values)
    others = {name: value for name, value in prompt.inputs.items() if name != "pixel_values"}
    return MultimodalBatch(
        input_ids=input_ids,
        attention_mask=extend(batch.attention_mask, 0, ones),
        loss_mask=torch.zeros_like(input_ids, dtype=torch.bool),
        groups=None if batch.groups is None else (*batch.groups, (len(prompt.input_ids), ())),
        position_ids=None if batch.position_ids is None else extend(batch.position_ids, 0, positions),
        pixel_values=pixels,
        media_index=batch.media_index,
        cached_features=batch.cached_features,
        cached_tower_outputs=batch.cached_tower_outputs,
        extra_model_kwargs={**batch.extra_model_kwargs, **others, **adapter.token_inputs(input_ids)},
    )


def _dummy(adapter: MultimodalAdapter, kind: MediaKind) -> tuple[EncodedPrompt, Tensor]:
    """A small prompt with media of a kind, and its positions."""
    prompt = adapter.dummy_prompt(kind)
    ids = prompt.input_ids[None]
    return prompt, adapter.position_ids(ids, torch.ones_like(ids), prompt.inputs)


def _check_head(model: Any, head: Any, adapter: MultimodalAdapter) -> None:
    inseparable = model.base_model is model and type(adapter).hidden_states is MultimodalAdapter.hidden_states
    if inseparable or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no separate linear head, which log-probabilities come from")
    text = model.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        value = getattr(text, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"{type(model).__name__} transforms its logits ({name}={value}); the learner would compute other "
                "log-probabilities than the engine"
            )

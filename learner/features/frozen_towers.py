"""Towers that no step changes run ahead of the language model, once for each distinct item, on all ranks in step.

groups ─▶ items without cached features ─▶ tower batches, as many on every rank ─▶ FeatureCache ─▶ prompts that
          carry features in place of pixels: no tower runs in any pass of the language model, the reference's included

Where the projector is trained, prompts carry beside pixels what the tower gives to it, and in every pass it alone runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch

from learner.batching.samples import check_expansion, encode_prompts
from learner.engines.protocol import TrainEngine
from learner.features.cache import BoundedLRU, FeatureCache, Features, Key, Store
from learner.types import DEFAULT_TOKENS, LearnerOptions
from rollout.types import RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import decode
from vlm.media_cost import patches, patches_per_token
from vlm.parts import THROUGH, tower_part
from vlm.roles import part_of

IN_STORE = 4
"""Bytes in the store that ranks share, for one in their memory."""


PROMPTS_BYTES = 2**26
"""Memory for prompts as they were encoded, without pixels: where all features are there, no image is even decoded."""


def make_towers(
    engine: TrainEngine,
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    connect: Callable[[int], Store] | None = None,
) -> ConstantTowers | None:
    """None if nothing is to be cached: the cache is off, or no tower of the run's media is constant. `connect` gives
    the store of so many bytes that the ranks share."""
    limit = round(options.feature_cache_gib * 2**30)
    if not limit or not (engine.constant_kinds() or engine.recorded_kinds()):
        return None
    store = connect(IN_STORE * limit * options.ranks) if connect is not None else None
    return ConstantTowers(engine, adapter, options, FeatureCache(limit, store))


def once_per_run(adapter: MultimodalAdapter, options: LearnerOptions) -> list[str]:
    """What a run computes once for each distinct item of media, for the user; nothing of towers that are trained."""
    lora = {part_of(role) for role in options.lora_targets}
    trained = lora if options.lora_rank else {*adapter.parts} - {*options.freeze}
    held = f"as far as {options.feature_cache_gib:g} GiB a rank hold what it gives"
    said: dict[str, list[MediaKind]] = {}
    for kind in options.media_kinds:
        if kind in adapter.modalities and tower_part(kind) not in trained:
            projected = "projector" in trained and kind in THROUGH["projector"]
            if not options.feature_cache_gib:
                what = "the frozen tower runs in every pass: feature_cache_gib is 0"
            elif not projected:
                what = f"features are computed once per run for each distinct item, {held}"
            elif adapter.knows_tower_end():
                what = f"the frozen tower runs once per run for each distinct item, {held}; its projector in every pass"
            else:
                family = type(adapter).__name__
                what = f"the frozen tower runs in every pass: {family} does not say where its projector begins"
            said.setdefault(what, []).append(kind)
    return [f"{' and '.join(kinds)}: {what}" for what, kinds in said.items()]


class ConstantTowers:
    """One per rank, for a whole run. Holds features only of kinds whose towers are constant: what comes out of their
    projector or, if that is trained, what goes into it."""

    def __init__(
        self, engine: TrainEngine, adapter: MultimodalAdapter, options: LearnerOptions, cache: FeatureCache
    ) -> None:
        self._engine, self._adapter, self._cache = engine, adapter, cache
        self._options = options
        self.kinds: tuple[MediaKind, ...] = engine.constant_kinds()
        """Of `MultimodalAdapter.towers`: all batches carry the features of these."""
        self.replayed: dict[MediaKind, FeatureRow] = {}
        """Kinds of which all batches carry what goes into the projector, and that of the dummy. Filled by the first
        `encode`: every rank records each dummy once."""
        self._recorded = engine.recorded_kinds()
        cached = {*self.kinds, *self._recorded}
        firsts = {m.inputs[0]: kind for kind, m in adapter.towers().items() if kind in cached}
        self._tower_of = {k: firsts[m.inputs[0]] for k, m in adapter.modalities.items() if m.inputs[0] in firsts}
        kept = {name for m in adapter.modalities.values() for name in m.positions}
        self._replaced = {n for kind in self.kinds for n in adapter.modalities[kind].inputs} - kept
        self._dummies: dict[MediaKind, EncodedPrompt] = {}
        self._prompts: BoundedLRU[EncodedPrompt] = BoundedLRU(PROMPTS_BYTES)

    def encode(self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]) -> list[EncodedPrompt]:
        """Each group's prompt, with features in place of what the constant towers take, or beside it what these give to
        a projector that is trained. Collective: every rank calls it, with or without groups. `media`: encoded bytes by
        digest.

        Raises EncodingMismatchError, as `encode_prompts` does."""
        wanted = {_key(m) for group in groups for m in group.prompt.media if m.kind in self._tower_of}
        found = self._cache.get(sorted(wanted))
        prompts = self._encode(groups, media, found)
        missing: dict[MediaKind, dict[Key, EncodedPrompt | Media]] = {k: {} for k in (*self.kinds, *self._recorded)}
        for group, prompt in zip(groups, prompts, strict=True):
            for item in group.prompt.media:
                if item.kind in self._tower_of and _key(item) not in found:
                    of_kind = missing[self._tower_of[item.kind]]
                    if len(group.prompt.media) == 1:
                        of_kind[_key(item)] = prompt
                    else:
                        of_kind.setdefault(_key(item), item)
        self._compute({kind: self._alone(items, media) for kind, items in missing.items()}, found)
        done = [self._carrying(p, group.prompt.media, found) for group, p in zip(groups, prompts, strict=True)]
        for group, prompt in zip(groups, done, strict=True):
            self._remember(group, prompt)
        return done

    def _encode(
        self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes], found: Mapping[Key, Features]
    ) -> list[EncodedPrompt]:
        """Prompts as the processor makes them; without pixels where it made them before and all features are there."""
        prompts = {i: self._prompts.get(_prompt_key(group)) for i, group in enumerate(groups)}
        known = {
            i: prompt
            for i, prompt in prompts.items()
            if prompt is not None and all(_key(item) in found for item in groups[i].prompt.media)
        }
        for i, prompt in known.items():
            check_expansion(self._adapter, groups[i], prompt)
        others = [i for i in prompts if i not in known]
        encoded = encode_prompts(self._adapter, [groups[i] for i in others], media)
        made = {**known, **dict(zip(others, encoded, strict=True))}
        return [made[i] for i in range(len(groups))]

    def _remember(self, group: RolloutGroup, prompt: EncodedPrompt) -> None:
        """Keep a prompt that the processor need not see again."""
        if all(self._tower_of.get(item.kind) in self.kinds for item in group.prompt.media):
            size = sum(tensor.nbytes for tensor in (prompt.input_ids, *prompt.inputs.values()))
            self._prompts.put(_prompt_key(group), replace(prompt, features={}), size)

    def _alone(
        self, items: Mapping[Key, EncodedPrompt | Media], media: Mapping[str, bytes]
    ) -> dict[Key, EncodedPrompt]:
        """Each item as a prompt that holds nothing else; a prompt with one item already is one."""
        together = {key: item for key, item in items.items() if isinstance(item, Media)}
        texts = [self._adapter.modalities[item.kind].placeholder for item in together.values()]
        encoded = self._adapter.encode_batch(texts, [[decode(m, media[m.digest])] for m in together.values()])
        apart = dict(zip(together, encoded, strict=True))
        return {key: item if isinstance(item, EncodedPrompt) else apart[key] for key, item in items.items()}

    def _compute(self, missing: Mapping[MediaKind, Mapping[Key, EncodedPrompt]], found: dict[Key, Features]) -> None:
        """Add the features of missing items to `found` and to the cache. Every rank runs the tower of a kind as often
        as the rank with the most batches, on a dummy where it has no more: under ZeRO-3 they wait for each other."""
        for kind in self._recorded:
            if kind not in self.replayed:
                self.replayed[kind] = self._run(kind, [self._dummy(kind)])[0]
        batches = {kind: self._cut(kind, items) for kind, items in missing.items()}
        counts = self._engine.all_reduce_max([len(own) for own in batches.values()])
        for kind, count in zip(batches, counts, strict=True):
            for index in range(int(count)):
                keys = batches[kind][index] if index < len(batches[kind]) else []
                own = [missing[kind][key] for key in keys]
                rows = self._run(kind, own or [self._dummy(kind)])
                ends = list(accumulate(self._rows(prompt, kind) for prompt in own))
                spans = zip([0, *ends], ends, strict=False)
                found |= self._cache.put({k: tuple(rows[i:j]) for k, (i, j) in zip(keys, spans, strict=True)})

    def _run(self, kind: MediaKind, prompts: Sequence[EncodedPrompt]) -> list[FeatureRow]:
        rows = self._engine.media_features(self._tower_batch(kind, prompts))[kind]
        _check_constant(rows, kind)
        return rows

    def _rows(self, prompt: EncodedPrompt, kind: MediaKind) -> int:
        return 1 if kind in self._recorded else self._adapter.feature_rows(prompt, kind)

    def _cut(self, kind: MediaKind, items: Mapping[Key, EncodedPrompt]) -> list[list[Key]]:
        """Keys of each tower batch: within the limit of patches, or as many as the tokens of a micro-batch bring. What
        goes into a projector is recorded item by item: families differ in how it lies in a batch of several."""
        if kind in self._recorded:
            return [[key] for key in items]
        sizes = {key: patches(self._adapter, prompt) for key, prompt in items.items()}
        tokens = self._options.tokens_limit or DEFAULT_TOKENS
        limit = self._options.micro_batch_patches or tokens * self._per_token[kind]
        batches: list[list[Key]] = []
        room = 0.0
        for key in sorted(items, key=lambda k: -sizes[k]):  # padding is least among items of like size
            if not batches or sizes[key] > room:
                batches.append([])
                room = limit
            batches[-1].append(key)
            room -= sizes[key]
        return batches

    @cached_property
    def _per_token(self) -> dict[MediaKind, float]:
        return {kind: patches_per_token(self._adapter, kind) for kind in self.kinds}

    def _tower_batch(self, kind: MediaKind, prompts: Sequence[EncodedPrompt]) -> MultimodalBatch:
        """The inputs of one tower, behind two tokens that nobody reads."""
        names = self._adapter.modalities[kind].inputs
        inputs = self._adapter.join([replace(p, inputs={n: p.inputs[n] for n in names}) for p in prompts])
        ids = torch.full((1, 2), self._adapter.pad_token_id)
        return MultimodalBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            loss_mask=torch.zeros_like(ids, dtype=torch.bool),
            pixel_values=inputs.pop("pixel_values", None),
            extra_model_kwargs=inputs,
        )

    def _dummy(self, kind: MediaKind) -> EncodedPrompt:
        if kind not in self._dummies:
            self._dummies[kind] = self._adapter.dummy_prompt(kind)
        return self._dummies[kind]

    def _carrying(self, prompt: EncodedPrompt, items: Sequence[Media], found: Mapping[Key, Features]) -> EncodedPrompt:
        features: dict[MediaKind, Features] = {}
        for item in items:
            if (kind := self._tower_of.get(item.kind)) is not None:
                features[kind] = (*features.get(kind, ()), *found[_key(item)])
        inputs = {name: value for name, value in prompt.inputs.items() if name not in self._replaced}
        return replace(prompt, inputs=inputs, features=features)

    def take_metrics(self) -> dict[str, float]:
        """Over all ranks and since the last call. Collective."""
        counts = self._cache.take_counts()
        mine = [counts.stored, counts.hits, counts.store_hits, self._cache.local_bytes]
        stored, hits, store_hits, held = self._engine.all_reduce_sum(mine)
        return {
            "features_computed": stored,
            "features_reused": hits,
            "features_from_store": store_hits,
            "feature_cache_gib": held / 2**30,
        }


def _key(item: Media) -> tuple[str, str, tuple[int, ...]]:
    """What the features of an item follow from: of a video also which of its frames are shown."""
    return item.kind, item.digest, item.frames


def _prompt_key(group: RolloutGroup) -> Key:
    return group.prompt.text, *map(_key, group.prompt.media)


def _check_constant(rows: Sequence[FeatureRow], kind: MediaKind) -> None:
    if any(tensor.requires_grad for row in rows for tensor in row):
        raise RuntimeError(
            f"the tower for {kind} counts as constant, but its features depend on a parameter that is trained: the "
            "adapter's `roles` do not name it as part of the tower or of the projector"
        )

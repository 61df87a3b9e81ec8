"""Frozen towers run ahead of the language model, on all ranks in step, and only for items that are not cached.

groups ─▶ items that are not cached ─▶ tower batches, as many on every rank ─▶ FeatureCache ─▶ prompts

`learner/model/cached.py` says what is cached of a tower. Cached features take the place of pixels in a prompt: no tower
runs in any pass of the language model, the reference's included. Cached tower outputs come with the pixels, and in
every pass the projector alone runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch

from learner.batching.collate import CachedMedia
from learner.batching.rows import check_expansion, encode_prompts
from learner.config import DEFAULT_TOKENS
from learner.engines.protocol import TrainEngine
from learner.features.cache import BoundedLRU, FeatureCache, Features, Key, Store
from learner.model.cached import what_is_cached
from learner.types import LearnerOptions
from rollout.types import RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import decode
from vlm.media_cost import patches, patches_per_token
from vlm.parameter_names import THROUGH, part_of, tower_part

IN_STORE = 4
"""Bytes in the store that the ranks share, for each byte in a rank's memory."""
PROMPTS_BYTES = 2**26
"""Memory for encoded prompts without pixels: the images of a prompt whose features are all cached are not decoded."""


def make_towers(
    engine: TrainEngine,
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    connect: Callable[[int], Store] | None = None,
) -> FrozenTowers | None:
    """Return None if nothing is to be cached: the cache is off, or the table has nothing for the run's media. `connect`
    gives the store of so many bytes that the ranks share."""
    limit = round(options.learner.feature_cache_gib * 2**30)
    if not limit or not engine.cached():
        return None
    store = connect(IN_STORE * limit * options.learner.ranks) if connect is not None else None
    return FrozenTowers(engine, adapter, options, FeatureCache(limit, store))


def describe_caching(adapter: MultimodalAdapter, options: LearnerOptions) -> list[str]:
    """Say in one line for the user what is cached of the run's media. Trained towers are not mentioned."""
    model = options.model
    trained = {*adapter.parts} - {*model.freeze} if model.lora is None else {part_of(r) for r in model.lora.targets}
    limit = f"(up to {options.learner.feature_cache_gib:g} GiB per rank)"
    said: dict[str, list[MediaKind]] = {}
    for kind in options.media_kinds:
        if kind not in adapter.modalities or tower_part(kind) in trained:
            continue
        cached = what_is_cached(
            tower_trained=False,
            projector_trained="projector" in trained and kind in THROUGH["projector"],
            knows_tower_end=adapter.knows_tower_end(),
        )
        if not options.learner.feature_cache_gib:
            text = "the frozen tower runs in every pass because feature_cache_gib is 0"
        elif cached == "features":
            text = f"features are computed once per run and cached {limit}"
        elif cached == "tower outputs":
            text = f"tower outputs are computed once per run and cached {limit}; the projector runs in every pass"
        else:
            family = type(adapter).__name__
            text = f"the frozen tower runs in every pass because {family} does not say where its projector begins"
        said.setdefault(text, []).append(kind)
    return [f"{' and '.join(kinds)}: {text}" for text, kinds in said.items()]


class FrozenTowers:
    """The frozen towers of one rank for a whole run, and what is cached of them."""

    def __init__(
        self, engine: TrainEngine, adapter: MultimodalAdapter, options: LearnerOptions, cache: FeatureCache
    ) -> None:
        self._engine, self._adapter, self._options, self._cache = engine, adapter, options, cache
        self._kinds = engine.cached()
        self._with_features = tuple(kind for kind, what in self._kinds.items() if what == "features")
        self._with_outputs = tuple(kind for kind, what in self._kinds.items() if what == "tower outputs")
        self._dummy_outputs: dict[MediaKind, FeatureRow] = {}
        """The tower outputs of the dummy items. The first `encode` fills it on every rank."""
        firsts = {m.inputs[0]: kind for kind, m in adapter.towers().items() if kind in self._kinds}
        self._tower_of = {k: firsts[m.inputs[0]] for k, m in adapter.modalities.items() if m.inputs[0] in firsts}
        needed = {name for m in adapter.modalities.values() for name in m.positions}
        self._replaced = {n for kind in self._with_features for n in adapter.modalities[kind].inputs} - needed
        self._dummies: dict[MediaKind, EncodedPrompt] = {}
        self._prompts: BoundedLRU[EncodedPrompt] = BoundedLRU(PROMPTS_BYTES)

    @property
    def cached(self) -> CachedMedia:
        """Return the cached values that every batch uses, for `collate`."""
        return CachedMedia(self._with_features, self._dummy_outputs)

    def encode(self, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]) -> list[EncodedPrompt]:
        """Encode each group's prompt, with cached features in place of pixels or cached tower outputs beside them.
        Collective: every rank calls it, with or without groups. `media`: encoded bytes by digest.

        Raises EncodingMismatchError, as `encode_prompts` does."""
        wanted = {_key(m) for group in groups for m in group.prompt.media if m.kind in self._tower_of}
        found = self._cache.get(sorted(wanted))
        prompts = self._encode(groups, media, found)
        missing: dict[MediaKind, dict[Key, EncodedPrompt | Media]] = {
            kind: {} for kind in (*self._with_features, *self._with_outputs)
        }
        for group, prompt in zip(groups, prompts, strict=True):
            for item in group.prompt.media:
                if item.kind in self._tower_of and _key(item) not in found:
                    of_kind = missing[self._tower_of[item.kind]]
                    if len(group.prompt.media) == 1:
                        of_kind[_key(item)] = prompt
                    else:
                        of_kind.setdefault(_key(item), item)
        self._compute({kind: self._alone(items, media) for kind, items in missing.items()}, found)
        done = [self._with_cached(p, group.prompt.media, found) for group, p in zip(groups, prompts, strict=True)]
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
        """Store a prompt that the processor need not see again."""
        if all(self._tower_of.get(item.kind) in self._with_features for item in group.prompt.media):
            size = sum(tensor.nbytes for tensor in (prompt.input_ids, *prompt.inputs.values()))
            self._prompts.put(_prompt_key(group), replace(prompt, cached={}), size)

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
        """Compute what is missing, and add it to `found` and to the cache. Every rank runs the tower of a kind as often
        as the rank with the most batches, on a dummy if it has no more: under ZeRO-3 the ranks wait for each other."""
        for kind in self._with_outputs:
            if kind not in self._dummy_outputs:
                self._dummy_outputs[kind] = self._run(kind, [self._dummy(kind)])[0]
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
        rows = self._engine.run_towers(self._tower_batch(kind, prompts))[kind]
        _check_frozen(rows, kind)
        return rows

    def _rows(self, prompt: EncodedPrompt, kind: MediaKind) -> int:
        return 1 if kind in self._with_outputs else self._adapter.feature_rows(prompt, kind)

    def _cut(self, kind: MediaKind, items: Mapping[Key, EncodedPrompt]) -> list[list[Key]]:
        """The keys of each tower batch: as many patches as the tokens of a micro-batch bring.
        Tower outputs are computed item by item, because families differ in how those of several items lie together."""
        if kind in self._with_outputs:
            return [[key] for key in items]
        sizes = {key: patches(self._adapter, prompt) for key, prompt in items.items()}
        limit = (self._options.learner.micro_batch_tokens or DEFAULT_TOKENS) * self._per_token[kind]
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
        return {kind: patches_per_token(self._adapter, kind) for kind in self._with_features}

    def _tower_batch(self, kind: MediaKind, prompts: Sequence[EncodedPrompt]) -> MultimodalBatch:
        """A batch with the inputs of one tower, and two tokens that nobody reads."""
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

    def _with_cached(
        self, prompt: EncodedPrompt, items: Sequence[Media], found: Mapping[Key, Features]
    ) -> EncodedPrompt:
        """The prompt with what is cached of its items, and without the inputs that cached features replace."""
        cached: dict[MediaKind, Features] = {}
        for item in items:
            if (kind := self._tower_of.get(item.kind)) is not None:
                cached[kind] = (*cached.get(kind, ()), *found[_key(item)])
        inputs = {name: value for name, value in prompt.inputs.items() if name not in self._replaced}
        return replace(prompt, inputs=inputs, cached=cached)

    def take_metrics(self) -> dict[str, float]:
        """Counts over all ranks since the last call. Collective."""
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
    """Return everything that the features of an item depend on; for a video, also which of its frames are shown."""
    return item.kind, item.digest, item.frames


def _prompt_key(group: RolloutGroup) -> Key:
    return group.prompt.text, *map(_key, group.prompt.media)


def _check_frozen(rows: Sequence[FeatureRow], kind: MediaKind) -> None:
    if any(tensor.requires_grad for row in rows for tensor in row):
        raise RuntimeError(
            f"the tower of kind {kind} counts as frozen, but its features depend on a parameter that is trained: the "
            "adapter's `roles` do not name that parameter as part of the tower or of the projector"
        )

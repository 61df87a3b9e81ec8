"""Reward model: a Hugging Face model with one output scores prompt and completion.

    during a run      in an actor of its own (rewards/model_actor.py), one copy for all reward actors
    outside of one    in the process of the reward

The model's chat template joins prompt and completion; without one, they are concatenated. A blank replaces each control
token of the model that a completion spells out, and also that a prompt spells out if it becomes a message, since there
it could end the turn and begin another.

Failure modes: the score has no bounds, and its zero has no meaning. Only differences within a group count, and in a sum
the weight must suit the spread of the scores. Models are wrong where they were not trained, and long runs find those
places. Text that is too long for the model is `unscorable`, not cut. The model does not see images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rewards.base import ScoringRequest, Service
from rewards.functions.user import RewardSetupError
from rollout.types import Verdict
from vlm.control_tokens import control_tokens, without


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Options for loading and running the model."""

    model: str
    """Directory in Hugging Face format, or a name on the hub."""
    label: int | None = None
    """Index of the output that is the score. None: the only one."""
    device: str = "cpu"
    """With `cuda`, the actor takes a GPU of the cluster, or the share `gpus` of one."""
    gpus: float = 1.0
    dtype: str = "float32"
    batch_size: int = 16
    """How many texts are scored at once."""
    max_tokens: int = 4096
    """The most tokens of a text."""


class RewardModel:
    """A model and its tokenizer, loaded."""

    def __init__(self, options: ModelOptions) -> None:
        """Load the model. Raises RewardSetupError if it is not a model with one output."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._options = options
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(options.model)
            model = AutoModelForSequenceClassification.from_pretrained(
                options.model, dtype=getattr(torch, options.dtype)
            )
        except (OSError, ValueError) as error:
            raise RewardSetupError(f"reward_model: {options.model} cannot be loaded: {error}") from error
        outputs = model.config.num_labels
        if options.label is None and outputs != 1:
            raise RewardSetupError(f"reward_model: {options.model} has {outputs} outputs; choose one with `label`")
        if options.label is not None and not 0 <= options.label < outputs:
            raise RewardSetupError(f"reward_model: label={options.label}, but {options.model} has {outputs} outputs")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.pad_token_id = self._tokenizer.pad_token_id  # the model finds the end of a text by it
        template = self._tokenizer.chat_template
        self._control = tuple(control_tokens(self._tokenizer, template, ()).values())
        self._model = model.to(options.device).eval()

    def score(self, prompt: str, completions: Sequence[str], timeout: float | None = None) -> list[float | None]:
        """Return K scores, with None for a text longer than `max_tokens`. The caller enforces `timeout`."""
        encoded = [self._encode(prompt, completion) for completion in completions]
        scores: list[float | None] = [None] * len(encoded)
        fitting = [k for k, ids in enumerate(encoded) if len(ids) <= self._options.max_tokens]
        fitting.sort(key=lambda k: len(encoded[k]))  # texts of similar length together: less padding
        for start in range(0, len(fitting), self._options.batch_size):
            batch = fitting[start : start + self._options.batch_size]
            for k, value in zip(batch, self._run([encoded[k] for k in batch]), strict=True):
                scores[k] = value
        return scores

    def _encode(self, prompt: str, completion: str) -> list[int]:
        prompt, completion = (text.encode("utf-8", "replace").decode() for text in (prompt, completion))
        completion = without(completion, self._control)
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(prompt + completion)["input_ids"])
        messages = [
            {"role": "user", "content": without(prompt, self._control)},
            {"role": "assistant", "content": completion},
        ]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _run(self, texts: Sequence[list[int]]) -> list[float]:
        import torch

        padded = self._tokenizer.pad({"input_ids": list(texts)}, return_tensors="pt").to(self._options.device)
        with torch.inference_mode():
            logits = self._model(**padded).logits
        return [float(value) for value in logits[:, self._options.label or 0].float().cpu()]


@dataclass(slots=True)
class RewardModelReward:
    """Scores with the model's output, unchanged. Text that is too long for the model is `unscorable`."""

    separable: ClassVar[bool] = True
    model: str
    question: str | None = None
    """Column with the task. None: the prompt as the policy got it, including the chat template."""
    label: int | None = None
    device: str = "cpu"
    gpus: float = 1.0
    dtype: str = "float32"
    batch_size: int = 16
    max_tokens: int = 4096
    _score: Service | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if min(self.batch_size, self.max_tokens) < 1:
            raise ValueError("batch_size and max_tokens must be at least 1")

    @property
    def model_options(self) -> ModelOptions:
        names = ("model", "label", "device", "gpus", "dtype", "batch_size", "max_tokens")
        return ModelOptions(**{name: getattr(self, name) for name in names})

    def connect(self, services: Mapping[str, Service]) -> None:
        self._score = services.get("reward_model")

    def warm_up(self) -> None:
        """Load the model in this process, unless the driver has an actor for it. Raises RewardSetupError."""
        if self._score is None:
            self._score = RewardModel(self.model_options).score

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        self.warm_up()
        assert self._score is not None
        task = request.prompt if self.question is None else str(request.columns.get(self.question))
        scores: Sequence[Any] = self._score(task, request.completions)
        return [self._verdict(score) for score in scores]

    def _verdict(self, score: float | None) -> Verdict:
        if score is None:
            return Verdict(
                "unscorable", reason=f"more than {self.max_tokens} tokens, the limit of the model (option `max_tokens`)"
            )
        return Verdict.scored(score)

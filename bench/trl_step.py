"""The systems to compare this learner's step with: a bare transformers loop, and the step of TRL's GRPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText

from bench.learner_work import chosen_logprobs

LEARNING_RATE = 1e-12
"""So small that no float32 weight moves, at the full cost of AdamW. Every step of every system then starts from the
same weights, so that losses and gradient norms can be compared."""
MAX_GRAD_NORM = 1.0


class Step(Protocol):
    """One optimizer step over micro-batches of `learner_work.plain_batches`."""

    def __call__(self, batches: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Take the step and return `(loss, gradient norm before clipping)`."""


class BareStep:
    """A plain loop with transformers: forward, log-softmax, policy gradient, clip, AdamW.

    It is better than most: it computes only the logits of completions, and positions are computed beforehand."""

    def __init__(
        self,
        model_path: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        checkpointing: bool = False,
    ) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype).to(device).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def __call__(self, batches: Sequence[dict[str, Any]]) -> tuple[float, float]:
        total = 0.0
        for batch in batches:
            self._add_positions(batch)
            batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), batch)
            completions, tokens = batch["completion_ids"], batch["num_items_in_batch"]
            ids, mask = _whole(batch)
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=batch["pixel_values"].to(self.model.dtype),
                image_grid_thw=batch["image_grid_thw"],
                mm_token_type_ids=batch["mm_token_type_ids"],
                position_ids=batch["bare_positions"],
                logits_to_keep=completions.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]
            logprobs = chosen_logprobs(logits, completions)
            loss = -(logprobs * batch["advantages"][:, None] * batch["completion_mask"]).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def _add_positions(self, batch: dict[str, Any]) -> None:
        """Add positions as the model derives them. The unmeasured steps leave them in the batch."""
        if "bare_positions" not in batch:
            ids, mask = _whole(batch)
            given = {"image_grid_thw": batch["image_grid_thw"], "mm_token_type_ids": batch["mm_token_type_ids"]}
            batch["bare_positions"] = self.model.model.get_rope_index(input_ids=ids, attention_mask=mask, **given)[0]


def _whole(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of prompts and completions together, each `[B, L]`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


class TrlStep:
    """The real `GRPOTrainer.training_step` of each micro-batch, followed by what `Trainer` does at the end of an
    accumulation.

    No generation: the tensors that `_generate_and_score_completions` would return are given. TRL's own fused head
    (chunked log-probabilities, as here) and its default fused AdamW are on, gradient checkpointing is off, beta is 0,
    and old log-probabilities are those of the step itself, as TRL's code has it for one step per generation. CISPO, in
    which an on-policy step is the plain policy gradient, has the same loss *value* too."""

    def __init__(self, model_path: Path, work: Path, K: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            output_dir=str(work),
            per_device_train_batch_size=K,
            num_generations=K,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            max_steps=10_000,
            loss_type="cispo",
            epsilon_high=5.0,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"prompt": [{"role": "user", "content": "w0"}]}] * K
        self.trainer: Any = GRPOTrainer(
            model=str(model_path), args=config, train_dataset=Dataset.from_list(rows), reward_funcs=_no_reward
        )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        prepare = self.trainer.accelerator.prepare
        self.model, self.trainer.optimizer = prepare(self.trainer.model, self.trainer.optimizer)
        # `training_step` would generate here.
        self.trainer._prepare_inputs = lambda inputs: inputs

    def __call__(self, batches: Sequence[dict[str, Any]]) -> tuple[float, float]:
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.args.steps_per_generation = len(batches)
        total = 0.0
        for batch in batches:
            total += trainer.training_step(self.model, batch, None).item()
        norm = trainer._get_grad_norm(self.model, grad_norm=trainer._clip_grad_norm(self.model))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return total, float(norm)


def _no_reward(completions: list[Any], **columns: object) -> list[float]:
    return [0.0] * len(completions)

"""What every TrainEngine must do, as a class of tests: subclass it and give it a `make` fixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.algorithm.objective import LossTerms
from learner.batching.collate import collate
from learner.config import Behavior, CosineDecay, Current, Kl, LinearDecay, OffPolicy, Reinforce
from learner.engines.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learner.engines.protocol import TrainEngine
from learner.model.load import load_policy
from learner.types import LearnerOptions, NotFiniteError, NothingToLearnError
from rollout.types import Verdict
from tests.helpers.learner_cases import (
    Case,
    adapter_of,
    changed,
    expected_update,
    mixed_case,
    options,
    rows_of,
    update,
    updater,
)
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import Lora

Make = Callable[[LearnerOptions], TrainEngine]


def gradients_of(engine: TrainEngine, chosen: LearnerOptions) -> dict[str, Tensor]:
    """Gradients of the first step, read back from AdamW's first moment: (1 - beta1) g where nothing was clipped."""
    moments = {name: value.detach().clone() for name, value in engine.state_tensors()}
    return {
        name.removeprefix("exp_avg/"): moment / (1 - chosen.learner.betas[0])
        for name, moment in moments.items()
        if name.startswith("exp_avg/")
    }


def assert_gradients_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name].double(), gradient.double(), rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.usefixtures("logits_in_several_chunks")
class TrainEngineContract:
    """Every test takes a `make(options) -> engine` of one rank."""

    make: Make

    @pytest.fixture
    def adapter(self, tiny_model: Path) -> MultimodalAdapter:
        return adapter_of(tiny_model)

    @pytest.fixture
    def case(self, adapter: MultimodalAdapter) -> Case:
        return mixed_case(adapter)

    def update(self, engine: TrainEngine, chosen: LearnerOptions, case: Case) -> dict:
        return update(engine, chosen, case)

    @pytest.mark.parametrize("budget", [4096, 90], ids=["one micro-batch", "several"])
    @pytest.mark.parametrize("off_policy", [Behavior(), Current()], ids=["behavior", "current"])
    def test_loss_and_gradients_are_the_written_out_ones(
        self, make: Make, tiny_model: Path, case: Case, budget: int, off_policy: OffPolicy
    ):
        chosen = options(tiny_model, micro_batch=budget, off_policy=off_policy, temperature=0.9)
        expected = expected_update(tiny_model, case, chosen)
        engine = make(chosen)
        stats = self.update(engine, chosen, case)
        assert (stats["metrics"]["micro_batches"] > 1) == (budget == 90)
        assert stats["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert stats["metrics"]["tokens_trained"] == expected.tokens and stats["metrics"]["completions_trained"] == 15
        assert stats["metrics"]["kl"] == pytest.approx(0.0, abs=1e-9)
        assert_gradients_close(gradients_of(engine, chosen), expected.gradients)
        norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm().item()
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)

    def test_scores_are_the_models_own_logprobs(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, temperature=0.9, micro_batch=90)
        expected = expected_update(tiny_model, case, chosen).logprobs
        engine = make(chosen)
        scored = updater(engine, chosen).score(case.groups, case.media)
        for ours, theirs in zip(scored, expected, strict=True):
            for values, exact in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(values, exact.numpy(), atol=3e-5)

    def test_clipping_scales_the_gradient_and_reports_the_norm_before(self, make: Make, tiny_model: Path, case: Case):
        free = options(tiny_model)
        engine = make(free)
        norm = self.update(engine, free, case)["grad_norm"]
        expected = gradients_of(engine, free)
        tight = changed(free, max_grad_norm=norm / 4)
        engine = make(tight)
        assert self.update(engine, tight, case)["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert_gradients_close({n: g * 4 for n, g in gradients_of(engine, tight).items()}, expected)

    def test_the_reference_stays_while_the_policy_moves(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model)
        engine = make(chosen)
        batch = self.batch(engine, chosen, case)
        before = engine.logprobs(batch)
        torch.testing.assert_close(engine.logprobs(batch, reference=True), before)
        first = self.update(engine, chosen, case)
        second = self.update(engine, chosen, case)
        assert first["metrics"]["kl"] == pytest.approx(0, abs=1e-9) and second["metrics"]["kl"] > 1e-4
        torch.testing.assert_close(engine.logprobs(batch, reference=True), before)
        assert (engine.logprobs(batch) - before).abs().max() > 1e-2

    def test_a_refreshed_reference_is_the_policy_of_then_and_survives_a_checkpoint(
        self, make: Make, tiny_model: Path, case: Case, tmp_path: Path
    ):
        chosen = options(tiny_model, kl=Kl(0.1, refresh=1))
        engine = make(chosen)
        batch = self.batch(engine, chosen, case)
        self.update(engine, chosen, case)
        then = engine.logprobs(batch)
        engine.refresh_reference()
        assert self.update(engine, chosen, case)["metrics"]["kl"] == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(engine.logprobs(batch, reference=True), then)
        save_checkpoint(engine, tmp_path / "checkpoint")
        resumed = make(chosen)
        load_checkpoint(resumed, tmp_path / "checkpoint")
        torch.testing.assert_close(resumed.logprobs(batch, reference=True), then)
        expected, again = (self.update(e, chosen, case)["metrics"]["kl"] for e in (engine, resumed))
        assert expected > 1e-4 and again == expected

    def test_the_divergence_of_completions_is_that_of_their_tokens(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, kl=Kl(0.1, estimator="k1", where="reward"), temperature=0.9)
        engine = make(chosen)
        found = updater(engine, chosen).reference_kl(case.groups, case.media)
        exact = expected_update(tiny_model, case, chosen).logprobs
        for group, ours, references in zip(case.groups, found, exact, strict=True):
            for completion, value, reference in zip(group.completions, ours, references, strict=True):
                sampled = completion.segments[0].logprobs
                assert sampled is not None
                assert value == pytest.approx((sampled - reference.numpy()).sum(), abs=1e-3)

    def test_several_steps_are_taken_each_on_its_part(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, optimizer_steps=2, learning_rate=1e-5, aggregation="sequence")
        engine = make(chosen)
        stats = update(engine, chosen, case, minibatches=[0, 1, 1, 0])
        assert engine.steps == 2 and stats["metrics"]["completions_trained"] == 15
        assert stats["metrics"]["ratio_max"] != 1.0  # the second is against the policy before the first
        parts = [case.part([0, 3]), case.part([1, 2])]
        alone = make(changed(chosen, optimizer_steps=1))
        first = self.update(alone, changed(chosen, optimizer_steps=1), parts[0])
        assert (
            stats["metrics"]["tokens_trained"]
            == first["metrics"]["tokens_trained"] + expected_update(tiny_model, parts[1], chosen).tokens
        )
        # On-policy, the ratio's gradient is that of log pi: the second step alone, from where the first ended.
        second = self.update(alone, changed(chosen, optimizer_steps=1, loss=Reinforce()), parts[1])
        assert stats["grad_norm"] == pytest.approx((first["grad_norm"] + second["grad_norm"]) / 2, rel=0.05)

    def test_steps_against_what_was_sampled_take_no_pass_more(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, optimizer_steps=2, off_policy=Behavior(), kl=None)
        engine: Any = make(chosen)

        def not_needed(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a pass that is not needed")

        engine.logprobs = not_needed
        stats = update(engine, chosen, case, minibatches=[0, 1, 1, 0])
        alone = changed(chosen, optimizer_steps=1)
        first = self.update(make(alone), alone, case.part([0, 3]))
        # Behind a step the policy has moved: what is between it and the engines' says nothing of how they agree.
        for name in ("mismatch_mean", "mismatch_max", "mismatch_kl", "effective_sample_size"):
            assert stats["metrics"][name] == pytest.approx(first["metrics"][name], rel=1e-3, abs=1e-6), name
        assert stats["metrics"]["ratio_max"] > first["metrics"]["ratio_max"]

    def test_completions_that_were_cut_off_are_left_out(self, make: Make, tiny_model: Path, case: Case):
        cut = [
            replace(g, completions=(replace(g.completions[0], finish_reason="length"), *g.completions[1:]))
            for g in case.groups
        ]
        unscored = [
            replace(g, verdicts=(Verdict("unscorable", reason="cut"), *(g.verdicts or ())[1:])) for g in case.groups
        ]
        masked, plain = options(tiny_model, overlong="mask"), options(tiny_model)
        one, other = make(masked), make(plain)
        ours = self.update(one, masked, replace(case, groups=cut))
        theirs = self.update(other, plain, replace(case, groups=unscored))
        assert ours["metrics"]["completions_trained"] == 11 and ours["loss"] == pytest.approx(theirs["loss"])
        assert_gradients_close(gradients_of(one, masked), gradients_of(other, plain))
        nothing = [
            replace(g, completions=tuple(replace(c, finish_reason="length") for c in g.completions)) for g in cut
        ]
        with pytest.raises(NothingToLearnError, match="cut off"):
            self.update(one, masked, replace(case, groups=nothing))

    def test_without_a_kl_there_is_no_reference(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, kl=None)
        engine = make(chosen)
        assert "kl" not in self.update(engine, chosen, case)["metrics"]
        with pytest.raises(RuntimeError, match="have no KL"):
            engine.logprobs(self.batch(engine, chosen, case), reference=True)

    def test_the_learning_rate_follows_the_schedule(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, warmup_steps=2, lr_schedule=LinearDecay(), total_steps=4, kl=None)
        engine = make(chosen)
        rates = [self.update(engine, chosen, case)["learning_rate"] for _ in range(4)]
        assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])

    def test_sums_and_maxima_cover_all_micro_batches(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, kl=None)
        engine = make(chosen)
        batch = self.batch(engine, chosen, case)
        values = iter([1.0, 5.0, 2.0])

        def micro_loss(given: MultimodalBatch, logprobs: Tensor, entropy: Tensor) -> LossTerms:
            value = torch.tensor(next(values))
            return LossTerms(logprobs.sum() * 0 + value, {"a": value * 10}, {"b": value})

        result = engine.train_step([batch] * 3, micro_loss)
        assert (result.loss, result.sums, result.maxima) == (8.0, {"a": 80.0}, {"b": 5.0})
        assert result.grad_norm == 0.0 and engine.steps == 1

    def test_a_resumed_run_is_bitwise_the_undisturbed_one(
        self, make: Make, tiny_model: Path, case: Case, tmp_path: Path
    ):
        chosen = options(tiny_model, lr_schedule=CosineDecay(), warmup_steps=1, max_grad_norm=0.5)
        straight = make(chosen)
        for _ in range(2):
            self.update(straight, chosen, case)
        save_checkpoint(straight, tmp_path / "checkpoint")
        generator = torch.get_rng_state()
        expected = [self.update(straight, chosen, case) for _ in range(2)]
        final = {name: value.detach().clone() for name, value in straight.state_tensors()}
        resumed = make(chosen)
        torch.manual_seed(123)
        load_checkpoint(resumed, tmp_path / "checkpoint")
        assert resumed.steps == 2 and torch.equal(torch.get_rng_state(), generator)
        for stats in expected:
            again = self.update(resumed, chosen, case)
            assert {k: v for k, v in again.items() if k != "seconds"} == {
                k: v for k, v in stats.items() if k != "seconds"
            }
        for name, value in resumed.state_tensors():
            assert torch.equal(value, final[name]), name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]

    def test_a_checkpoint_before_the_first_step(self, make: Make, tiny_model: Path, case: Case, tmp_path: Path):
        chosen = options(tiny_model)
        save_checkpoint(make(chosen), tmp_path / "checkpoint")
        engine = make(chosen)
        first = self.update(engine, chosen, case)
        load_checkpoint(engine, tmp_path / "checkpoint")
        assert engine.steps == 0
        assert self.update(engine, chosen, case)["grad_norm"] == first["grad_norm"]

    def test_a_checkpoint_of_another_kind_of_training_is_refused(self, make: Make, tiny_model: Path, tmp_path: Path):
        save_checkpoint(make(options(tiny_model)), tmp_path / "checkpoint")
        with pytest.raises(CheckpointError, match=r"has no param/.*lora"):
            load_checkpoint(make(options(tiny_model, lora=Lora(2))), tmp_path / "checkpoint")

    @pytest.mark.parametrize("lora", [None, Lora(2)], ids=["full", "lora"])
    def test_the_saved_model_is_the_trained_policy(
        self, make: Make, tiny_model: Path, case: Case, tmp_path: Path, lora: Lora | None
    ):
        chosen = options(tiny_model, lora=lora)
        engine = make(chosen)
        for _ in range(2):
            self.update(engine, chosen, case)
        trained = engine.logprobs(self.batch(engine, chosen, case))
        directory = tmp_path / "model"
        directory.mkdir()
        (directory / "former").touch()
        engine.save_pretrained(directory)
        assert not (directory / "former").exists()
        loaded = AutoModelForImageTextToText.from_pretrained(directory)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        processor = AutoProcessor.from_pretrained(directory)
        assert processor.chat_template == adapter_of(tiny_model).processor.chat_template
        saved = options(directory)
        policy = load_policy(saved, adapter_of(tiny_model))
        with torch.no_grad():
            logprobs, _ = policy(self.batch(engine, chosen, case))
        torch.testing.assert_close(logprobs, trained, rtol=0, atol=2e-5)
        if lora:
            from peft import PeftModel

            base = AutoModelForImageTextToText.from_pretrained(tiny_model)
            adapted, ids = PeftModel.from_pretrained(base, directory / "adapter"), torch.arange(50)[None]
            with torch.no_grad():
                ours, theirs = adapted(input_ids=ids).logits, loaded(input_ids=ids).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
            merged = adapted.merge_and_unload()
            for name, parameter in merged.named_parameters():
                torch.testing.assert_close(parameter, loaded.get_parameter(name), rtol=1e-5, atol=1e-6)

    def test_the_weight_source_yields_the_engines_names(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, lora=Lora(2))
        engine = make(chosen)
        self.update(engine, chosen, case)
        source = engine.weight_source(1 << 16)
        plain = AutoModelForImageTextToText.from_pretrained(tiny_model)
        yielded = {name: tensor.clone() for name, tensor in source}
        assert [m.name for m in source.metadata()] == list(yielded)
        assert {name: p.shape for name, p in plain.named_parameters()} == {n: t.shape for n, t in yielded.items()}
        changed = {n for n, t in yielded.items() if not torch.equal(t, plain.get_parameter(n))}
        layers = engine.adapter.linear_layers(plain)  # type: ignore[attr-defined]
        assert changed == {f"{name}.weight" for role in chosen.model.lora_targets for name in layers[role]}

    def batch(self, engine: TrainEngine, chosen: LearnerOptions, case: Case) -> MultimodalBatch:
        adapter = engine.adapter  # type: ignore[attr-defined]
        return collate(rows_of(adapter, chosen, case), adapter)

    @pytest.mark.parametrize("broken", ["loss", "gradient", "first step"])
    def test_no_step_is_taken_on_what_is_not_finite(self, make: Make, tiny_model: Path, case: Case, broken: str):
        chosen = options(tiny_model, kl=None, warmup_steps=3, weight_decay=0.1)
        engine, undisturbed = make(chosen), make(chosen)
        batch = self.batch(engine, chosen, case)

        def spoiled(given: MultimodalBatch, logprobs: Tensor, entropy: Tensor) -> LossTerms:
            worst = {"loss": logprobs.sum() * 0 + torch.inf, "gradient": logprobs.sum() * 3e38}
            sums = {"policy_loss": torch.tensor(torch.nan)}
            return LossTerms(worst.get(broken, logprobs.sum() * torch.nan), sums, {})

        def sound(given: MultimodalBatch, logprobs: Tensor, entropy: Tensor) -> LossTerms:
            return LossTerms(logprobs.sum(), {"policy_loss": torch.tensor(1.0)}, {})

        losses = [spoiled] if broken == "first step" else [sound, spoiled]
        for loss in losses:
            before = {name: value.detach().clone() for name, value in engine.state_tensors()}
            steps = engine.steps
            result = engine.train_step([batch, batch], loss)
        assert not result.taken and not np.isfinite(result.grad_norm)
        assert set(result.not_finite) == {0, 1} and "policy_loss" in result.not_finite[0]
        assert engine.steps == steps
        after = dict(engine.state_tensors())
        assert set(after) == set(before)
        assert all(torch.equal(value, before[name]) for name, value in after.items())

        for loss in [*losses[:-1], sound]:
            expected = undisturbed.train_step([batch, batch], loss)
        again = engine.train_step([batch, batch], sound)
        assert again.taken and (again.learning_rate, again.grad_norm) == (expected.learning_rate, expected.grad_norm)
        states = [dict(e.state_tensors()) for e in (engine, undisturbed)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_an_update_takes_the_steps_that_are_finite(self, make: Make, tiny_model: Path, case: Case):
        """The first of two steps has an advantage that is infinite: the second is the whole update."""
        chosen = options(tiny_model, optimizer_steps=2, micro_batch=90)
        engine, alone = make(chosen), make(chosen)
        spoiled = replace(case, advantages=[[np.inf] * 4, *case.advantages[1:]])
        stats = update(engine, chosen, spoiled, minibatches=[0, 1, 1, 0])
        expected = update(alone, chosen, case.part([1, 2]), minibatches=[1, 1])
        assert engine.steps == alone.steps == 1
        for name in ("loss", "grad_norm", "learning_rate"):
            assert stats[name] == expected[name]
        for name in ("completions_trained", "tokens_trained"):
            assert stats["metrics"][name] == expected["metrics"][name]
        states = [dict(e.state_tensors()) for e in (engine, alone)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        (refused,) = stats["refused"]
        assert refused.position == 0 and set(refused.terms) >= {"loss", "policy_loss"}
        assert refused.suspects == (case.groups[0].prompt.ref,)
        assert (stats["attempted"], expected["attempted"], expected["refused"]) == ((0, 1), (1,), ())

    def test_weights_that_are_not_finite_are_written_nowhere(
        self, make: Make, tiny_model: Path, case: Case, tmp_path: Path
    ):
        chosen = options(tiny_model)
        engine = make(chosen)
        for write in (lambda: save_checkpoint(engine, tmp_path / "c"), lambda: engine.save_pretrained(tmp_path / "m")):
            write()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        states = dict(engine.state_tensors())
        name = next(n for n in states if "layers.0" in n)
        spoiled = {n: value.detach().clone() for n, value in states.items()}
        spoiled[name].view(-1)[3] = torch.nan
        engine.load_state_tensors(lambda n, shape: spoiled[n], 0)
        bare = name.rpartition("layers.")[2]
        for write in (lambda: save_checkpoint(engine, tmp_path / "c"), lambda: engine.save_pretrained(tmp_path / "m")):
            with pytest.raises(NotFiniteError, match=rf"1 of \d+ numbers of .*{bare}.* are not finite"):
                write()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_vectors_do_not_decay(self, make: Make, tiny_model: Path, case: Case):
        chosen = options(tiny_model, kl=None, weight_decay=0.5, learning_rate=0.1)
        engine = make(chosen)
        batch = self.batch(engine, chosen, case)
        before = {name: value.detach().clone() for name, value in engine.state_tensors()}
        engine.train_step([batch], lambda given, logprobs, entropy: LossTerms(logprobs.sum() * 0, {}, {}))
        after = {name: value for name, value in engine.state_tensors() if name.startswith("param/")}
        for name, value in after.items():
            kept = 0.95 if value.ndim > 1 else 1.0
            torch.testing.assert_close(value, before[name] * kept, rtol=1e-6, atol=1e-7, msg=name)

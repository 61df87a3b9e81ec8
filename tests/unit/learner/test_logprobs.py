"""Chunked log-probabilities against the plain computation, in value, gradient, order of operations and memory."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from learner.algorithm.objective import GlobalCounts, TokenTerms, policy_update_loss
from learner.config import AlgorithmConfig, Current
from learner.model.logprobs import LogprobHead, chunked_logprobs
from rollout.types import BAN


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, banned: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """The same, written differently: all logits at once, through torch's own distribution."""
    logits = hidden @ weight.T + (bias if bias is not None else 0.0)
    logits = logits + torch.zeros(len(weight), dtype=logits.dtype).index_fill(0, torch.tensor(banned).long(), BAN)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def inputs(
    rows: int = 13, width: int = 6, vocabulary: int = 11, kind: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, width, generator=random, dtype=kind),
        "weight": torch.randn(vocabulary, width, generator=random, dtype=kind),
        "bias": torch.randn(vocabulary, generator=random, dtype=kind),
        "targets": torch.randint(0, vocabulary, (rows,), generator=random),
    }


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_value_and_gradient_equal_the_plain_computation(chunk: int, temperature: float):
    def run(compute: str) -> list[Tensor]:
        given = inputs()
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        if compute == "plain":
            logprobs, entropy = plain(*leaves[:2], given["targets"], leaves[2], [2, 5], temperature)
        else:
            logprobs, entropy = chunked_logprobs(
                *leaves[:2],
                given["targets"],
                bias=leaves[2],
                banned=torch.tensor([2, 5]),
                temperature=temperature,
                chunk_rows=chunk,
            )
        weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
        (weights * logprobs + weights.flip(0) * entropy).sum().backward()
        return [logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for ours, theirs in zip(run("chunked"), run("plain"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_in_float32_to_one_in_a_million():
    given = inputs(kind=torch.float32)
    reference = inputs(kind=torch.float32)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    chunked_logprobs(hidden, weight, given["targets"], chunk_rows=4)[0].sum().backward()
    exact_h, exact_w = (reference[name].double().requires_grad_() for name in ("hidden", "weight"))
    plain(exact_h, exact_w, given["targets"], None, [], 1.0)[0].sum().backward()
    for ours, exact in ((hidden, exact_h), (weight, exact_w)):
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    given = inputs(rows=5, vocabulary=7)
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_logprobs(hidden, weight, given["targets"], bias=bias, temperature=0.8, chunk_rows=2)

    assert torch.autograd.gradcheck(compute, leaves)


def test_bans_come_before_temperature():
    # Two tokens with logits 0 and 0, the second banned, temperature 4: the engine sees 0 and -100 / 4.
    hidden, weight = torch.zeros(2, 3), torch.ones(2, 3)
    logprobs, _ = chunked_logprobs(hidden, weight, torch.tensor([0, 1]), banned=torch.tensor([1]), temperature=4.0)
    lse = math.log(1 + math.exp(-25.0))
    assert logprobs.tolist() == pytest.approx([-lse, -25.0 - lse], abs=1e-6)


def test_no_rows_give_no_values_and_zero_gradients():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,) and weight.grad is not None and (weight.grad == 0).all()


def test_bfloat16_is_summed_in_float32():
    # 2,048 equal contributions, one per chunk: a sum in bfloat16 stops growing at some 256 times the first.
    rows = 2048
    hidden, weight = torch.ones(rows, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16)
    weight.requires_grad_()
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), chunk_rows=1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    # d log p_0 / dz = onehot - 1/4
    expected = torch.tensor([[0.75 * rows] * 2, *[[-0.25 * rows] * 2] * 3])
    torch.testing.assert_close(weight.grad.float(), expected)


@pytest.mark.parametrize(("bonus", "in_backward"), [(0.0, 1), (0.01, 2)])
def test_never_holds_all_logits(bonus: float, in_backward: int):
    """With the loss of a training step; the entropy's gradient takes a second tensor, so only who wants it pays."""
    rows, vocabulary, chunk = 512, 4096, 16
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    held: dict[int, weakref.ref[Tensor]] = {}
    most = {"forward": 0, "backward": 0}
    during = "forward"

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        """Counts the tensors alive that are as large as a chunk, however many views of one there are."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor) and value.numel() >= chunk * vocabulary:
                    assert value.numel() == chunk * vocabulary
                    held[id(value)] = weakref.ref(value)
            alive = {t.untyped_storage().data_ptr() for ref in held.values() if (t := ref()) is not None}
            most[during] = max(most[during], len(alive))
            return result

    with Watch():
        logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), chunk_rows=chunk)
        during = "backward"
        terms = TokenTerms(
            logprobs, entropy, logprobs.detach(), torch.ones(rows), torch.ones(rows) > 0, torch.arange(rows)
        )
        algorithm = AlgorithmConfig(off_policy=Current(), entropy_bonus=bonus)
        policy_update_loss(terms, algorithm, GlobalCounts(rows, rows), max_length=1).loss.backward()
    assert most == {"forward": 2, "backward": in_backward}


def test_the_head_shares_the_models_weight():
    linear = nn.Linear(4, 9, bias=False)
    head = LogprobHead(linear, banned=(), temperature=1.0)
    head(torch.randn(3, 4), torch.tensor([0, 1, 2]))[0].sum().backward()
    assert head.weight is linear.weight and linear.weight.grad is not None
    assert "banned" not in head.state_dict()


@pytest.mark.parametrize(
    ("wrong", "message"), [({"temperature": 0.0}, "temperature"), ({"chunk_rows": 0}, "chunk_rows")]
)
def test_refuses(wrong: dict[str, float], message: str):
    given = inputs()
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(given["hidden"], given["weight"], given["targets"], **wrong)  # type: ignore[arg-type]

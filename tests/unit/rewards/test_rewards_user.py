"""Rewards by name, rewards of users, and weighted sums: all that can be wrong is said before a run starts."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import ScoringRequest, TransientError
from rewards.compose import Combine, Term, compose
from rewards.config import RewardSpec
from rewards.functions.user import ColumnReward, RewardSetupError
from rewards.registry import build_rewards, check_rewards, columns_read, load_reward
from rollout.types import Completion, Segment, Verdict

REQUEST = ScoringRequest("what colour?", ("red", "blue!", ""), answer="red", columns={"level": 2, "tags": ["a", "b"]})

SOURCE = """
from rewards.base import ScoringRequest
from rollout.types import Verdict

LIMIT = 3

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def level(completions, level, scale=1.0):
    return [scale * value for value in level]

def judged(request, bonus=0.0):
    return [Verdict.scored(len(text) + bonus) for text in request.completions]

def annotated(r: "ScoringRequest"):
    return [Verdict("unscorable", reason="never")] * len(r.completions)

async def later(completions, **columns):
    return [None for _ in completions]

def blind(prompts):
    return [0.0 for _ in prompts]

def positional(completions, /):
    return [0.0 for _ in completions]

class Reward:
    pass
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def scores(name: str, options: dict[str, Any] | None = None) -> list[float | None]:
    return [verdict.score for verdict in load_reward(name, options)(REQUEST)]


def test_functions_of_a_file_are_called_with_what_they_take(source: str) -> None:
    assert scores(f"{source}:length") == [3.0, 5.0, 0.0]
    assert scores(f"{source}:level", {"scale": 0.5}) == [1.0, 1.0, 1.0]
    assert scores(f"{source}:judged", {"bonus": 1.0}) == [4.0, 6.0, 1.0]
    assert scores(f"{source}:annotated") == [None, None, None]
    assert [v.status for v in load_reward(f"{source}:later")(REQUEST)] == ["unscorable"] * 3


def test_functions_of_a_module_and_of_a_relative_path(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(source).parent)
    assert scores("mine:length") == scores("mine.py:length") == [3.0, 5.0, 0.0]


TRL = """
import re

def has_answer(completions, **kwargs):
    return [1.0 if re.search("<answer>.*</answer>", text) else 0.0 for text in completions]

def matches_truth(completions, ground_truth, **kwargs):
    return [1.0 if text == truth else 0.0 for text, truth in zip(completions, ground_truth)]

def by_task(prompts, completions, completion_ids, task, **kwargs):
    return [float(len(ids)) if kind == "math" else None for ids, kind in zip(completion_ids, task)]

async def later(prompts, completions, **kwargs):
    return [float(len(completion)) for completion in completions]
"""


def test_signatures_of_trl_are_taken_as_they_are(tmp_path: Path) -> None:
    """The forms that TRL documents: completions and further columns, token ids, None for other tasks, async."""
    path = tmp_path / "trl_style.py"
    path.write_text(TRL)
    raw = tuple(
        Completion(
            (Segment(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), np.zeros(n, np.int32)),), "", "stop", 0
        )
        for n in (3, 1)
    )
    columns = {"ground_truth": "red", "task": "math"}
    request = ScoringRequest("q", ("red", "<answer>red</answer>"), columns=columns, raw=raw)

    def values(name: str, asked: ScoringRequest = request) -> list[float | None]:
        reward = load_reward(f"{path}:{name}")
        return [verdict.score for verdict in reward(asked)]

    assert values("has_answer") == [0.0, 1.0]
    assert values("matches_truth") == [1.0, 0.0]
    assert values("by_task") == [3.0, 1.0]
    assert values("by_task", replace(request, columns={**columns, "task": "other"})) == [None, None]
    assert values("later") == [3.0, 20.0]
    needs = [getattr(load_reward(f"{path}:{n}"), "needs_media", False) for n in ("by_task", "later")]
    assert needs == [True, False]


def test_columns_are_repeated_per_completion() -> None:
    seen: dict[str, Any] = {}

    def spy(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, completions=completions)
        return [0.0] * 3

    ColumnReward(spy, {"limit": 7})(REQUEST)
    assert seen == {
        "completions": ["red", "blue!", ""],
        "prompts": ["what colour?"] * 3,
        "answer": ["red"] * 3,
        "level": [2] * 3,
        "tags": [["a", "b"]] * 3,
        "limit": 7,
    }


@pytest.mark.parametrize(
    ("returned", "statuses"),
    [
        ([1, 0.5, True], ["scored"] * 3),
        ((1.0, None, 0.0), ["scored", "unscorable", "scored"]),
        (np.array([1, 2, 3], dtype=np.float32), ["scored"] * 3),
        ([np.float32(1), np.int64(2), 0], ["scored"] * 3),
        ([1.0, math.nan, 0.0], ["scored", "error", "scored"]),
        ([1e39, 10**400, -(10**38)], ["error", "error", "scored"]),
        ([1.0, math.inf, -math.inf], ["scored", "error", "error"]),
        ([1.0, "0.5", {}], ["scored", "error", "error"]),
        ([1.0, 0.0], ["error"] * 3),
        ([1.0] * 4, ["error"] * 3),
        ([], ["error"] * 3),
        (1.0, ["error"] * 3),
        (None, ["error"] * 3),
        ("abc", ["error"] * 3),
        ({"a": 1, "b": 2, "c": 3}, ["error"] * 3),
    ],
)
def test_what_a_function_returns_becomes_verdicts_never_zeros(returned: Any, statuses: list[str]) -> None:
    reward = compose([Term("mine", 1.0, ColumnReward(lambda completions: returned, {}))])
    verdicts = reward(REQUEST)
    assert [v.status for v in verdicts] == statuses
    assert all(v.reason.startswith("mine: ") for v in verdicts if not v.valid)


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(2), KeyError("x"), RecursionError("deep")])
def test_what_a_function_raises_becomes_k_errors_that_say_where(error: BaseException) -> None:
    def broken(completions: list[str]) -> list[float]:
        raise error

    verdicts = compose([Term("mine", 1.0, ColumnReward(broken, {}))])(REQUEST)
    assert [v.status for v in verdicts] == ["error"] * 3
    assert type(error).__name__ in verdicts[0].reason and "test_rewards_user.py" in verdicts[0].reason


def test_a_request_function_must_return_verdicts() -> None:
    term = Term("mine", 1.0, lambda request: [Verdict.scored(1.0), 1.0, Verdict("timeout", reason="slow")])  # type: ignore[list-item]
    verdicts = compose([term])(REQUEST)
    assert [v.status for v in verdicts] == ["scored", "error", "timeout"]
    assert "float" in verdicts[1].reason


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acuracy", {}, "did you mean 'accuracy'"),
        ("poetry", {}, "Shipped: accuracy, "),
        ("accuracy", {"tolerence": 1}, "unexpected keyword argument 'tolerence'"),
        ("accuracy", {"scope": "prompt"}, "'answer' or 'completion'"),
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("no/such/file.py:f", {}, "no file no/such/file.py"),
        ("{source}:lenght", {}, "has no 'lenght'; it has: length, level"),
        ("{source}:", {}, "must have the form"),
        ("{source}:LIMIT", {}, "is a int"),
        ("{source}:Reward", {}, "is a class"),
        ("{source}:blind", {}, "takes neither `completions` nor `request`"),
        ("{source}:positional", {}, "positional-only"),
        ("{source}:level", {"scael": 2}, "has no option scael; it takes completions, level, scale"),
        ("{source}:judged", {"bonus": 1, "x": 2}, "has no option x"),
    ],
)
def test_problems_are_named_before_the_run(source: str, name: str, options: dict[str, Any], message: str) -> None:
    spec = RewardSpec(name.format(source=source), options=options)
    (problem,) = check_rewards([spec])
    assert message in problem


def test_a_module_that_fails_at_import_is_a_problem_each_time(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_library\ndef f(completions): ...")
    for _ in range(2):
        (problem,) = check_rewards([RewardSpec(f"{path}:f")])
        assert "ModuleNotFoundError: No module named 'no_such_library'" in problem


def test_all_problems_at_once() -> None:
    specs = [
        RewardSpec("format", 0.0),
        RewardSpec("format", 0.0),
        RewardSpec("x", 0.0),
        RewardSpec("accuracy", math.nan),
    ]
    problems = "\n".join(check_rewards(specs))
    for part in ("'format' is listed 2 times", "unknown reward 'x'", "weight of reward 'accuracy' is nan"):
        assert part in problems
    with pytest.raises(RewardSetupError, match="unknown reward 'x'"):
        build_rewards(specs)
    assert "nothing would be learned" in check_rewards([RewardSpec("format", 0.0)])[0]


def test_what_a_reward_names_is_read_of_the_data(source: str, tmp_path: Path) -> None:
    assert columns_read([RewardSpec(f"{source}:level")]) == (("level",), ("scale",))
    assert columns_read([RewardSpec(f"{source}:level", options={"level": [1, 2, 3]})]) == ((), ("scale",))
    assert columns_read([RewardSpec("accuracy"), RewardSpec("no such reward")]) == ((), ())
    shipped = [RewardSpec("code_tests"), RewardSpec("multiple_choice", options={"choices": "options"})]
    assert columns_read(shipped) == (("tests", "options"), ())
    path = tmp_path / "asks.py"
    path.write_text("def whole(request): ...\nwhole.columns = ('extra.level',)\ndef some(completions, **columns): ...")
    assert columns_read([RewardSpec(f"{path}:whole"), RewardSpec(f"{path}:some")]) == (("extra.level",), ())


def test_the_default_rewards_add_up() -> None:
    reward = build_rewards([RewardSpec("format", 0.5), RewardSpec("accuracy")])
    good, wrong, bare = (
        "<think>a</think><answer>red</answer>",
        "<think>a</think><answer>blue</answer>",
        "<answer>red</answer>",
    )
    verdicts = reward(ScoringRequest("", (good, wrong, bare, "red"), answer="red"))
    assert [v.score for v in verdicts] == [1.5, 0.5, 1.0, 0.0]
    assert [dict(v.parts) for v in verdicts] == [
        {"format": 1.0, "accuracy": 1.0},
        {"format": 1.0, "accuracy": 0.0},
        {"format": 0.0, "accuracy": 1.0},
        {"format": 0.0, "accuracy": 0.0},
    ]
    assert "format: <think> occurs 0 times" in verdicts[3].reason and "accuracy: " in verdicts[3].reason


def fixed(verdict: Verdict) -> Any:
    def reward(request: ScoringRequest) -> Sequence[Verdict]:
        return [verdict] * len(request.completions)

    return reward


FAILURES = [Verdict(status, reason="because") for status in ("unscorable", "timeout", "error")]  # type: ignore[arg-type]


def combined(*parts: tuple[float, Combine], weights: Sequence[float] = ()) -> float | None:
    """The score of parts `(score, how it is combined)`."""
    weights = weights or [1.0] * len(parts)
    terms = [
        Term(str(i), weight, fixed(Verdict.scored(score)), combine)
        for i, ((score, combine), weight) in enumerate(zip(parts, weights, strict=True))
    ]
    return compose(terms)(REQUEST)[0].score


def test_gates_multiply_and_caps_bound_the_sum() -> None:
    assert combined((0.5, "sum"), (1.0, "sum"), weights=(2.0, 0.5)) == 1.5  # 2 * 0.5 + 0.5 * 1
    assert combined((0.5, "sum"), (1.0, "sum"), (0.0, "product")) == 0.0
    assert combined((0.5, "sum"), (1.0, "sum"), (0.5, "product")) == 0.75  # (0.5 + 1) * 0.5
    assert combined((0.5, "sum"), (1.0, "sum"), (0.5, "product"), (0.7, "minimum")) == 0.7
    assert combined((0.5, "product"), (0.5, "product")) == 0.25  # without a sum, it counts as 1
    assert combined((2.0, "minimum"), (3.0, "minimum")) == 2.0  # caps alone: their minimum, also above 1
    assert combined((0.5, "product"), (0.4, "minimum")) == 0.4
    assert combined((1.0, "sum"), (0.0, "product"), (0.0, "minimum"), weights=(1.0, 0.0, 0.0)) == 1.0  # only recorded
    assert combined((-1.0, "sum"), (0.0, "product")) == 0.0  # a gate takes penalties away too


def test_a_gate_has_no_weight() -> None:
    (problem,) = check_rewards([RewardSpec("format", 0.5, combine="product"), RewardSpec("accuracy")])
    assert "only rewards with combine: sum have weights" in problem and "combine: product" in problem
    assert check_rewards([RewardSpec("format", combine="product"), RewardSpec("accuracy")]) == []


def test_notes_and_reasons_carry_the_name_of_their_reward() -> None:
    terms = [
        Term("a", 1.0, fixed(Verdict.scored(0.0, reason="wrong", note="saw a cat"))),
        Term("b", 0.0, fixed(Verdict.scored(1.0, note="short"))),
    ]
    verdict = compose(terms)(REQUEST)[0]
    assert (verdict.reason, verdict.note) == ("a: wrong", "a: saw a cat; b: short")


def test_only_what_is_declared_transient_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("rewards.compose.time.sleep", pauses.append)

    def failing(error: type[Exception], times: int) -> Any:
        calls = iter([error] * times)

        def reward(completions: list[str]) -> list[float]:
            for error in calls:
                raise error("busy")
            return [1.0] * len(completions)

        return compose([Term("mine", 1.0, ColumnReward(reward, {}))])(REQUEST)[0]

    assert failing(TransientError, 2).score == 1.0
    assert failing(TransientError, 3).status == "error" and "TransientError: busy" in failing(TransientError, 3).reason
    assert pauses == [0.5, 2.0] * 3
    assert failing(ValueError, 1).status == "error" and len(pauses) == 6


def test_how_long_each_reward_took_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr("rewards.compose.time.perf_counter", lambda: next(clock))
    good = fixed(Verdict.scored(1.0))
    assert compose([Term("a", 1.0, good), Term("b", 1.0, good)]).score(REQUEST).seconds == {"a": 0.5, "b": 2.0}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda v: v.status)
def test_a_part_that_fails_decides_the_whole(failure: Verdict) -> None:
    terms = [Term("good", 1.0, fixed(Verdict.scored(1.0))), Term("bad", 0.1, fixed(failure))]
    for order in (terms, terms[::-1]):
        verdict = compose(order)(REQUEST)[0]
        assert (verdict.status, verdict.score, verdict.reason) == (failure.status, None, "bad: because")


def test_a_part_of_weight_zero_is_recorded_and_decides_nothing() -> None:
    good = Term("good", 2.0, fixed(Verdict.scored(1.0)))
    watched = compose([good, Term("watched", 0.0, fixed(Verdict.scored(5.0)))])(REQUEST)[0]
    assert watched.score == 2.0 and dict(watched.parts) == {"good": 1.0, "watched": 5.0}
    failed = compose([good, Term("watched", 0.0, fixed(FAILURES[0]))])(REQUEST)[0]
    assert failed.score == 2.0 and dict(failed.parts) == {"good": 1.0}


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=5))
def test_the_sum_is_weighted(pairs: list[tuple[float, float]]) -> None:
    terms = [Term(str(i), weight, fixed(Verdict.scored(score))) for i, (weight, score) in enumerate(pairs)]
    verdict = compose(terms)(REQUEST)[0]
    assert verdict.score == pytest.approx(math.fsum(w * s for w, s in pairs), abs=1e-6)
    assert list(verdict.parts.values()) == [score for _, score in pairs]


def test_a_sum_beyond_all_bounds_is_an_error() -> None:
    for weight, total in ((1e300, "inf"), (2.0**100, "1.26")):  # beyond float64, and beyond float32 alone
        verdict = compose([Term("huge", weight, fixed(Verdict.scored(1e30)))])(REQUEST)[0]
        assert verdict.status == "error" and f"combine to {total}" in verdict.reason
    opposed = [Term(name, weight, fixed(Verdict.scored(1e30))) for name, weight in (("a", 1e300), ("b", -1e300))]
    assert "combine to nan" in compose(opposed)(REQUEST)[0].reason


def test_names_in_a_sum_differ() -> None:
    term = Term("same", 1.0, fixed(Verdict.scored(1.0)))
    with pytest.raises(ValueError, match="different names"):
        compose([term, term])
    with pytest.raises(ValueError, match="at least one"):
        compose([])


def test_the_examples_in_the_documentation_work(repository: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "rewards.md").read_text(), re.DOTALL)
    path = tmp_path / "documented.py"
    path.write_text("\n".join(blocks))
    request = ScoringRequest("", ("short", "long " * 200), columns={"kind": "photo"})
    assert [v.score for v in load_reward(f"{path}:brevity")(request)] == [1.0, 0.0]
    essay = ScoringRequest("", ("short",), columns={"kind": "essay"})
    assert load_reward(f"{path}:brevity")(essay)[0].status == "unscorable"
    assert len(load_reward(f"{path}:finished")(ScoringRequest("", ()))) == 0


def test_a_working_directory_that_is_gone_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray nodes that share a machine unpack a job's folder anew under the feet of its driver."""
    (tmp_path / "mine.py").write_text("def one(completions): return [1.0] * len(completions)\n")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert [v.score for v in load_reward(f"{tmp_path}/mine.py:one")(ScoringRequest("?", ("a",)))] == [1.0]
    with pytest.raises(RewardSetupError, match=r"no file his\.py in a folder that is gone or on the import path"):
        load_reward("his.py:one")


def test_what_was_found_in_a_working_directory_is_found_again_once_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    for times in range(2):
        folder.mkdir()
        (folder / "of_a_job.py").write_text("def one(completions): return [1.0] * len(completions)\n")
        if times == 0:
            monkeypatch.chdir(folder)
        for name in ("of_a_job.py:one", "of_a_job:one"):
            assert [v.score for v in load_reward(name)(ScoringRequest("?", ("a",)))] == [1.0]
        shutil.rmtree(folder)

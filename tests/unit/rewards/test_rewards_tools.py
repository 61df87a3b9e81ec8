"""`saccade rewards score` and `saccade rewards check`: a verdict for every line, and rewards caught at what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from saccade.cli import app
from saccade.commands.reward_check import Probe, findings, generation_seconds, probe
from saccade.commands.rewards import _request, score_file
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError

PATIENCE = 180.0


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def test_every_line_of_a_file_gets_a_verdict(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {"completion": "<answer>3</answer>", "answer": 3},
        {"completion": "<answer>3.1</answer>", "answer": "3"},
        {"completion": "<answer>4</answer>", "answer": ["3", "4"]},
        b"\n",
        {"completion": "", "answer": "3"},
        {"completion": "x" * 100_000, "answer": "3"},
        {"completion": "<answer>3</answer>"},
        {"completion": None, "answer": "3"},
        {"answer": "3"},
        [1, 2],
        b"no json\n",
        b'{"completion": "<answer>\xff\xfe3</answer>", "answer": "3"}\n',
        b"[" * 100_000 + b"\n",
    )
    verdicts = list(score_file(RewardSpec("accuracy", options={"tolerance": 0.05}), path, PATIENCE))
    assert [v.score for v in verdicts[:5]] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert [v.status for v in verdicts[5:10]] == ["unscorable", "error", "error", "error", "error"]
    assert "line 8: the column `completion` is missing" in verdicts[6].reason and "line 11" in verdicts[9].reason
    assert [v.status for v in verdicts[10:]] == ["scored", "error"] and verdicts[10].score == 0.0
    assert "nested too deeply" in verdicts[11].reason


def test_a_gold_is_read_as_a_run_reads_it(tmp_path: Path) -> None:
    red = "<think>I look.</think><answer>red</answer>"
    golds = ["<answer> red </answer>", red, "red", "It is \\boxed{red}", ["blue", "red", None], "<answer>blue</answer>"]
    refused = [
        {"ground_truth": "red"},
        "<answer>red</answer> or <answer>blue</answer>",
        "x" * 10_000 + "</think>",
        None,
    ]
    path = lines(tmp_path / "rows.jsonl", *({"completion": red, "answer": gold} for gold in [*golds, *refused]))
    verdicts = list(score_file(RewardSpec("accuracy"), path, PATIENCE))
    assert [v.score for v in verdicts] == [1.0] * 5 + [0.0] + [None] * 4
    assert [v.status for v in verdicts[6:]] == ["error", "error", "unscorable", "unscorable"]
    assert verdicts[6].reason.startswith("line 7: column 'answer': a struct (ground_truth); name its field")
    assert max(len(v.reason) for v in verdicts) < 300


def test_tests_of_programs_are_no_text_that_marks_an_answer() -> None:
    codes = ["assert visible('<think>a</think>b') == 'b'", "assert f(1) == 2  #### 1"]
    line = json.dumps({"completion": "", "answer": codes}).encode()
    assert json.loads(_request(line, as_written=True).answer or "") == codes
    assert json.loads(_request(line).answer or "") == ["b') == 'b'", "1"]


def test_score_writes_json_lines_and_takes_options(tmp_path: Path) -> None:
    (tmp_path / "leveled.py").write_text(
        "def mine(completions, level, factor=1.0):\n"
        "    return [None if value is None else factor * value for value in level]\n"
    )
    path = lines(
        tmp_path / "rows.jsonl",
        {"completion": "a", "level": 2},
        {"completion": "a", "level": None},
        b'{"completion": "a", "level": NaN}\n',
        {"completion": "a"},
    )
    result = CliRunner().invoke(app, ["rewards", "score", f"{tmp_path}/leveled.py:mine", str(path), "factor=0.25"])
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in result.stdout.splitlines()]
    assert written[0] == {"status": "scored", "score": 0.5, "reason": ""}
    assert written[1] == {"status": "unscorable", "score": None, "reason": "the reward function returned None"}
    assert written[2]["status"] == "error" and "not a finite float32 number" in written[2]["reason"]
    assert written[3]["status"] == "error" and "missing 1 required positional argument: 'level'" in written[3]["reason"]


def test_all_that_is_wrong_with_a_command_is_said_at_once(tmp_path: Path) -> None:
    arguments = ["rewards", "score", "acuracy", str(tmp_path / "none.jsonl"), "tolerance"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigError) and len(error.problems) == 3
    for part in ("did you mean 'accuracy'", "no such file", "'tolerance' is not of the form"):
        assert part in str(error)


CONFIG = {
    "output_dir": "x",
    "steps": 1,
    "model": {"path": "m"},
    "data": {"train": ["t.parquet"]},
    "rollout": {"num_generations": 4, "max_completion_length": 500},
    "reward": {"timeout": PATIENCE},
}
ROWS = {f"d:{i}": ScoringRequest(f"what is {i}?", (), answer=str(i), columns={"level": i}) for i in range(3)}

SOURCE = """
import random, time
from rewards.functions.format import answer_text

def good(completions, answer):
    return [float(answer_text(text) == gold) for text, gold in zip(completions, answer)]

def stingy(completions, answer):
    return [0.5 * score if len(text) < 1000 else 1.0 for text, score in zip(completions, good(completions, answer))]

def generous(completions):
    return [0.0 if len(text) > 1000 else 0.1 if not text else 1.0 for text in completions]

def constant(completions):
    return [0.3 for _ in completions]

def ordered(completions, answer):
    return [score / (1 + place) for place, score in enumerate(good(completions, answer))]

calls = 0

def moody(completions, answer):
    global calls
    calls += 1
    return [score + 0.001 * calls for score in good(completions, answer)]

def lister(completions, answer):
    return [float(gold in (answer_text(text) or "")) for text, gold in zip(completions, answer)]

def finished(request):
    from rollout.types import Verdict
    return [Verdict.scored(float(c.finish_reason == "stop"), note=f"{c.num_tokens} tokens") for c in request.raw]

def broken(completions, answer):
    return [1.0 if len(text) > 1000 else None for text in completions]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "probed.py"
    path.write_text(SOURCE)
    return path


def found(name: str, options: dict[str, Any] | None = None, **reward: Any) -> list[str]:
    config = parse_config({**CONFIG, "reward": {**CONFIG["reward"], **reward}})  # type: ignore[dict-item]
    return list(findings(probe(RewardSpec(name, options=options or {}), ROWS, config), PATIENCE, 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("good", []),
        ("stingy", ["gives the gold answer less than full marks (1) in 3 of 3 rows: 0.5", "gives full marks to: very"]),
        ("generous", ["gives empty completions up to 0.1; its minimum is 0", "gives junk completions up to 1"]),
        ("constant", ["gives every completion the same score (0.3)"]),
        ("ordered", ["depends on the order of calls"]),
        ("moody", ["depends on the order of calls"]),
        ("lister", ["gives full marks to: two answers", "gives full marks to: both boxes"]),
        ("finished", ["gives every completion the same score (1)"]),  # the raw completions are there
        ("broken", ["gives the gold answer less than full marks (1) in 3 of 3 rows: "]),
    ],
)
def test_what_a_reward_does_wrong_is_reported(source: Path, name: str, expected: list[str]) -> None:
    reported = found(f"{source}:{name}")
    for text in expected:
        assert any(text in line for line in reported), reported
    if not expected:
        assert not reported


def test_shipped_rewards_have_nothing_to_report() -> None:
    assert found("accuracy") == found("format") == found("exact_match") == []
    assert found("accuracy", {"scope": "completion"}) == []
    assert found("format", {"style": "newline"}, functions=[{"name": "format", "options": {"style": "newline"}}]) == []
    assert any("empty" in line for line in found("length", {"maximum": 50}))


def test_a_right_completion_may_be_the_rewards_own_business() -> None:
    config = parse_config(CONFIG)
    rows = {"d:0": ScoringRequest("weather?", (), answer='{"name": "weather", "arguments": {"city": "Paris"}}')}
    assert list(findings(probe(RewardSpec("tool_call"), rows, config), PATIENCE, 1)) == []


def test_slower_than_generation_is_by_the_engine_s_share() -> None:
    config = parse_config(CONFIG)
    # 500 steps of 10 ms, of which a group of 4 takes 4 of 256 places: 5 s / 64
    assert generation_seconds(config, 10.0) == pytest.approx(5 / 64)
    slow = Probe("mine", bounded=False, seconds=[0.1, 9.0, 0.2])
    (line,) = [line for line in findings(slow, 5 / 64, actors=2) if "slower" in line]
    assert "0.1 s a group with 2 reward actor(s), against 0.0781 s" in line
    assert not [line for line in findings(slow, 5 / 64, actors=3) if "slower" in line]  # 0.0667 s

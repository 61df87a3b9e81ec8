"""Code: does the program in the answer pass the tests? It is run in a sandbox (rewards/sandbox.py), and nowhere else.

    test {"input": "3 4", "output": "7"}     the program reads standard input and prints
    test {"code": "assert add(3, 4) == 7"}   run after the program, in the same process

Where this machine cannot isolate a program, the reward refuses to be loaded: the run does not start.

Failure modes: few tests are passed by programs that print what was expected; keep tests out of the prompt. A program
that searches its own process may find the `code` of a test, but not an `output`, which never enters the sandbox. It has
Python's standard library, no packages. A group is given K * tests * `seconds` at worst: see that this is within
`reward.timeout`, or let the tests be fewer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.format import Scope, check_scope, judged_text
from rewards.sandbox import Limits, Outcome, isolation_problem, run
from rewards.user import RewardSetupError
from rollout.types import Verdict

MAX_CHARACTERS = 100_000
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_HARNESS = """
import json, sys
with sys.stdin as given:
    program, test, word = json.load(given)
space = {"__name__": "__main__"}
exec(compile(program, "program", "exec"), space)
exec(compile(test, "test", "exec"), space)
print(word)
"""
"""Runs program and test, then prints a word that only who reached the end can print: leaving early is no success."""


@dataclass(frozen=True, slots=True)
class CodeTestsReward:
    """1.0 for a program that passes all tests of its row, else 0.0 with the first failure; `unscorable` without any."""

    separable: ClassVar[bool] = True
    column: str | None = "tests"
    """Column with the tests: a list of objects, or its JSON text. None: the row's answer has them."""
    scope: Scope = "answer"
    seconds: float = 5.0
    """Wall time of one test."""
    memory_mib: int = 512
    processes: int = 8
    partial: bool = False
    """The share of tests that are passed, in place of 0.0 where some fail."""

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if min(self.seconds, self.memory_mib, self.processes) <= 0:
            raise ValueError("seconds, memory_mib and processes must be positive")

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        self.warm_up()
        try:
            tests = _tests(gold_of(request, self.column))
        except (ValueError, TypeError) as error:
            return unscorable(request, f"the row's {self.column or 'answer'} holds no tests: {error}"[:300])
        return [self._judge(tests, text) for text in request.completions]

    def warm_up(self) -> None:
        """Tries the sandbox. Raises RewardSetupError where it does not hold."""
        if problem := isolation_problem():
            raise RewardSetupError(f"code_tests: {problem}. It runs programs in Linux namespaces or not at all")

    def _judge(self, tests: Sequence[Mapping[str, str]], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        blocks = _FENCE.findall(answer)
        program = blocks[-1] if blocks else answer
        if len(program) > MAX_CHARACTERS:
            return Verdict.scored(0.0, reason=f"a program of more than {MAX_CHARACTERS} characters")
        passed, first = 0, ""
        for number, test in enumerate(tests, 1):
            problem = self._problem(program, test)
            passed += not problem
            if problem and not first:
                first = f"test {number} of {len(tests)}: {problem}"
                if not self.partial:
                    break
        score = passed / len(tests) if self.partial else float(passed == len(tests))
        return Verdict.scored(score, reason=first)

    def _problem(self, program: str, test: Mapping[str, str]) -> str:
        """Why the program fails a test; empty if it passes."""
        limits = Limits(self.seconds, self.memory_mib * 2**20, processes=self.processes)
        word = secrets.token_hex(16)
        if "code" in test:
            given = json.dumps([program, test["code"], word])
            outcome = run({"main.py": _HARNESS}, given, limits)
        else:
            outcome = run({"main.py": program}, test["input"], limits)
        if outcome.exit is None:
            return f"longer than {self.seconds:g} s"
        if outcome.exit != 0:
            return _ending(outcome)
        if "code" in test:
            return "" if outcome.output.endswith(f"{word}\n") else "ended before the test did"
        same = _lines(outcome.output) == _lines(test["output"])
        return "" if same else f"printed {outcome.output[:60]!r}, not {test['output'][:60]!r}"


def _ending(outcome: Outcome) -> str:
    last, status = outcome.errors.strip().rpartition("\n")[2][:200], outcome.exit or 0
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {last}" if last else how


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, nor empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _tests(value: Any) -> list[Mapping[str, str]]:
    """Raises ValueError or TypeError for what is no list of tests."""
    tests = json.loads(value) if isinstance(value, str) else value
    tests = [tests] if isinstance(tests, Mapping) else list(tests)
    if not tests:
        raise ValueError("the list is empty")
    return [_test(test) for test in tests]


def _test(test: Any) -> Mapping[str, str]:
    """One test with its texts alone: tables give every row all the keys, some of them None."""
    given = {k: v for k, v in test.items() if v is not None} if isinstance(test, Mapping) else {}
    found = {"code": given["code"]} if "code" in given else {"input": "", **given}
    wanted = ("code",) if "code" in given else ("input", "output")
    if not all(isinstance(found.get(name), str) for name in wanted):
        raise ValueError('a test is {"input": text, "output": text} or {"code": text}')
    return {name: found[name] for name in wanted}

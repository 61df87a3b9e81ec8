"""Code: does the program in the answer pass the tests? It is run in a sandbox (rewards/sandbox/), and nowhere else.

    test {"input": "3 4", "output": "7"}     the program reads standard input and prints
    test {"code": "assert add(3, 4) == 7"}   calls the program's functions, from a process and a sandbox of its own
    tests                                    a list of those, of codes, or `{"inputs": [..], "outputs": [..]}`;
                                             nulls, and tests of nothing but nulls, are none: tables fill them in

The program is the last Markdown fence labelled `python`, `Python`, `py`, `python3` and the like; else the last fence
without a label, else the whole answer. What is printed must be the expected lines: white space at the end of a line and
empty lines at the end do not count, everything else does (`7.0` is not `7`). For `code` the program is loaded under the
name `program`, so that its `__main__` part does not run, with nothing to read.

What says that a test was passed never enters the program's process (sandbox/remote_program.py): an expected output is
compared here, and the asserts of a `code` run where no line of the program does. Where this machine cannot isolate a
program, the reward refuses to be loaded: the run does not start.

Failure modes: few tests are passed by programs that return what was expected; keep tests out of the prompt. A test of
a class of the program's own compares as that class says. A test that hands the program an object of a class of the
test's makes the row `unscorable`. There is Python's standard library, no packages. A group is given K * tests *
`seconds` at worst: see that this is within `reward.timeout`, or let the tests be fewer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rewards.answers.nulls import is_blank, is_null
from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.functions.format import Scope, check_scope, judged_text
from rewards.functions.user import RewardSetupError
from rewards.sandbox.remote_program import FAILED, PASSED, UNSUPPORTED
from rewards.sandbox.sandbox import Limits, Outcome, isolation_problem, run, run_linked
from rollout.types import Verdict

MAX_CHARACTERS = 100_000
_OPENING = re.compile(r"(`{3,}|~{3,})[ \t]*([^`~]*)$")
_PYTHON = re.compile(r"(?i)[{.\s]*(?:i?python|py)[\d.]*(?![\w])")
_MAIN = "import sys\nsys.path.insert(0, '.')\nfrom rewards.sandbox.remote_program import main\nmain()\n"
_LISTS = {part + s: part for part in ("input", "output", "code") for s in ("", "s")}
"""What an object of lists calls them: `Sequence` of `datasets` makes `{"input": [..], "output": [..]}` of objects."""
_FUNCTION = ("fn_name", "func_name", "entry_point")
_SANDBOX = Path(__file__).parents[1] / "sandbox"
_MODULES = ("remote_program.py", "remote_object.py")


class _UnjudgeableError(Exception):
    """A test that cannot be run against any program; says why."""


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
        except (ValueError, TypeError, RecursionError) as error:
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
        program = program_of(answer)
        if len(program) > MAX_CHARACTERS:
            return Verdict.scored(0.0, reason=f"a program of more than {MAX_CHARACTERS} characters")
        try:
            return self._tested(tests, program)
        except _UnjudgeableError as error:
            return Verdict("unscorable", reason=str(error))

    def _tested(self, tests: Sequence[Mapping[str, str]], program: str) -> Verdict:
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
        if "code" in test:
            return self._call_problem(program, test["code"], limits)
        outcome = run({"main.py": program}, test["input"], limits)
        if outcome.exit is None:
            return f"longer than {self.seconds:g} s"
        if outcome.exit != 0:
            return _ending(outcome)
        same = _lines(outcome.output) == _lines(test["output"])
        return "" if same else f"printed {outcome.output[:60]!r}, not {test['output'][:60]!r}"

    def _call_problem(self, program: str, test: str, limits: Limits) -> str:
        """Raises _UnjudgeableError."""
        word = secrets.token_hex(16)
        jobs = {"role": "test", "text": test, "word": word}, {"role": "program", "text": program}
        modules = {f"rewards/sandbox/{name}": (_SANDBOX / name).read_text("utf-8") for name in _MODULES}
        asking, answering = ({"main.py": _MAIN, "job.json": json.dumps(job), **modules} for job in jobs)
        outcome, answered = run_linked(asking, answering, limits)
        if outcome.exit == UNSUPPORTED:
            raise _UnjudgeableError(outcome.errors.strip()[-300:])
        if outcome.exit is None:
            return f"longer than {self.seconds:g} s"
        if outcome.exit == FAILED:
            return outcome.errors.strip().rpartition("\n")[2][:200]
        passed = outcome.exit == PASSED and outcome.errors.endswith(f"\n{word}\n")
        if not passed and answered.exit is None:  # its time began, and ended, before the test's
            return f"longer than {self.seconds:g} s"
        return "" if passed else "the program ended before the test did"


def program_of(answer: str) -> str:
    """The program in an answer: its last fence for Python, else its last fence without a label, else all of it."""
    found: dict[str, str] = {}
    mark, kind, lines = "", "", list[str]()
    for line in [*answer.splitlines(), None]:  # None ends a fence that nothing closes
        if not mark:
            if line is not None and (opening := _OPENING.search(line)):
                mark, label, lines = opening[1], opening[2].strip(), []
                kind = "python" if _PYTHON.match(label) else "other" if label else "plain"
            continue
        ended = line is None or line.rstrip().endswith(mark)
        if line is not None:
            lines.append(line.rstrip().rstrip(mark[0]) if ended else line)
        if ended:
            found[kind], mark = "\n".join(lines), ""
    return found.get("python", found.get("plain", answer))


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
    if (called := _called(tests)) is not None:
        raise ValueError(
            f'they call {called!r} with values and do not say how; write {{"code": "assert {called}(..) == .."}}'
        )
    if isinstance(tests, Mapping):
        tests = _rows(tests)
    if not isinstance(tests, list | tuple):
        raise TypeError(f"tests are a list or an object, found {type(tests).__name__}")
    if not (given := [test for test in tests if not is_blank(test)]):
        raise ValueError("nothing but nulls" if tests else "the list is empty")
    return [_test(test) for test in given]


def _called(tests: Any) -> str | None:
    """The function that tests name as APPS, TACO and LiveCodeBench do: their inputs are no standard input."""
    for test in [tests] if isinstance(tests, Mapping) else tests if isinstance(tests, list | tuple) else ():
        if isinstance(test, Mapping) and is_null(test.get("code")):
            name = next((test[key] for key in _FUNCTION if not is_null(test.get(key))), None)
            if name is not None or test.get("testtype") == "functional":
                return str(name or "a function")
    return None


def _rows(tests: Mapping[str, Any]) -> list[Any]:
    """The tests of an object: it is one, or has a list for each of their parts."""
    given = {name: tests[name] for name in _LISTS if isinstance(tests.get(name), list)}
    given = {name: values for name, values in given.items() if not all(map(is_null, values))} or given
    lists = {_LISTS[name]: values for name, values in given.items()}
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError(f"its lists {', '.join(lists)} are of different lengths")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)] if lists else [tests]


def _test(test: Any) -> Mapping[str, str]:
    """One test with its texts alone: tables give every row all the keys, some of them null."""
    given = {"code": test} if isinstance(test, str) else {}
    if isinstance(test, Mapping):
        given = {k: v for k, v in test.items() if not is_null(v)}
    found = {"code": given["code"]} if "code" in given else {"input": "", **given}
    wanted = ("code",) if "code" in given else ("input", "output")
    if not all(isinstance(found.get(name), str) for name in wanted):
        raise ValueError('a test is {"input": text, "output": text}, {"code": text}, or a code')
    return {name: found[name] for name in wanted}

"""Code: does the program in the answer pass the tests? It runs in a sandbox (rewards/sandbox/) and nowhere else.

    test {"input": "3 4", "output": "7"}     the program reads standard input and prints
    test {"code": "assert add(3, 4) == 7"}   calls the program's functions, from a process and a sandbox of its own
    tests                                    a list of those, of codes, or `{"inputs": [..], "outputs": [..]}`;
                                             nulls, and tests with only nulls, are ignored: tables add them

The program is the last Markdown fence labelled `python`, `Python`, `py`, `python3` or similar; otherwise the last fence
without a label; otherwise the whole answer. It must print the expected lines. White space at the end of a line and
empty lines at the end do not count; everything else does (`7.0` is not `7`). For `code`, the program is loaded under
the name `program`, so that its `__main__` part does not run, and its standard input is empty.

The check of a test never runs in the program's process (sandbox/remote_program.py): outputs are compared here, and the
asserts of a `code` run where no line of the program runs. If this machine cannot isolate a program, the reward refuses
to load, and the run does not start.

Failure modes: a program can pass a few tests by returning the expected values, so keep the tests out of the prompt. If
a test compares an object of the program's class, that class decides. A test that passes the program an object of a
class of the test makes the row `unscorable`. The standard library is available, packages are not. A group takes up to K
* tests * `seconds`: keep that within `reward.timeout`, or use fewer tests.
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
"""Keys of an object of lists. `Sequence` of `datasets` turns a list of objects into `{"input": [..], "output":
[..]}`."""
_FUNCTION = ("fn_name", "func_name", "entry_point")
_SANDBOX = Path(__file__).parents[1] / "sandbox"
_MODULES = ("remote_program.py", "remote_link.py", "remote_object.py")


class _UnjudgeableError(Exception):
    """A test cannot be run against any program; the message says why."""


@dataclass(frozen=True, slots=True)
class CodeTestsReward:
    """Scores 1.0 for a program that passes all tests of its row, and otherwise 0.0 with the first failure. A row
    without tests is `unscorable`."""

    separable: ClassVar[bool] = True
    column: str | None = "tests"
    """Column with the tests: a list of objects, or its JSON text. None: the row's answer holds the tests."""
    scope: Scope = "answer"
    seconds: float = 5.0
    """Time limit of one test, in seconds of wall time."""
    memory_mib: int = 512
    processes: int = 8
    partial: bool = False
    """If some tests fail, score the share of tests that pass instead of 0.0."""

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
        """Test the sandbox. Raises RewardSetupError if it does not hold."""
        if problem := isolation_problem():
            raise RewardSetupError(f"code_tests: {problem}. It needs Linux namespaces to run programs")

    def _judge(self, tests: Sequence[Mapping[str, str]], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        program = program_of(answer)
        if len(program) > MAX_CHARACTERS:
            return Verdict.scored(0.0, reason=f"the program is longer than {MAX_CHARACTERS} characters")
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
        """Explain why the program fails a test; empty if it passes."""
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
        """Explain why the program fails a test that calls it; empty if it passes. Raises _UnjudgeableError."""
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
        if not passed and answered.exit is None:  # its time began and ended before that of the test
            return f"longer than {self.seconds:g} s"
        return "" if passed else "the program ended before the test did"


def program_of(answer: str) -> str:
    """Return the program in an answer: its last fence for Python, else its last fence without a label, else all of
    it."""
    found: dict[str, str] = {}
    mark, kind, lines = "", "", list[str]()
    for line in [*answer.splitlines(), None]:  # None ends an unclosed fence
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
    """Split into lines without trailing white space and without trailing empty lines."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _tests(value: Any) -> list[Mapping[str, str]]:
    """Read the tests. Raises ValueError or TypeError if there is no list of tests."""
    tests = json.loads(value) if isinstance(value, str) else value
    if (called := _called(tests)) is not None:
        raise ValueError(
            f'they call {called!r} with values but do not say how; write {{"code": "assert {called}(..) == .."}}'
        )
    if isinstance(tests, Mapping):
        tests = _rows(tests)
    if not isinstance(tests, list | tuple):
        raise TypeError(f"tests must be a list or an object, found {type(tests).__name__}")
    if not (given := [test for test in tests if not is_blank(test)]):
        raise ValueError("they are all null" if tests else "the list is empty")
    return [_test(test) for test in given]


def _called(tests: Any) -> str | None:
    """Return the function that the tests of APPS, TACO and LiveCodeBench call; their inputs are not standard input."""
    for test in [tests] if isinstance(tests, Mapping) else tests if isinstance(tests, list | tuple) else ():
        if isinstance(test, Mapping) and is_null(test.get("code")):
            name = next((test[key] for key in _FUNCTION if not is_null(test.get(key))), None)
            if name is not None or test.get("testtype") == "functional":
                return str(name or "a function")
    return None


def _rows(tests: Mapping[str, Any]) -> list[Any]:
    """Read the tests of an object: one test, or a list for each part of several tests."""
    given = {name: tests[name] for name in _LISTS if isinstance(tests.get(name), list)}
    given = {name: values for name, values in given.items() if not all(map(is_null, values))} or given
    lists = {_LISTS[name]: values for name, values in given.items()}
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError(f"its lists {', '.join(lists)} have different lengths")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)] if lists else [tests]


def _test(test: Any) -> Mapping[str, str]:
    """Keep only the texts of a test. Tables give every row all keys, and some are null."""
    given = {"code": test} if isinstance(test, str) else {}
    if isinstance(test, Mapping):
        given = {k: v for k, v in test.items() if not is_null(v)}
    found = {"code": given["code"]} if "code" in given else {"input": "", **given}
    wanted = ("code",) if "code" in given else ("input", "output")
    if not all(isinstance(found.get(name), str) for name in wanted):
        raise ValueError('a test must be {"input": text, "output": text}, {"code": text}, or a text of code')
    return {name: found[name] for name in wanted}

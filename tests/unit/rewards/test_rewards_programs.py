"""code_tests without a sandbox: which part of an answer is the program, which output is equal, and what a test in
another process than the program's sees of it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewards.functions.code_tests import _lines, _tests, program_of
from rewards.sandbox.remote_link import LinkEndedError
from rewards.sandbox.remote_program import ProgramEnd, UnsupportedError, run_test
from tests.helpers.data_helpers import source

X = "x = 1\nprint(x)"


@pytest.mark.parametrize(
    "answer",
    [
        *(f"```{label}\n{X}\n```" for label in ("", "python", "Python", "PYTHON", "python3", "py", "py3", "Python 3")),
        *(
            f"```{label}\n{X}\n```"
            for label in (" python", "{python}", "{.python}", "python3.11", "ipython", "python ")
        ),
        *(f"{mark}python\n{X}\n{mark}" for mark in ("~~~", "````", "~~~~")),
        f"```python\r\n{X}\r\n```".replace("1\n", "1\r\n"),
        f"Here it is:\n```python\n{X}\n```\nDone.",
        f"Here: ```python\n{X}\n```",
        f"```python\n{X}```",
        f"```python\n{X}",  # cut off
        f"```\nold\n```\n```\n{X}\n```",  # the last one
        f"```python\nold\n```\nBetter:\n```python\n{X}\n```",
        f"```python\n{X}\n```\nIt prints:\n```\n1\n```",  # the labelled one
        f"```python\n{X}\n```\n```text\n1\n```",
        f"```bash\npython x.py\n```\n```py\n{X}\n```",
        f"```text\n1\n```\n```\n{X}\n```",
        X,
    ],
)
def test_the_program_of_an_answer(answer: str) -> None:
    assert program_of(answer).rstrip("\n") == X


@pytest.mark.parametrize("answer", ["```cpp\nint x;\n```", "```pytorch\nx\n```", "print('```')", "", "```js\n1\n"])
def test_what_is_no_python_fence_is_taken_whole(answer: str) -> None:
    assert program_of(answer) == answer or "```" not in program_of(answer)


@pytest.mark.parametrize(
    ("expected", "printed", "equal"),
    [
        *(("7", printed, True) for printed in ("7", "7\n", "7  \n", "7\n\n\n", "7\r\n", "7\t")),
        *(
            ("7\n", "7", True),
            ("7\n\n", "7", True),
            ("1\n2", "1 \n2\n", True),
            ("1\r\n2\r\n", "1\n2", True),
            ("", "\n", True),
        ),
        *(("7", printed, False) for printed in ("7.0", " 7", "\n7", "07", "8", "", "7\n8", "7 7", "seven")),
        *(("1 2", "1  2", False), ("1\n2", "1 2", False), ("1\n\n2", "1\n2", False), ("Yes", "YES", False)),
        *(("0.5", "0.50", False), ("0.1", "0.10000000000000001", False), ("[1, 2]", "[1,2]", False)),
    ],
)
def test_outputs_are_equal_up_to_white_space_at_ends(expected: str, printed: str, equal: bool) -> None:
    assert (_lines(printed) == _lines(expected)) is equal


def test_forms_of_tests() -> None:
    assert _tests({"inputs": ["1", "2"], "outputs": ["3", "4"]}) == [
        {"input": "1", "output": "3"},
        {"input": "2", "output": "4"},
    ]
    assert _tests('["assert f(1) == 2", null]') == [{"code": "assert f(1) == 2"}]
    assert _tests([{"input": None, "output": "7", "code": None}]) == [{"input": "", "output": "7"}]


NAN = float("nan")
ONE = [{"input": "1", "output": "2"}]


@pytest.mark.parametrize(
    ("tests", "read"),
    [
        ([*ONE, {"input": None, "output": None}], ONE),
        ([{"input": None, "output": None, "code": None}, {**ONE[0], "code": None}, None], ONE),
        ([*ONE, {"input": NAN, "output": NAN}, NAN], ONE),
        ([{**ONE[0], "more": {"a": None}}, {"input": None, "output": None, "more": {"a": None}}], ONE),
        ('[{"input": "1", "output": "2"}, {"input": null, "output": null}]', ONE),
        ({"input": ["1", None], "output": ["2", None]}, ONE),
        ({"inputs": ["1"], "outputs": ["2"], "code": None, "fn_name": None}, ONE),
        ({"inputs": ["1", None], "outputs": ["2", None], "code": [None, None, None]}, ONE),
        ({"inputs": None, "outputs": None, "code": ["f(1)", None]}, [{"code": "f(1)"}]),
        ({"inputs": [], "outputs": [], "code": ["f(1)"]}, [{"code": "f(1)"}]),
        ({"input": ["1"], "output": ["2"], "inputs": [None], "outputs": []}, ONE),
        ({"input": None, "output": None, "code": "f(1)"}, [{"code": "f(1)"}]),
    ],
)
def test_what_tables_fill_in_is_no_test(tests: object, read: object) -> None:
    assert _tests(tests) == read


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([None], "they are all null"),
        ([{"input": None, "output": None}], "they are all null"),
        ({"input": None, "output": None}, "they are all null"),
        ({"inputs": ["1"], "outputs": ["2", "3"]}, "its lists input, output have different lengths"),
        ({"inputs": [], "outputs": []}, "the list is empty"),
        ([{"input": "1", "output": None}], "a test must be"),
        (None, "a list or an object, found NoneType"),
        (3, "a list or an object, found int"),
    ],
)
def test_what_holds_no_tests_says_why(tests: object, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        _tests(tests)


def test_tests_of_a_parquet_file_are_those_that_were_written(tmp_path: Path) -> None:
    rows = [[*ONE, None], [{"code": "f(1)"}]]
    table = pa.Table.from_pylist([{"prompt": "q", "answer": "1", "tests": row} for row in rows])
    pq.write_table(table, tmp_path / "a.parquet")
    data = source(tmp_path / "a.parquet", options={"extra_columns": ("tests",)}, shuffle=False)
    prompts = [data.attempt(row) for row in range(2)]
    assert [_tests(prompt.columns["tests"]) for prompt in prompts if prompt] == [ONE, rows[1]]


def tried(program: str, test: str) -> str:
    """How a test ends: empty where it passes, else the name of what it raises."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs, contextlib.suppress(LinkEndedError):
            ProgramEnd(theirs).serve(program)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with ours:
            run_test(ours, test)
    except (Exception, SystemExit, UnsupportedError) as error:
        return type(error).__name__
    finally:
        thread.join()
    return ""


LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __lt__(self, other): return True
    def __hash__(self): return hash(7)
def add(a, b): return Liar()
"""
POINT = """
class Point:
    def __init__(self, x, y=0): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __mul__(self, k): return Point(self.x * k, self.y * k)
    def __len__(self): return 2
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __iter__(self): return iter((self.x, self.y))
    def __contains__(self, v): return v in (self.x, self.y)
    def __repr__(self): return f"Point({self.x}, {self.y})"
"""
ADD = "def add(a, b): return a + b"


@pytest.mark.parametrize(
    ("program", "test", "ending"),
    [
        (ADD, "assert add(3, 4) == 7", ""),
        (ADD, "assert add(3, 4) == 8", "AssertionError"),
        (ADD, "assert add('a', 'b') == 'ab' and add([1], [2]) == [1, 2] and add((1,), (2,)) == (1, 2)", ""),
        (ADD, "assert add(10**30, 1) == 10**30 + 1 and add(0.5, 0.25) == 0.75 and add(1j, 1) == 1 + 1j", ""),
        (ADD, "assert type(add([1], [])) is list and isinstance(add(1, 2), int)", ""),
        (ADD, "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)", ""),
        (ADD, "from decimal import Decimal as D\nassert add(D('0.1'), D('0.2')) == D('0.3')", ""),
        (ADD, "assert sub(1, 2) == -1", "NameError"),
        (ADD, "add(1, 'x')", "TypeError"),
        (ADD, "class Mine: pass\nadd(Mine(), 1)", "UnsupportedError"),
        (
            "def f(x): return {1: {2, 3}, 'k': (None, True, b'z')}",
            "assert f(0) == {1: {2, 3}, 'k': (None, True, b'z')}",
            "",
        ),
        ("def f(x): return True", "assert f(0) is True and not isinstance(f(0), str)", ""),
        ("def f(x): x.sort()", "a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]", ""),
        ("def f(b): b[0][1] = 9", "b = [[1, 2], [3]]\nrow = b[0]\nf(b)\nassert row == [1, 9]", ""),
        ("def f(d): d['n'] = 1", "d = {}\nf(d)\nassert d == {'n': 1}", ""),
        ("def f(g): return [g(i) for i in range(3)]", "assert f(lambda x: x * x) == [0, 1, 4]", ""),
        ("def f(g): return g('12')", "assert f(int) == 12 and f(len) == 2", ""),
        (
            "def f(n):\n  while n:\n    yield n\n    n -= 1",
            "assert list(f(3)) == [3, 2, 1]\nassert next(iter(f(2))) == 2",
            "",
        ),
        ("def f(): return map(str, [1])", "assert list(f()) == ['1']", ""),
        (
            "def f(): raise ValueError('bad')",
            "try:\n  f()\n  assert False\nexcept ValueError as e:\n  assert str(e) == 'bad'",
            "",
        ),
        (
            "class E(KeyError): pass\ndef f(): raise E('k')",
            "try:\n  f()\nexcept E as e:\n  assert e.args == ('k',)",
            "",
        ),
        ("class E(KeyError): pass\ndef f(): raise E('k')", "f()", "E"),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x y')",
            "p = P(1, 2)\nassert p == (1, 2) and p.x == 1",
            "",
        ),
        ("from collections import Counter as C\ndef f(s): return C(s)", "assert f('aab') == {'a': 2, 'b': 1}", ""),
        ("from math import sqrt\nimport math", "assert math.isclose(sqrt(2), 1.41421356, rel_tol=1e-6)", ""),
        ("def abs(x): return 0\ndef f(): return 3", "assert abs(f() - 1.4) < 1e-6", "AssertionError"),
        ("def f(x): return x != x", "assert f(float('nan'))", ""),
        ("n = 0\ndef up():\n  global n\n  n += 1", "up()\nup()\nassert n == 2", ""),
        (POINT, "p = Point(1, 2)\nassert p + p == Point(2, 4) and p * 3 == Point(3, 6)", ""),
        (POINT, "p = Point(1, y=2)\nassert (p.x, p[1], len(p), list(p), 2 in p) == (1, 2, 2, [1, 2], True)", ""),
        (POINT, "p = Point(1)\np.x = 5\nassert str(p) == 'Point(5, 0)' and isinstance(p, Point)", ""),
        (POINT, "assert Point(1, 2) == Point(1, 3)", "AssertionError"),
        (POINT, "assert Point(1, 2) == (1, 2)", "AssertionError"),
        (LIAR, "assert add(3, 4) == 7", "AssertionError"),
        (LIAR, "assert 7 == add(3, 4)", "AssertionError"),
        (LIAR, "assert [add(3, 4)] == [7]", "AssertionError"),
        (LIAR, "assert add(3, 4) in {7: 1}", "AssertionError"),
        (LIAR, "assert abs(add(3, 4) - 7) < 1e-9", "TypeError"),
        (LIAR, "assert abs(7 - add(3, 4)) < 1e-9", "TypeError"),
        (LIAR, "assert add(3, 4) < 8", "TypeError"),
        (
            "class I(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\ndef add(a, b): return I(0)",
            "assert add(3, 4) == 7",
            "AssertionError",
        ),
        ("import builtins\ndef add(a, b): return 0\nAssertionError = None", "assert add(3, 4) == 7", "AssertionError"),
        ("def add(a, b): raise SystemExit(0)", "assert add(3, 4) == 7", "SystemExit"),
        ("def add(a, b): return add(a, b)", "assert add(3, 4) == 7", "RecursionError"),
        ("def add(a, b):\n  x = []\n  x.append(x)\n  return x", "assert add(3, 4) == 7", "RecursionError"),
        ("1 / 0", "pass", "ZeroDivisionError"),
        ("def f(:", "pass", "SyntaxError"),
        ("print('ok'", "pass", "SyntaxError"),
    ],
)
def test_a_test_in_another_process(program: Any, test: str, ending: str) -> None:
    assert tried(program, test) == ending


def test_fences_take_linear_time() -> None:
    for hostile in ("```\n" * 200_000, "`" * 500_000, "```python " * 50_000, "~~~`" * 100_000):
        program_of(hostile)


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["[1, 2]"], "outputs": ["3"], "fn_name": "add"},  # APPS, TACO
        json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}),
        [{"input": "1\n2", "output": "3", "testtype": "functional", "func_name": "add"}],  # LiveCodeBench
    ],
)
def test_tests_that_call_a_function_with_values_are_refused_not_read_as_standard_input(tests) -> None:
    """Every program would print nothing and score 0."""
    with pytest.raises(ValueError, match=r"they call 'add' .*assert add\("):
        _tests(tests)
    padded = {"inputs": ["1"], "outputs": ["3"], "fn_name": None}
    assert _tests(padded) == [{"input": "1", "output": "3"}]
    assert _tests([{"code": "assert add(1, 2) == 3", "entry_point": "add"}]) == [{"code": "assert add(1, 2) == 3"}]

"""Run a program and the test that calls it in two processes, each in its own sandbox. Standard library only.

    test process                                    program process
    add(3, 4)  ──["call", add, [3, 4], {}]──▶       runs the program's function
               ◀──["value", 7, changed arguments]── or ["raise", ..], or ["callback", ..] for a function of the test's

The verdict comes from the test process, which runs no code of the program: only data come over the link. Plain values
are copied, and arguments that the program changes in place change in the test too. Other objects stay where they are,
and the test has a `Remote` in place of each. A `Remote` cannot claim by itself that it equals a plain value. Python's
own names (`abs`, `math`) mean Python's in the test, even if the program redefines them.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import socket
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from rewards.sandbox.remote_link import Link, LinkEndedError
from rewards.sandbox.remote_object import Remote, number_of, renew

PASSED, FAILED, LEFT, UNSUPPORTED = 0, 1, 3, 4
"""Exit statuses of the test process."""
PLAIN = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)


class UnsupportedError(BaseException):
    """The test passes the program a value that cannot be sent."""


class ProgramEnd(Link):
    """The program's end of the link: executes requests. The test accepts only values from it."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self, program: str) -> None:
        module = types.ModuleType("program")
        sys.modules["program"] = module
        try:
            exec(compile(program, "program", "exec"), module.__dict__)
        except BaseException as error:
            self.send("raise", self.export(error, 0))
            return
        self.send("value", None, None)
        while True:
            self.answer(module.__dict__, self.receive())

    def answer(self, names: Mapping[str, Any], message: list[Any]) -> None:
        try:
            what, *forms = message
            given = self.decode(forms[-1])
            before = json.dumps(forms[-1])
            if what == "global":
                result = names[given]
            elif what == "call":
                result = self.decode(forms[0])(*given[0], **given[1])
            else:
                result = getattr(operator, what, None) or getattr(builtins, what)
                result = result(*given)
            encoded, after = self.encode(result), self.encode(given)
            self.send("value", encoded, after if json.dumps(after) != before else None)
        except LinkEndedError:
            raise
        except BaseException as error:
            self.send("raise", self.export(error, 0))

    def export(self, value: Any, depth: int) -> Any:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        form = {"t": "remote", "id": self.numbers[id(value)]}
        if isinstance(value, BaseException):
            try:
                arguments = self.encode(list(value.args), depth + 1)
            except (RecursionError, ValueError):
                arguments = self.encode([])
            return {**form, "t": "exception", "class": self.export(type(value), depth), "v": arguments}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {**form, "t": "exception class", "v": [c.__name__ for c in value.__mro__]}
        base = next((known for known in PLAIN if isinstance(value, known)), None)
        if base is not None:  # a named tuple or a Counter counts as its base class
            form["plain"] = self.encode(base(value), depth + 1)
        if isinstance(value, types.ModuleType):
            form["module"] = value.__name__
        return form

    def restore(self, form: Mapping[str, Any]) -> Any:
        if form["t"] == "builtin":
            return getattr(builtins, form["v"])
        if form["t"] == "remote":
            return self.objects[form["id"]]
        number = form["id"]

        def callback(*arguments: Any) -> Any:
            self.send("callback", number, self.encode(list(arguments)))
            while True:
                status, value = self.receive()
                if status == "raised":
                    raise RuntimeError(value)
                return self.decode(value)

        return callback


class CallerEnd(Link):
    """The test's end of the link: has proxies for the program's objects."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.functions: list[Callable[..., Any]] = []
        self.classes: dict[int, type[BaseException]] = {}

    def ask(self, what: str, *forms: Any, given: Any) -> Any:
        self.send(what, *forms, self.encode(given))
        while True:
            status, *content = self.receive()
            if status == "callback":
                self.call_back(*content)
            elif status == "raise":
                raise self.decode(content[0])
            else:
                if content[1] is not None:
                    renew(given, self.decode(content[1]))
                return self.decode(content[0])

    def call_back(self, number: int, arguments: Any) -> None:
        try:
            result = self.encode(self.functions[number](*self.decode(arguments)))
        except Exception as error:
            self.send("raised", f"{type(error).__name__}: {error}")
        else:
            self.send("returned", result)

    def export(self, value: Any, depth: int) -> Any:
        if type(value) is Remote:
            return {"t": "remote", "id": number_of(value)}
        if getattr(value, "__module__", None) == "builtins" and hasattr(builtins, getattr(value, "__name__", "?")):
            return {"t": "builtin", "v": value.__name__}
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            self.functions.append(value)
            return {"t": "callback", "id": len(self.functions) - 1}
        raise UnsupportedError(f"the test passes the program an object of a class of its own, {type(value).__name__}")

    def restore(self, form: Mapping[str, Any]) -> Any:
        number = int(form["id"])
        if form["t"] == "exception class":
            return self.exception_class(number, form["v"])
        if form["t"] == "exception":
            kind = self.restore(form["class"])
            return (
                kind(*self.decode(form["v"]))
                if kind is not None
                else RuntimeError("expected an exception, found another object")
            )
        if (name := form.get("module")) in sys.stdlib_module_names:
            return importlib.import_module(str(name))
        return Remote(self, number, self.decode(form["plain"]) if "plain" in form else None, "plain" in form)

    def exception_class(self, number: int, names: list[str]) -> type[BaseException]:
        """Return Python's own exception class of that name, or a new class derived from it."""
        if number not in self.classes:
            known = [getattr(builtins, str(name), None) for name in names]
            bases = [k for k in known if isinstance(k, type) and issubclass(k, BaseException)]
            own = names[0] == getattr(bases[0], "__name__", "") if bases else False
            self.classes[number] = bases[0] if own else type(str(names[0]), (bases[0] if bases else Exception,), {})
        return self.classes[number]


class Names(dict[str, Any]):
    """The global names of the test: its own, Python's, and the program's."""

    link: CallerEnd

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        return self.link.ask("global", given=name)


def run_test(connection: socket.socket, test: str) -> None:
    """Run the test. Raises the exception of the test, or that of the program if loading it failed."""
    link = CallerEnd(connection)
    status, *content = link.receive()
    if status == "raise":
        raise link.decode(content[0])
    names = Names({"__name__": "__main__"})
    names.link = link
    exec(compile(test, "test", "exec"), names)


def main() -> None:
    with open("job.json", encoding="utf-8", errors="surrogatepass") as file:
        job = json.load(file)
    connection = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2 if job["role"] == "test" else null, 1)
    if job["role"] == "program":
        try:
            ProgramEnd(connection).serve(job["text"])
        finally:
            os._exit(0)
    status = PASSED
    try:
        run_test(connection, job["text"])
        sys.stderr.write(f"\n{job['word']}\n")
    except UnsupportedError as error:
        status = UNSUPPORTED
        sys.stderr.write(f"\n{error}\n")
    except (LinkEndedError, SystemExit):
        status = LEFT
    except BaseException as error:
        status = FAILED
        sys.stderr.write("\n" + traceback.format_exception_only(error)[-1])
    sys.stderr.flush()
    os._exit(status)

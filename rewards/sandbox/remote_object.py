"""Proxies for the objects of a program in another process (remote_program.py). Standard library only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

MUTABLE = (list, dict, set, bytearray)


class Remote:
    """A proxy for an object in the program's process. With `plain`, it also has the value of a plain type."""

    __slots__ = ("_link", "_number", "_plain", "_valued")

    def __init__(self, link: Any, number: int, plain: Any, valued: bool) -> None:
        for name, value in (("_link", link), ("_number", number), ("_plain", plain), ("_valued", valued)):
            object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        if name == "__class__" and own(self, "_valued"):
            return type(own(self, "_plain"))
        if name in Remote.__slots__:
            raise AttributeError(name)
        return own(self, "_link").ask("getattr", given=[self, name])

    def __setattr__(self, name: str, value: Any) -> None:
        ask(self, "setattr", self, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        link = object.__getattribute__(self, "_link")
        return link.ask("call", link.encode(self), given=[list(arguments), named])

    def __iter__(self) -> Any:
        iterator = ask(self, "iter", self)
        while True:
            try:
                yield ask(self, "next", iterator)
            except StopIteration:
                return

    def __bool__(self) -> bool:
        return ask(self, "truth", self) is True

    def __eq__(self, other: object) -> Any:
        return compared(self, other, "eq")

    def __ne__(self, other: object) -> Any:
        return not self == other

    def __hash__(self) -> int:
        return int(ask(self, "hash", self))

    def __enter__(self) -> Any:
        return self.__enter__()

    def __exit__(self, *_: Any) -> Any:
        return self.__exit__(None, None, None)

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and ask(self, "isinstance", instance, self) is True


def number_of(remote: Remote) -> int:
    return int(object.__getattribute__(remote, "_number"))


def ask(remote: Remote, what: str, *given: Any) -> Any:
    return object.__getattribute__(remote, "_link").ask(what, given=list(given))


def compared(remote: Remote, other: Any, what: str) -> Any:
    """Make a comparison or arithmetic operator. If one side is plain, the program could fake the result that the test
    asks for. So the result is computed here if the object has a value, and refused otherwise."""
    own = object.__getattribute__
    if own(remote, "_valued") and (type(other) is not Remote or own(other, "_valued")):
        return getattr(operator, what)(own(remote, "_plain"), own(other, "_plain") if type(other) is Remote else other)
    if type(other) is Remote:
        return ask(remote, what, remote, other)
    if what == "eq":
        return False
    result = ask(remote, what, remote, other)
    if type(result) is not Remote:
        raise TypeError(f"{what}: an object of the program and a {type(other).__name__}")
    return result


def _swapped(what: str) -> Callable[[Remote, Any], Any]:
    def method(remote: Remote, other: Any) -> Any:
        own = object.__getattribute__
        if own(remote, "_valued"):
            return getattr(operator, what)(other, own(remote, "_plain"))
        result = ask(remote, what, other, remote)
        if type(result) is not Remote:
            raise TypeError(f"{what}: a {type(other).__name__} and an object of the program")
        return result

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"):
    _dunder = _name.rstrip("_")
    setattr(Remote, f"__{_dunder}__", lambda self, other, _what=_name: compared(self, other, _what))
    setattr(Remote, f"__r{_dunder}__", _swapped(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", lambda self, other, _what=_name: compared(self, other, _what))
for _name in ("neg", "abs", "len", "repr", "str", "int", "float", "index", "getitem", "setitem", "delitem", "contains"):
    setattr(Remote, f"__{_name}__", lambda self, *others, _what=_name: ask(self, _what, self, *others))


def renew(old: Any, new: Any) -> Any:
    """Copy the contents of `new` into `old`, if both are mutable and of one type, and return `old`; otherwise return
    `new`."""
    if type(old) is not type(new) or type(old) not in (*MUTABLE, tuple):
        return new
    if type(old) is list:
        old[:] = [renew(old[i], item) if i < len(old) else item for i, item in enumerate(new)]
    elif type(old) is dict:
        renewed = {key: renew(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(renewed)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) is bytearray:
        old[:] = new
    elif len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            renew(before, after)
        return old
    return old

"""JSON by schema: is the answer one JSON document (perhaps in a Markdown fence) that is valid under a schema?

Failure modes: a schema describes the form of an answer, not whether it is right; an empty schema accepts everything.
Unlike in Python, documents with a duplicate key, NaN or Infinity are not JSON here. A reference in a schema to another
document is never fetched; the verdict is then an error. The `regex` package searches a schema's patterns, for at most
0.1 s per text. A search that takes longer (`^(a+)+$` on many a's) is a violation.

A row's own schema may come from a table, which gives it the keys of the schemas of all rows. Only `const` and `default`
can be null, so any other null is a keyword, a name or a schema that this row does not have, and it is removed. The
contents of `enum`, `examples` and `const` stay unchanged, and so does `{"const": null}` by itself. Beside other
keywords, a null `const` belongs to other rows (`"type": "null"` says the same).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

from rewards.answers.nulls import is_null
from rewards.base import ScoringRequest, gold_of, unscorable
from rewards.functions.format import Scope, check_scope, judged_text, unfenced
from rollout.types import Verdict

MAX_CHARACTERS = 100_000
MAX_DEPTH = 100
"""How deep lists and objects may be nested."""
PATTERN_SECONDS = 0.1
_VALUES = ("const", "enum", "default", "examples", "type")
"""Keywords that hold documents, in which nulls are meant. A null in the list of a `type` is a mistake for "null"."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords that map names to schemas. The names may equal keywords."""


class NotJSONError(ValueError):
    """The text is not a JSON document; the message says why."""


class _SlowPatternError(Exception):
    """A pattern of the schema took too long on a document; the message says which."""


def read_json(text: str) -> Any:
    """Parse `text` as one JSON document, strictly. Raises NotJSONError."""
    if len(text) > MAX_CHARACTERS:
        raise NotJSONError(f"longer than {MAX_CHARACTERS} characters")
    try:
        document = json.loads(
            unfenced(text, "json"), object_pairs_hook=_distinct, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise NotJSONError("nested too deeply") from None
    except ValueError as error:
        raise NotJSONError(str(error)) from None
    if _deeper(document, MAX_DEPTH):
        raise NotJSONError("nested too deeply")
    return document


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(item, levels - 1) for item in inside)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is too large for a number")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Return jsonschema's validator of a schema in JSON. Raises ValueError if it is not a schema."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    document = json.loads(schema)
    cls = validator_for(document)
    try:
        cls.check_schema(document)
    except SchemaError as error:
        raise ValueError(f"not a valid JSON schema: {error.message}") from error
    # Without our own registry, references would be fetched from the network.
    return _bounded(cls)(document, registry=Registry())


@cache
def _bounded(cls: Any) -> Any:
    """Return the validator class with a time limit on pattern searches."""
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "string") and not _found(wanted, instance):
            yield ValidationError(f"{instance[:60]!r} does not match {wanted!r}")

    def pattern_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "object"):
            for written, inner in wanted.items():
                for name in [name for name in instance if _found(written, name)]:
                    yield from validator.descend(instance[name], inner, path=name, schema_path=written)

    def additional(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if not validator.is_type(instance, "object"):
            return
        patterns = schema.get("patternProperties", {})
        further = [
            n for n in instance if n not in schema.get("properties", {}) and not any(_found(p, n) for p in patterns)
        ]
        for name in further:
            if wanted is False:
                yield ValidationError(f"there is no property {name[:60]!r}")
            elif wanted is not True:
                yield from validator.descend(instance[name], wanted, path=name)

    keywords = {"pattern": pattern, "patternProperties": pattern_properties, "additionalProperties": additional}
    return extend(cls, {name: check for name, check in keywords.items() if name in cls.VALIDATORS})


def _found(pattern: str, text: str) -> bool:
    """Return whether the pattern is found in `text`. Raises _SlowPatternError if the search takes too long."""
    import regex

    try:
        return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise _SlowPatternError(f"the pattern {pattern!r:.60} takes more than {PATTERN_SECONDS} s on a text") from None


def check_schema(schema: Any) -> None:
    """Raise ValueError if this is not a JSON schema."""
    _validator(json.dumps(schema))


def violation(schema: Any, document: Any) -> str:
    """Say what in `document` violates `schema`, and where; empty if nothing does. Raises ValueError if `schema` is not
    a schema."""
    from jsonschema.exceptions import best_match

    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(document))
    except _SlowPatternError as slow:
        return str(slow)
    return "" if error is None else f"{error.json_path}: {error.message}"[:200]


@dataclass(frozen=True, slots=True)
class JsonSchemaReward:
    """Scores 1.0 for an answer that is valid under the schema, and 0.0 with the violation otherwise."""

    separable: ClassVar[bool] = True
    schema: Mapping[str, Any] | None = None
    column: str | None = None
    """Column with the row's own schema (an object, or its JSON text), instead of `schema`."""
    scope: Scope = "answer"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if (self.schema is None) == (self.column is None):
            raise ValueError("give either `schema` or the `column` that holds one")
        if self.schema is not None:
            check_schema(self.schema)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        schema = self.schema
        if schema is None:
            try:
                schema = _row_schema(gold_of(request, self.column))
                check_schema(schema)
            except (ValueError, TypeError, RecursionError) as error:
                return unscorable(request, f"column {self.column} does not hold a JSON schema: {error}"[:300])
        return [self._judge(schema, text) for text in request.completions]

    def _judge(self, schema: Mapping[str, Any], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        try:
            problem = violation(schema, read_json(answer))
        except NotJSONError as error:
            problem = f"not JSON: {error}"
        except RecursionError:
            problem = "nested too deeply"
        return Verdict.scored(0.0 if problem else 1.0, reason=problem)


def _row_schema(value: Any) -> Mapping[str, Any]:
    """Return the schema of a row, without the nulls that its table filled in. Raises ValueError if it is not an
    object."""
    document = read_json(value) if isinstance(value, str) else value
    if _absent(document):
        raise ValueError("it is null")
    if not isinstance(document, Mapping):
        raise ValueError(f"it must be an object, not a {type(document).__name__}")
    return dict(_unpadded(document))


def _absent(value: Any) -> bool:
    """Return whether a place in a row's schema holds only nulls, and not `{"const": null}`."""
    if not isinstance(value, Mapping) or set(value) in (set(), {"const"}):
        return is_null(value)
    return all(map(_absent, value.values()))


def _unpadded(schema: Any) -> Any:
    """Return a row's schema without the nulls that stand for keywords, names and schemas of other rows."""
    if isinstance(schema, list | tuple):
        return [_unpadded(item) for item in schema if not _absent(item)]
    if not isinstance(schema, Mapping) or set(schema) == {"const"}:
        return schema
    kept = {keyword: value for keyword, value in schema.items() if not _absent(value)}
    return {keyword: value if keyword in _VALUES else _inner(keyword, value) for keyword, value in kept.items()}


def _inner(keyword: str, value: Any) -> Any:
    if keyword in _BY_NAME and isinstance(value, Mapping):
        return {name: _unpadded(schema) for name, schema in value.items() if not _absent(schema)}
    return _unpadded(value)

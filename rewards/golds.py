"""Gold forms: the texts that count as a row's right answer.

red                     one form
["1/2", "50 cents"]     two forms, one of which is enough
["x", null]             one form: Parquet and `datasets` fill short lists with nulls
["two", 2]              two forms; a number beside texts is read as its text
[1, 2]                  one form: numbers in brackets are an answer by themselves
[null], [], ""          none: the row has no answer
"""

from __future__ import annotations

import json
from functools import lru_cache


@lru_cache(maxsize=1024)
def gold_forms(answer: str | None) -> tuple[str, ...]:
    """All texts that count as the gold answer: those of a JSON list of texts, else the answer itself."""
    if answer is None or not answer.strip():
        return ()
    if not answer.lstrip().startswith("["):
        return (answer,)
    try:
        forms = json.loads(answer)
    except (ValueError, RecursionError):  # brackets that are no JSON, or too many of them
        return (answer,)
    forms = [form for form in forms if form is not None and form == form]  # NaN is what pandas fills in
    if not forms:
        return ()
    texts = any(isinstance(form, str) for form in forms)
    if not texts or not all(isinstance(form, str | int | float) for form in forms):
        return (answer,)
    written = [form if isinstance(form, str) else json.dumps(form) for form in forms]
    return tuple(form for form in written if form.strip())

"""Which tokens steer a model, and which are only text.

special tokens ─┬─ tags: `<think>`, `<tool_call>`, `<|box_start|>`, ...      text that rows may hold and rewards see
of a tokenizer  └─ control: turns, ends, padding, places of media, ...       the chat template's alone
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

NAMED = ("bos", "eos", "pad", "cls", "sep", "mask")
"""Tokens with these roles are control tokens, whatever they look like."""
_XML = re.compile(r"<(/?)([A-Za-z][\w.-]*)>")
_TAGS = re.compile(r"\[/?THINK\]|<\|(?:box|object_ref|quad)_(?:start|end)\|>")
"""Tags in other notations."""
_MARK = re.compile(r"[<\[◁｜]\S+[>\]▷｜]")
"""The form of tokens, other than words, that templates write around turns."""


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """All tokens that the tokenizer treats as special, by id."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # Mistral's own tokenizers name all of theirs above
        added = {}
    return found | {number: token.content for number, token in added.items() if token.special}


def control_tokens(tokenizer: Any, template: Any, placeholders: Collection[str]) -> dict[int, str]:
    """Tokens that text of a data row must not become, by id: the special ones, `placeholders`, and marks that the chat
    template (its source, or several by name) writes, such as `<start_of_turn>`, if a tokenizer treats them as ordinary.
    Tags, the unknown token, and white space, which some tokenizers treat as special, are not among them."""
    special, added = special_tokens(tokenizer), _added_tokens(tokenizer)
    named = {getattr(tokenizer, f"{role}_token", None) for role in NAMED}
    reserved = {token for token in (*named, *placeholders) if token}
    source = template if isinstance(template, str) else " ".join((template or {}).values())
    written = {number: token for number, token in added.items() if _MARK.fullmatch(token) and token in source}
    found = {**special, **written, **{tokenizer.convert_tokens_to_ids(token): token for token in placeholders}}
    known = {*special.values(), *added.values()}
    spared = {token for token in found.values() if _is_tag(token, known) or not token.strip()} | {tokenizer.unk_token}
    return {number: token for number, token in found.items() if token not in spared - reserved}


def without(text: str, tokens: Iterable[str]) -> str:
    """Replace each of `tokens` that `text` spells out by a blank. Without it, the rest could join to form one."""
    return re.sub("|".join(map(re.escape, tokens)) or r"(?!)", " ", text)


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    try:
        return {number: token for token, number in tokenizer.get_added_vocab().items()}
    except NotImplementedError:  # as above
        return {}


def _is_tag(token: str, known: Collection[str]) -> bool:
    """`<name>` and `</name>` where both are tokens, as tags are."""
    match = _XML.fullmatch(token)
    if match is None:
        return _TAGS.fullmatch(token) is not None
    return f"<{'' if match[1] else '/'}{match[2]}>" in known

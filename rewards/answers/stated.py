"""Find the answer in a completion.

    1  the last \\boxed{..}, whatever is in it; boxes side by side are one list (`\\boxed{1}, \\boxed{2}`)
    2  the last <answer>..</answer>
    3  what follows the last `answer is`, `answer:`, up to the end of the sentence
    4  what follows the last `####`, up to the end of the line
    5  the last expression; expressions joined by `or`, `and` or commas are one list (`3 or 4` is not 4)

Every search takes linear time: one pass over the text for the braces, and plain searches for the rest. The last
expression is searched only in the last WINDOW characters.
"""

from __future__ import annotations

import re

from rewards.answers.golds import is_struct
from rewards.answers.hedging import is_denied, is_hedged
from rewards.answers.kinds import Letter, Words
from rewards.answers.marks import Found, boxed, boxes, hashed, tagged
from rewards.answers.notation import squeezed
from rewards.answers.reading import read

WINDOW = 1000
"""How many characters at the end of a completion are searched for the last expression."""
SENTENCE = 400
"""The most characters that are read after `the answer is`."""
MAX_PHRASES = 8
"""How many denied `the answer is` are skipped, from the end."""

_PHRASE = re.compile(
    r"\banswers?\b[*_]{0,3}\s{0,3}(?:(?:is|are|was|would be|should be|must be|equals)\b|[:=])"
    r"[*_]{0,3}\s{0,3}[:=]?[*_]{0,3}\s{0,3}(?!\s|not\b)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?<!\b[DMS][rst])(?<!\bMrs)(?<!\bProf)\.(?=\s|$)|(?<=[a-z])[!?](?=\s|$)|\n|,?\s(?:because|since)\b"
)
_BOLD = re.compile(r"(?<!\S)\*\*|\*\*(?=[\s.,;:]|$)")
_TOKEN = re.compile(r"\$\$.{1,300}?\$\$|\$[^$\n]{1,200}\$|\\\(.{1,200}?\\\)|\\\[.{1,300}?\\\]|\S+", re.DOTALL)
_DELIMITED = re.compile(r"\$.+\$|\\\(.+\\\)|\\\[.+\\\]", re.DOTALL)
_MATHEMATICAL = re.compile(r"[0-9√π∞½¼¾\\]")
_LONG_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{3,}")
_OPERATOR = re.compile(r"[-+*/=<>×·÷±≤≥≠≈^:|−–]|\\(?:times|cdot|le|ge|leq|geq|ne|neq|approx|pm|cup|in)")
_BEHIND = re.compile(r"(?:%|°|percent|pct|degrees?|[ap]\.?m\.?)[.,;!?]*", re.IGNORECASE)
_ABBREVIATION = re.compile(
    r"(?:[cmdkμn]?m|[km]?g|[mcd]?[lL]|k?[JWNV]|m[VA]|s|Hz|Pa|ft|lb)(?:\^?[23²³])?(?:/\w{1,3})?[.,;!?]*"
)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?[.,;:!?]*")
_BOUNDS = ("to", "of", "through")
"""Words that join two numbers into one thing: `6 to 8`, `5 of 6`."""
_PUNCTUATION = ".,;:!?*_`"


def stated_answer(text: str) -> Found | None:
    """Return the answer that `text` marks, by the first of rules 1 to 4 that applies."""
    if (found := boxed(text) or tagged(text)) is not None:
        return found
    if (sentence := _last_sentence(text)) is not None:
        return Found(sentence, "phrase")
    return hashed(text)


def _last_sentence(text: str) -> str | None:
    """Return the text after the last `the answer is` that is neither denied nor a question."""
    for phrase in reversed(list(_PHRASE.finditer(text))[-MAX_PHRASES:]):
        sentence = _sentence(text[phrase.end() : phrase.end() + SENTENCE])
        if not is_denied(text[max(0, phrase.start() - 80) : phrase.start()], sentence):
            return sentence or None
    return None


def _sentence(text: str) -> str:
    """Return the first sentence of `text`, without Markdown signs around it."""
    text = text.lstrip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if text.startswith(opening) and (end := text.find(closing, 2)) > 0:
            return text[: end + 2]
    match = _SENTENCE_END.search(text)
    return _BOLD.sub("", text[: match.start()] if match else text).strip()


def first_expression(sentence: str) -> str | None:
    """Return the first expression in a sentence, with everything joined to it."""
    tokens = _tokens(sentence)
    for i, token in enumerate(tokens):
        if _is_mathematical(token):
            end = i
            while end + 1 < len(tokens) and _continues(tokens, end):
                end += 1
            return None if _hedged(tokens, i, end) else _run(tokens, end)[0]
    return None


def _continues(tokens: list[str], end: int) -> bool:
    following = tokens[end + 1]
    if _is_operator(tokens[end][-1:]) or (_is_operator(following[:1]) and len(following) < 40):
        return not _LONG_WORD.search(following)
    if following.lower() in _BOUNDS or tokens[end].lower() in _BOUNDS:
        return any(_NUMBER.fullmatch(token) for token in tokens[end + 1 : end + 3])
    joined = following.lower() in ("or", "and") or tokens[end].lower() in ("or", "and") or tokens[end].endswith(",")
    return joined and (_is_mathematical(following) or (end + 2 < len(tokens) and _is_mathematical(tokens[end + 2])))


def last_expression(text: str) -> tuple[str, str] | None:
    """Return the last expression in `text`, and the words after it."""
    window = text[-WINDOW:]
    if len(text) > WINDOW:
        window = window.partition("\n" if "\n" in window[: WINDOW // 2] else " ")[2]
    tokens = _tokens(_BOLD.sub("", window))
    for end in range(len(tokens) - 1, -1, -1):
        if _is_mathematical(tokens[end]):
            run, start = _run(tokens, end)
            return None if _hedged(tokens, start, end) else (run, " ".join(tokens[end + 1 : end + 4]))
    return None


def _hedged(tokens: list[str], start: int, end: int) -> bool:
    return is_hedged(" ".join(tokens[max(0, start - 5) : start]), " ".join(tokens[end + 1 : end + 3]))


def _run(tokens: list[str], end: int) -> tuple[str, int]:
    """Return the expression whose last token is at `end`, and where it begins. It includes the tokens that operators,
    brackets, commas and `or` join, and the sign or abbreviated unit after it."""
    start = end
    while start > 0 and end - start < 24 and _joined(tokens, start, end):
        start -= 1
    run = " ".join(tokens[start : end + 1])
    if end + 1 < len(tokens) and (_BEHIND.fullmatch(tokens[end + 1]) or _ABBREVIATION.fullmatch(tokens[end + 1])):
        run += " " + tokens[end + 1]
    return run.rstrip(_PUNCTUATION), start


def _joined(tokens: list[str], start: int, end: int) -> bool:
    """Return whether the token before `start` belongs to the expression that begins at `start`."""
    before, first = tokens[start - 1], tokens[start]
    run = "".join(tokens[start : end + 1])
    if sum(run.count(c) for c in ")]") > sum(run.count(c) for c in "(["):
        return True
    if before.lower() in ("or", "and"):
        return start > 1 and _is_mathematical(tokens[start - 2])
    if before.lower() in _BOUNDS:
        numbers = start > 1 and bool(_NUMBER.fullmatch(tokens[start - 2]) and _NUMBER.fullmatch(first))
        return numbers and (start < 3 or tokens[start - 3].lower() != "from")
    if first.lower() in ("or", "and", *_BOUNDS):
        return True
    if before[-1] == "*":
        return _is_mathematical(before) or (start > 1 and _is_mathematical(tokens[start - 2]))
    if _LONG_WORD.search(before) and not _DELIMITED.fullmatch(before):
        return False
    if before[-1] in ",;" or (_NUMBER.fullmatch(before) and _NUMBER.fullmatch(first)):  # 1 2 3 is not 3
        return _is_mathematical(before) and before[-1] not in ".:!?"
    operand = len(before) < 40 and before[-1] not in '.,;!?"*_`'
    return operand and (_is_operator(first) or _is_operator(before) or bool(_OPERATOR.fullmatch(before[-1])))


def _is_operator(token: str) -> bool:
    return bool(_OPERATOR.fullmatch(token))


def _is_mathematical(token: str) -> bool:
    """Return whether a token is mathematics, or a part of it."""
    if not _MATHEMATICAL.search(token):
        return False
    if _DELIMITED.fullmatch(token):
        return True
    return not _LONG_WORD.search(token)


def _tokens(text: str) -> list[str]:
    """Split into words and pieces of mathematics between delimiters. Text between dollars that contains words (`$5 or
    else $6`) is split into words."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        is_words = token.startswith("$") and len(token.split()) > 1 and isinstance(read(token), Words | Letter)
        tokens.extend(token.split() if is_words else [squeezed(token)])
    return tokens


def is_abbreviation(unit: str) -> bool:
    """Return whether a unit is an abbreviation (`cm`, `m/s`) and not a word (`dollars`, `hours`)."""
    return _ABBREVIATION.fullmatch(unit) is not None


def gold_answers(form: str) -> tuple[str, ...]:
    """Return the answer of a gold form (golds.py): the form itself, or the text after `the answer is`. Empty for a
    struct, and for a whole solution without exactly one answer."""
    found = stated_answer(form)
    if found is not None and found.rule == "phrase" and isinstance(read(form), Words):
        return found.forms
    return () if _is_solution(form) or boxes(form) or is_struct(form) else (form,)


def _is_solution(text: str) -> bool:
    """Return whether `text` is a worked solution: several sentences or lines with mathematics, or very many words."""
    words = len(_LONG_WORD.findall(text[:4000]))
    sentences = len(re.findall(r"[.!?]\s+\S|\n", text[:4000].strip()))
    return words > 60 or (words >= 6 and sentences >= 1 and re.search(r"[=$]|\\[(\[]", text) is not None)

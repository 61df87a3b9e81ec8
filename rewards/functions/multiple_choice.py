"""Multiple choice: does the answer pick the gold choice, and no other?

    answer    choice | lead choice | choice behind | one of these in `\\boxed{}`, `$..$`, `\\text{}`, `**..**`, `<tags>`
    choice    letter | letter punctuation words | text, that of one choice of the row
    letter    `B`, `b`, `(B)`, `[B]`, `B.`, `B)`, `<B>`
    lead      "the answer is", "Answer:", "option", "I choose", "the correct choice would be", "so B", and the like
    behind    "is correct", "is the right answer", "because ..", "since .."

A letter of the row wins over a choice whose text is that letter. An answer that names more than one choice picks none:
another letter by itself anywhere ("A or B", "C (or maybe D)", "A/B/C/D", "not A but B"), or the text of another choice
after the letter. A choice that is denied ("B is wrong", "I don't think it's B") is named but not picked. Letters within
names do not count ("Vitamin C", "Point A"), and neither do "A" as an article and "I". A number or an expression picks
the choice that accuracy considers equal: `72^\\circ` is 72°. "yes, .." is Yes.

The choices come from a column, or from the row's own words. The gold is a letter or a choice's text, in the same forms,
or a number that counts the choices from 0 (as in MMLU). A text such as "1" is first of all the choice that says 1; a
number that could be that or another choice's place is refused, and so is one that another choice says with a word or
two ("3 cm", "Figure 3").
With `scope: completion` the last `\\boxed{}` counts (boxes side by side are several answers), else what follows the
last lead, else the last line.

Failure modes: with two choices, guessing earns 0.5 on average. An answer that rules out other letters by name is wrong.
An answer in words is wrong if the choices are not known.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.answers.equality import same
from rewards.answers.golds import gold_forms, is_struct
from rewards.answers.hedging import is_denied
from rewards.answers.kinds import Letter, Words
from rewards.answers.reading import read
from rewards.answers.stated import boxed, stated_answer
from rewards.base import ScoringRequest, unscorable
from rewards.functions.choices import read_choices
from rewards.functions.format import Scope, answer_text, check_scope, judged_text, placed
from rollout.types import Verdict

MAX_CHARACTERS = 10_000
"""The most characters of an answer that are read. Of a longer answer, the last characters count."""
_TAGS = re.compile(r"</?[a-zA-Z]{2,12}>|</[A-Za-z]>|<[a-z]>")
_WRAPPERS = re.compile(
    r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mathit|mathsf)(?=\s*\{)|\\[()\[\]]|\\[,;!]|[*_`\"{}$“”<>]"
)
_LONE = re.compile(r"[(\[' ]*([A-Za-z])[)\].:,;!。' ]*")
_LED = re.compile(r"[(\[]\s*([A-Za-z])(?=\s*[)\]])|([A-Za-z])(?=[):、]|[.,;]\s)|([A-Z])(?=\s[-–—]\s| \()")
_BEHIND = re.compile(r"([A-Z])(?=,? (?:is|because|since|as)\b)")
_BARE = re.compile(r"([B-HJ-Z])(?= )")
_LEAD = re.compile(
    r"(?i)(?:\bI(?:'d| would| will)? )?"
    r"(?:\b(?:so|hence|thus|therefore),?(?= [(]?(?-i:[A-Z])[)]?(?:[.!]?$| is\b))|"
    r"\b(?:answer|option|choice|choose|chose|select|selected|pick|go with|going with|it is|it's)\b|答案|选项|选择?)"
    r"(?: (?:to (?:the|this) question|number|letter|should|would|must|therefore|thus)\b)*"
    r"(?: ?(?:\b(?:is|be|are)\b|为|应为|应该是|是))?(?: (?:option|choice|answer|therefore|thus|letter)\b)* ?[:=–—-]* ?"
)
_NOT_IT = re.compile(
    r"(?i)[(\[]?[a-z][)\].]? ?(?:(?:is|was|seems|would be) ?(?:n't|not|wrong|incorrect|false|impossible)|"
    r"can(?:not|'t))\b"
)
_FIRST_LINE = re.compile(r"[(\[*_ ]*([A-Za-z])[)\].:*_ ]*\n")
_TRUTH = ("yes", "no", "true", "false")
_CAPITAL = re.compile(r"(?<![\w'\\-])([A-Z])(?![\w'])")
_BRACKETED = re.compile(r"[(\[] ?([a-z]) ?[)\]]|(?<![\w'(\[])([a-z])\)")
_JOINED = re.compile(
    r"(?:\b(?:or|and)\b|[,/&|+]) ?(?:(?:also|maybe|perhaps|possibly|either|option|choice|even|both) )*"
    r"([a-z])(?![\w'])(?! \w)"
)
_CONNECTORS = re.compile(
    r"(?i)(?:or|and|n?either|nor|maybe|perhaps|possibly|also|both|options?|choices?|answers?|is|are|not|than|but|with|be|"
    r"to|between|though|although|while|since|because|if|then|rather|even|likely|probably|only|so|thus|hence|therefore|the|an?|letters?|"
    r"correct|right|best|wrong)"
)
_INDEX = re.compile(r"\s*(\d{1,2})(?:\.0)?\s*")
"""Matches the index of a choice, also with `.0`, if a table made it a float."""
_NAMES = re.compile(
    r"(?i)(?:vitamin|point|line|angle|fig|figure|plan|type|class|group|hepatitis|grade|part|case|team|company|country|"
    r"city|machine|graph|vertex|node|box|block|region|area|section|table|step|set|matrix|curve|circle|triangle)"
)
"""Words to which a following letter belongs. Other words that begin with a capital do the same ("Hepatitis B")."""


@dataclass(frozen=True, slots=True)
class MultipleChoiceReward:
    """Scores 1.0 for the gold choice, and 0.0 for another, several or none. A row whose answer is not a choice is
    `unscorable`."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    choices: str | None = None
    """Column with the choices (rewards/functions/choices.py). None: the choices are read from the user's words."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        choices = read_choices(request.columns.get(self.choices) if self.choices else None, request.user_text)
        try:
            golds = gold_choices(request, choices)
        except ValueError as error:
            return unscorable(request, f"the row's answer {request.answer!r:.60} {error}")
        return [self._judge(golds, choices, text) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion with the first gold form that picks a choice, or else the letter of a gold number."""
        choices = read_choices(request.columns.get(self.choices) if self.choices else None, request.user_text)
        try:
            letter = min(gold_choices(request, choices))
        except ValueError:
            return None
        picking = (form for form in gold_forms(request.answer) if picked(form, choices) is not None)
        return placed(next(picking, letter), self.scope)

    def _judge(self, golds: set[str], choices: Mapping[str, str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        choice = concluded(answer, choices) if self.scope == "completion" else picked(answer, choices)
        if choice is None:
            return Verdict.scored(0.0, reason="names no choice, or several")
        return Verdict.scored(1.0 if choice in golds else 0.0, reason="" if choice in golds else f"chose {choice}")


def gold_choices(request: ScoringRequest, choices: Mapping[str, str]) -> set[str]:
    """Return the letters that the row's answer stands for. Raises ValueError, which says what is wrong with the
    answer."""
    forms = gold_forms(request.answer)
    if any(map(is_struct, forms)):
        raise ValueError("is a struct; it must be a letter or the text of a choice")
    named = {letter for form in forms if (letter := picked(form, choices)) is not None}
    number = _INDEX.fullmatch(forms[0]) if len(forms) == 1 else None
    if number is None:
        if not named:
            wanted = f"a letter ({', '.join(choices)}) or the text of a choice" if choices else "a letter"
            raise ValueError(f"is not one of its choices; it must be {wanted:.80}")
        return named
    counted = {chr(ord("A") + int(number[1]))} & set(choices)
    if not named and not choices:
        raise ValueError("is a number, but the choices are not known; name their column (option `choices`)")
    if not named and not counted:
        raise ValueError(
            f"is not one of its {len(choices)} choices and not an index from 0; it must be a letter or a text"
        )
    if not named and (said := _with_number(int(number[1]), choices)) and said != counted:
        both = f"could be the number in choice {min(said)} or, counted from 0, choice {min(counted)}"
        raise ValueError(f"{both}; it must be a letter or the text of a choice")
    if request.numeric_answer and counted and named and counted != named:
        both = f"could be the text of choice {min(named)} or, counted from 0, choice {min(counted)}"
        raise ValueError(f"{both}; make it a letter, or a text instead of a number")
    return named or counted


def _with_number(number: int, choices: Mapping[str, str]) -> set[str]:
    """Return the choices whose text is little more than this one number: "3 cm", "Figure 3"."""
    short = {letter: re.findall(r"\d+(?:[.,]\d+)*", text) for letter, text in choices.items() if len(text.split()) <= 3}
    return {letter for letter, said in short.items() if said == [str(number)]}


def concluded(completion: str, choices: Mapping[str, str]) -> str | None:
    """Return the choice on which a whole completion ends: in its only answer tags, in its last box, after its last
    lead, or in its last line."""
    text = answer_text(completion) or completion.strip()
    text = text[-MAX_CHARACTERS:]
    if (box := boxed(text)) is not None:
        return picked(box.text, choices)
    last = text.rpartition("\n")[2]
    if (choice := picked(last, choices)) is not None or last == text:
        return choice
    leads = [lead for lead in _LEAD.finditer(text) if not _CONNECTORS.fullmatch(lead[0].strip(" ,"))]
    return picked(text[leads[-1].start() :].split("\n\n")[0], choices) if leads else None


def picked(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter that `text` chooses; None for none or several. `choices` is letter -> text, and empty if not
    known."""
    text = text.strip()
    plain = _plain(_FIRST_LINE.sub(r"\1. ", text, count=1) if _FIRST_LINE.match(text) else text)
    if (choice := _direct(plain, choices) or _of_value(text, choices)) is not None:
        return choice
    leads = list(_LEAD.finditer(plain))
    starts = [0, *(lead.end() for lead in leads)]
    ends = [*(lead.start() for lead in leads), len(plain)]
    said: set[str] = set()
    stated = False
    for start, end in zip(starts, ends, strict=True):
        piece, before = plain[start:end].strip(), plain[max(0, start - 80) : start]
        if (choice := _direct(piece, choices)) is not None:
            said.add(choice)
        elif (match := _opening(piece, led=start > 0)) is not None and not _NOT_IT.match(piece):
            said |= {_letter(match)} | _mentioned(piece[match.end() :], choices)
        else:
            said |= _mentioned(piece, choices)
            continue
        stated = stated or not is_denied(before, "")
    if not said and (found := stated_answer(text)) is not None and found.rule == "phrase":
        return _of_value(found.text, choices)
    return _existing(said.pop(), choices) if stated and len(said) == 1 else None


def _of_value(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the choice with the number or expression that is all of `text`, as accuracy compares them; or the choice
    "Yes" or "No", if `text` begins with it."""
    if not choices or len(text) > 400:
        return None
    first, _, rest = _fold(text).partition(",")
    if first in _TRUTH and not set(re.findall(r"\w+", rest)) & set(_TRUTH):
        found = [letter for letter, choice in choices.items() if _fold(choice) == first]
    elif isinstance(read(text), Words | Letter):
        return None
    else:
        values = {letter: read(choice) for letter, choice in choices.items()}
        found = [k for k, value in values.items() if not isinstance(value, Words | Letter) and same(value, read(text))]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    """Return the text without markup, in one line."""
    text = unicodedata.normalize("NFKC", text.strip()[-MAX_CHARACTERS:]).replace("’", "'")
    return " ".join(_WRAPPERS.sub("", _TAGS.sub(" ", text)).split())


def _direct(plain: str, choices: Mapping[str, str]) -> str | None:
    """Return the choice that is all of `plain`: a letter, the text of a choice, or a letter with its own text."""
    lone = _LONE.fullmatch(plain)
    if lone is not None and (letter := _existing(lone[1].upper(), choices)) is not None:
        return letter
    texts = {letter: _fold(choice) for letter, choice in choices.items()}
    found = [letter for letter, choice in texts.items() if choice and choice == _fold(plain)]
    if len(found) == 1:
        return found[0]
    behind = re.fullmatch(r"(.+?),? ?[(\[]([A-Z])[)\]]\.?", plain)
    if behind is not None and texts.get(behind[2]) == _fold(behind[1]):
        return behind[2]
    match = _LED.match(plain) or _BARE.match(plain) or re.match("(A)(?= )", plain)
    if match is None or not texts.get(_letter(match)):
        return None
    rest = _fold(plain[match.end() :].lstrip(" )].:,;、-–—"))
    return _letter(match) if rest.strip("()") == texts[_letter(match)].strip("()") else None


def _opening(piece: str, led: bool) -> re.Match[str] | None:
    """Return the letter with which a piece of an answer begins, if it is a choice and not a word."""
    return _LED.match(piece) or _BEHIND.match(piece) or (_BARE.match(piece) if led else None)


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).upper()


def _mentioned(text: str, choices: Mapping[str, str]) -> set[str]:
    """Return the letters of choices that stand by themselves in `text`, and the letter whose text is all of it."""
    found = {m[1] for m in _CAPITAL.finditer(text) if not _is_word(text, m)}
    found |= {_letter(m) for pattern in (_BRACKETED, _JOINED) for m in pattern.finditer(text)}
    behind = _fold(text.strip(" )].:,;、-–—("))
    found |= {letter for letter, choice in choices.items() if behind and _fold(choice) == behind}
    return {letter for letter in found if letter <= max(choices, default="Z") or letter in "ABCDE"}


def _is_word(text: str, match: re.Match[str]) -> bool:
    """Return whether a capital is an article, the pronoun "I", or part of a name."""
    before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 2]
    if match[1] in "AI" and re.fullmatch(" [a-z]", after):
        return match[1] == "I" or not before or before[-2:-1] in ".:;,)"
    word = before.rstrip(" ").rpartition(" ")[2] if before.endswith(" ") else ""
    if not word.isalpha() or _CONNECTORS.fullmatch(word) or after.startswith(")"):
        return False
    return word[0].isupper() or _NAMES.fullmatch(word) is not None


def _existing(letter: str, choices: Mapping[str, str]) -> str | None:
    return letter if not choices or letter in choices else None


def _fold(text: str) -> str:
    return _plain(text).casefold().rstrip(".")

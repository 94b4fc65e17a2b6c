r"""Mathematical answers, compared by value: `0.5`, `\frac{1}{2}` and `50\%` are one answer.

Formulas are read and compared by math-verify. Its own time limits are switched off: they rest on signals, which neither stop a
loop inside C nor work outside the main thread, and a comparison that they cut short counts as wrong. The judge's deadline holds instead.
"""

import logging
import re
import unicodedata
from functools import lru_cache
from itertools import accumulate
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import boxed_answer, final_answer

# math-verify warns once per process that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LONGEST_ANSWER = 1_000
"""Characters. A longer answer is wrong unless it repeats the reference; no formula that a reference states is as long."""

_SURELY_DIFFERENT = 1e-3
"""Relative to the larger of two numbers: far above what any comparison forgives."""

_LARGEST_NUMBER = 1e100
"""Beyond it differences overflow."""

_DEEPEST_ANSWER = 12
"""Brackets inside one another. The parser's time grows fast with them, and a policy that falls into a loop writes hundreds."""

_CHARACTERS = {
    **{"−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi "},
    **{"°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "},
    **{"﹣": "-", "。": ".", "、": ",", "￥": "", "¥": "", "€": "", "£": "", "\u200b": "", "\ufeff": ""},
}
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))")
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|(?<!\\)\\boxed(?=\{)")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|\{,\}|[ ~])\d{3})+(?!\d)")
_MIXED = re.compile(r"(?<![\d./}])(\d+) +(\d+)/(\d+)(?![\d/.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_PERCENT = re.compile(r"\s*(?:per ?cent|(?<!\\)%)")
# Simple units go with math-verify; these it would read as a quotient of variables.
_UNIT_NAME = "mm|cm|km|m|ft|mi|in|g|kg|mol|J|kJ|N|W|L|ml|mL|s|sec|min|h|hr|day|year|second|minute|hour|mile|meter|metre|dollar|unit"
_UNIT = rf"(?:\\(?:text|mathrm)\{{\s*(?:{_UNIT_NAME})s?\s*\}}|(?:{_UNIT_NAME})s?)"
_RATE = re.compile(
    rf"(?<=[\d}})])(?:\s|~|\\[,;: ])+(?:{_UNIT}\s*/\s*{_UNIT}|\\[dt]?frac\{{\s*{_UNIT}\s*\}}\{{\s*{_UNIT}\s*\}})(?:\^\{{?\d\}}?)?$"
    r"|(?<=\d)\s*(?:USD|EUR|GBP|CNY|RMB)$"
)
_END = re.compile(r"(?:[.;\s]|\\\\)+$")
_INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?)(?![a-z])")
_BARE_NAME = re.compile(r"(?<![\\A-Za-z{])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ \-][^\W\d_]+)*")
_FUNCTIONS = re.compile(
    r"\b(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|frac|pi|infty|inf|max|min|mod|gcd|lcm|pm|cdot|times)\b"
)
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NUMBER = re.compile(r"(?<![A-Za-z\d_.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?(?:\\%)?(?![\d/]|,\d)")


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response's answer has the value of the reference answer, else 0.0.

    The answer is that of `rewards.answer.final_answer`. Raises ValueError where the reference cannot be read, which leaves the response
    not judged; an answer that cannot be read is wrong.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise ValueError(f"prompt {prompt.id} has no reference answer")
    answer = final_answer(response)
    return 0.0 if answer is None else float(equivalent(prompt.answer, answer))


def answer_of(response: str) -> str | None:
    """The answer that a response votes with, in one spelling for signs, thousands and delimiters; None without one of a usable length."""
    answer = final_answer(response)
    if answer is None or len(answer) > _LONGEST_ANSWER:
        return None
    plain = _plain(answer)
    return str(int(plain)) if re.fullmatch(r"-?\d+", plain) else plain


def same(answer: str, other: str) -> bool:
    """Whether two answers that `answer_of` found are one vote: each may be the reference of the other.

    As `equivalent`, it may run for ever. Answers that are no formulas are one vote only when they are the same.
    """
    if answer == other:
        return True
    first, second = _number(answer), _number(other)
    # Most pairs are two numbers that differ, of which math-verify would try to simplify the difference.
    if first is not None and second is not None and abs(first - second) > _SURELY_DIFFERENT * max(1.0, abs(first), abs(second)):
        return False
    return _answers(answer, other) or _answers(other, answer)


def _number(answer: str) -> complex | None:
    """The number that a formula is, None for any other and for a per cent, which is two."""
    if "%" in answer or _depth(answer) > _DEEPEST_ANSWER:
        return None
    try:
        numbers = [complex(reading) for reading in _parse(_plain(answer)) if getattr(reading, "is_number", False)]
    except (ValueError, TypeError, OverflowError):
        return None
    return numbers[0] if numbers and max(abs(numbers[0].real), abs(numbers[0].imag)) < _LARGEST_NUMBER else None


def _answers(reference: str, answer: str) -> bool:
    if _depth(reference) > _DEEPEST_ANSWER:
        return False
    try:
        return equivalent(reference, answer)
    except ValueError:
        return False


def equivalent(reference: str, answer: str) -> bool:
    """Whether an answer has the value of a reference. Not symmetric: `x = 5` answers `5`, and only the reference must be readable.

    Words are compared as words, without their case. An answer may stand in a sentence if that sentence holds one number and no other.
    May run for ever on hostile formulas, so call it where it can be killed.
    """
    reference, answer = reference.strip(), answer.strip()
    if reference == answer:
        return True
    if len(answer) > max(_LONGEST_ANSWER, 2 * len(reference)) or _depth(answer) > max(_DEEPEST_ANSWER, _depth(reference)):
        return False
    reference, answer = _plain(boxed_answer(reference) or reference), _plain(answer)
    if reference == answer:
        return True
    words = _words(reference)
    if words is not None:
        return words == _words(answer)
    if answer.count("{") != answer.count("}") or answer.count(r"\begin{") != answer.count(r"\end{"):
        return False  # the parser repairs what is not closed, and would find a number in it
    if {_enclosing(reference), _enclosing(answer)} in ({"(", "{"}, {"[", "{"}):
        return False  # the parser takes a set for the pair of its sorted elements
    if _same_value(reference, answer) or (answer.endswith(r"\%") and _same_value(reference, answer.removesuffix(r"\%"))):
        return True
    if _INEQUALITY.search(answer) and _enclosing(reference) in ("(", "["):
        return _is_formula(answer) and _same_value(
            answer, reference
        )  # of an interval and an inequality, the parser wants the interval second
    numbers = _NUMBER.findall(answer) if _is_sentence(answer) else []
    return len(numbers) == 1 and _same_value(reference, numbers[0])


def _depth(text: str) -> int:
    return max(accumulate((character in "([{") - (character in ")]}") for character in text), default=0)


def _plain(text: str) -> str:
    """One spelling for what is typed in many ways: Unicode signs, thousands, mixed numbers, exponents, percent, currency."""
    if not text.isascii():
        text = "".join(map(_ascii, text))
        text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _DELIMITERS.sub("", text).strip()
    if text.startswith("**") and text.endswith("**"):  # Markdown's bold
        text = text.strip("*")
    text = _END.sub("", text).strip().replace(r"\varnothing", r"\emptyset")
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _BARE_NAME.sub(r"\\\1 ", text)
    return _RATE.sub("", _PERCENT.sub(r"\\%", text))


def _enclosing(text: str) -> str | None:
    r"""The bracket, `(`, `[` or `{` for `\{`, that opens a text and closes at its end, around a comma; None where there is none."""
    bare = re.sub(r"\\(?:left|right)(?![a-z])|\\(?=[{}])|\s", "", text)
    depths = list(accumulate((character in "([{") - (character in ")]}") for character in bare))
    if not bare or bare[0] not in "([{" or "," not in bare or depths[-1] != 0 or 0 in depths[:-1]:
        return None
    return bare[0]


def _ascii(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    compatible = unicodedata.normalize("NFKC", character)
    kind = unicodedata.decomposition(character).partition(" ")[0]
    match kind:
        case "<fraction>":
            numerator, _, denominator = compatible.partition("\u2044")
            return rf"\frac{{{numerator}}}{{{denominator}}}"
        case "<super>":
            return f"^{{{_CHARACTERS.get(compatible, compatible)}}}"
        case "<wide>" | "<noBreak>" | "<compat>":
            return compatible
    return character


def _words(text: str) -> str | None:
    """The words of an answer that is text, such as `yes` or `\text{blue}`, in lower case; None for what may be a formula, as `xy` may."""
    bare = _TEXT.sub(r"\1", text).strip().casefold()
    if not _WORDS.fullmatch(bare) or _FUNCTIONS.search(bare):
        return None
    return bare if len(bare) >= 3 or bare != text.casefold() else None


def _is_sentence(answer: str) -> bool:
    return any(not _FUNCTIONS.fullmatch(word) for word in _LONG_WORD.findall(answer))


def _same_value(reference: str, answer: str) -> bool:
    if re.fullmatch(r"-?\d+", reference) and re.fullmatch(r"-?\d+", answer):
        return int(reference) == int(answer)
    if not _is_formula(reference):
        raise ValueError(f"the reference answer {reference[:80]!r} is neither words nor a formula that math-verify reads")
    return bool(verify(list(_parse(reference)), list(_parse(answer)), timeout_seconds=None, raise_on_error=True))


def _is_formula(text: str) -> bool:
    return not all(isinstance(reading, str) for reading in _parse(text))


@lru_cache(maxsize=4096)
def _parse(formula: str) -> tuple[Any, ...]:
    """math-verify's readings of one formula: the expression and its string, or the string alone where it is no formula."""
    return tuple(parse(f"${formula}$", (LatexExtractionConfig(),), parsing_timeout=None, raise_on_error=True))

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

_DEEPEST_ANSWER = 12
"""Brackets inside one another. The parser's time grows fast with them, and a policy that falls into a loop writes hundreds."""

_CHARACTERS = {
    **{"−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi "},
    **{"°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "},
    **{"。": ".", "、": ",", "￥": "", "¥": "", "€": "", "£": "", "\u200b": "", "\ufeff": ""},
}
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))")
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|(?<!\\)\\boxed(?=\{)")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|\{,\}|[ ~])\d{3})+(?!\d)")
_MIXED = re.compile(r"(?<![\d./}])(\d+) +(\d+)/(\d+)(?![\d/.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_PERCENT = re.compile(r"\s*(?:per ?cent|(?<!\\)%)")
_BARE_NAME = re.compile(r"(?<![\\A-Za-z{])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ \-][^\W\d_]+)*")
_FUNCTIONS = re.compile(
    r"\b(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|frac|pi|infty|inf|max|min|mod|gcd|lcm|pm|cdot|times)\b"
)
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NUMBER = re.compile(r"(?<![A-Za-z\d_.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?(?:\\%)?(?![\d/])")


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response's answer has the value of the reference answer, else 0.0.

    The answer is that of `rewards.answer.final_answer`. Raises ValueError where the reference cannot be read, which leaves the response
    not judged; an answer that cannot be read is wrong.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise ValueError(f"prompt {prompt.id} has no reference answer")
    answer = final_answer(response)
    return 0.0 if answer is None else float(equivalent(prompt.answer, answer))


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
    if _same_value(reference, answer):
        return True
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
    text = text.removesuffix(".").strip()
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _BARE_NAME.sub(r"\\\1 ", text)
    return _PERCENT.sub(r"\\%", text)


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
    expected = _parse(reference)
    if all(isinstance(reading, str) for reading in expected):
        raise ValueError(f"the reference answer {reference[:80]!r} is neither words nor a formula that math-verify reads")
    return bool(verify(list(expected), list(_parse(answer)), timeout_seconds=None, raise_on_error=True))


@lru_cache(maxsize=4096)
def _parse(formula: str) -> tuple[Any, ...]:
    """math-verify's readings of one formula: the expression and its string, or the string alone where it is no formula."""
    return tuple(parse(f"${formula}$", (LatexExtractionConfig(),), parsing_timeout=None, raise_on_error=True))

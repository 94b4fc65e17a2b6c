"""Instructions that a program can verify: the 25 kinds of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1).

Written from the published definitions. Three judgements rest on other means than the published verifier's: sentences are cut by rules,
not by Punkt; words in capitals are cut by rules, not by the Treebank tokenizer; languages are identified by `py3langid`, not by
`langdetect`, whose verdicts change from run to run. Every check takes time in proportion to the response.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import after_thought, tagged_answer

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

Arguments = Mapping[str, Any]

_LONGEST_IDENTIFIED = 10_000
"""Characters of a response whose language is identified."""

_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_WORD = re.compile(r"\w+")
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n*]*\*\*")
_FENCE = re.compile(r"```(?:json|Json|JSON)?")
_CONTRACTION = re.compile(r"(?i)(?<=\w)(n['’]t|['’](?:s|m|d|ll|re|ve))(?!\w)")
_BETWEEN_WORDS = re.compile(r"[\s;@#$%&?!()\[\]{}<>\"“”`…*]+|[,:](?!\d)|--+|(?<=\w)\.+(?=\s|$)")
_SENTENCE_END = re.compile(r"(?<![\s.?!])[.?!]+[\"'”’)\]*]*\s+(?=\S)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|mr|mrs|ms|dr|prof|sr|jr|st|gen|col|lt|sgt|capt|rev|hon|gov|sen|rep|inc|ltd|co|corp"
    r"|vs|etc|no|vol|fig|al|e\.g|i\.e|cf|approx|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)
_LONGEST_ABBREVIATION = 12
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_WORD_END = frozenset(".,?!'\"")


def prompt_strict(prompt: Prompt, response: str) -> float:
    """1.0 if the response follows every instruction of its prompt, else 0.0: IFEval's prompt-level strict accuracy."""
    return float(all(_strict(prompt, response)))


def prompt_loose(prompt: Prompt, response: str) -> float:
    """1.0 if each instruction is followed by the response or by a variant of it, else 0.0: prompt-level loose accuracy.

    The variants leave out the first line, the last one, or both, each with and without asterisks (section 2.3 of the paper).
    """
    return float(all(_loose(prompt, response)))


def instruction_strict(prompt: Prompt, response: str) -> float:
    """The share of the prompt's instructions that the response follows; weighted by `instructions`, the instruction-level accuracy."""
    return _share(_strict(prompt, response))


def instruction_loose(prompt: Prompt, response: str) -> float:
    """As `instruction_strict`, for the variants of `prompt_loose`."""
    return _share(_loose(prompt, response))


def instructions(prompt: Prompt, response: str) -> float:
    """How many instructions the prompt has."""
    return float(len(_asked(prompt)))


def follows(kind: str, arguments: Arguments, text: str) -> bool:
    """Whether a text follows one instruction, such as `("keywords:existence", {"keywords": ["tree"]})`. A blank text follows none."""
    return bool(text.strip()) and CHECKS[kind](text, arguments)


def _asked(prompt: Prompt) -> list[tuple[str, Arguments]]:
    if not prompt.meta.get("instructions"):
        raise ValueError(f"prompt {prompt.id} has no meta['instructions']; IFEval's come from the prompt source 'benchmark'")
    return [(kind, arguments) for kind, arguments in prompt.meta["instructions"]]


def _read(response: str) -> str:
    """What the reader of a response sees: without its thought and answer tags."""
    text = after_thought(response)
    tagged = tagged_answer(text)
    return text.strip() if tagged is None else tagged


def _strict(prompt: Prompt, response: str) -> list[bool]:
    text = _read(response)
    return [follows(kind, arguments, text) for kind, arguments in _asked(prompt)]


def _loose(prompt: Prompt, response: str) -> list[bool]:
    text = _read(response)
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cut, *(part.replace("*", "") for part in cut)])
    return [any(follows(kind, arguments, variant) for variant in variants) for kind, arguments in _asked(prompt)]


def _share(followed: list[bool]) -> float:
    return sum(followed) / len(followed)


def _compared(count: int, relation: str, bound: float) -> bool:
    match relation:
        case "less than":
            return count < bound
        case "at least":
            return count >= bound
    raise ValueError(f"relation {relation!r} is neither 'less than' nor 'at least'")


# ---------------------------------------------------------------- keywords


def _existence(text: str, given: Arguments) -> bool:
    return all(_occurrences(text, keyword) for keyword in given["keywords"])


def _frequency(text: str, given: Arguments) -> bool:
    return _compared(_occurrences(text, given["keyword"]), given["relation"], given["frequency"])


def _forbidden(text: str, given: Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(text: str, given: Arguments) -> bool:
    return _compared(text.lower().count(given["letter"].lower()), given["let_relation"], given["let_frequency"])


def _occurrences(text: str, keyword: str) -> int:
    return sum(1 for _ in re.finditer(re.escape(keyword), text, re.IGNORECASE))


# ---------------------------------------------------------------- language and case


def _language(text: str, given: Arguments) -> bool:
    return _identified(text, given["language"])


def _capital(text: str, given: Arguments) -> bool:
    return text.isupper() and _identified(text, "en")


def _lowercase(text: str, given: Arguments) -> bool:
    return text.islower() and _identified(text, "en")


def _capital_words(text: str, given: Arguments) -> bool:
    words = _BETWEEN_WORDS.split(_CONTRACTION.sub(r" \1", text))
    return _compared(sum(word.isupper() for word in words if word), given["capital_relation"], given["capital_frequency"])


def _identified(text: str, language: str) -> bool:
    """Whether a text is in a language. A text without letters is in any, as in the published verifier."""
    # The identifier knows texts in capitals less well.
    start = text[:_LONGEST_IDENTIFIED].lower()
    if not any(map(str.isalpha, start)):
        return True
    return bool(_identifier().classify(start)[0] == language.partition("-")[0])


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


# ---------------------------------------------------------------- length


def _sentences(text: str, given: Arguments) -> bool:
    return _compared(count_sentences(text), given["relation"], given["num_sentences"])


def count_sentences(text: str) -> int:
    """Sentences of a text: they end with a full stop, question or exclamation mark before white space, unless it marks an abbreviation."""
    return sum(1 for _ in _cut(text))


def _cut(text: str) -> Iterator[int]:
    """The ends of the sentences."""
    for mark in _SENTENCE_END.finditer(text):
        stop = mark.start() + 1
        following = text[mark.end()]
        abbreviated = mark[0][0] == "." and (
            following.islower() or _ABBREVIATION.search(text[max(0, stop - _LONGEST_ABBREVIATION) : stop]) is not None
        )
        if not abbreviated:
            yield mark.end()
    if text.strip():
        yield len(text)


def _paragraphs(text: str, given: Arguments) -> bool:
    """Paragraphs are divided by `***`; one that is blank makes the text follow no such instruction, unless it is the first or last."""
    first, *between = _DIVIDER.split(text)
    last = between.pop() if between else ""
    if not all(map(str.strip, between)):
        return False
    return bool(first.strip()) + len(between) + bool(last.strip()) == given["num_paragraphs"]


def _words(text: str, given: Arguments) -> bool:
    return _compared(sum(1 for _ in _WORD.finditer(text)), given["relation"], given["num_words"])


def _first_word(text: str, given: Arguments) -> bool:
    """Paragraphs are divided by a blank line, and so many are not blank; the nth of all begins with the word, its case ignored."""
    paragraphs = text.split("\n\n")
    filled, nth = sum(bool(paragraph.strip()) for paragraph in paragraphs), int(given["nth_paragraph"])
    if not 1 <= nth <= filled or filled != given["num_paragraphs"] or not paragraphs[nth - 1].strip():
        return False
    word = paragraphs[nth - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    end = next((place for place, character in enumerate(word) if character in _WORD_END), len(word))
    return word[:end].lower() == given["first_word"].lower()


# ---------------------------------------------------------------- content and format


def _placeholders(text: str, given: Arguments) -> bool:
    """`[so]`, each on one line. By hand: a regular expression looks again for the missing bracket from every `[`."""
    found = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            found += 1
            start = line.find("[", end)
    return found >= given["num_placeholders"]


def _postscript(text: str, given: Arguments) -> bool:
    match given["postscript_marker"]:
        case "P.P.S":
            pattern = r"p\.\s?p\.\s?s"
        case "P.S.":
            pattern = r"p\.\s?s\."
        case marker:
            pattern = re.escape(marker.lower())
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, given: Arguments) -> bool:
    """Lines that begin with `-`, or with one `*`."""
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line.startswith(("-", "*")) and not line.startswith("**") for line in lines) == given["num_bullets"]


def _constrained(text: str, given: Arguments) -> bool:
    return any(option in text for option in _CONSTRAINED)


def _highlights(text: str, given: Arguments) -> bool:
    """`*so*`, and `**so**` apart from them."""
    found = [*_HIGHLIGHT.finditer(text), *_DOUBLE_HIGHLIGHT.finditer(text)]
    return sum(bool(highlight[0].strip("*").strip()) for highlight in found) >= given["num_highlights"]


def _sections(text: str, given: Arguments) -> bool:
    marks = re.finditer(rf"{re.escape(given['section_spliter'])}\s?\d+", text)
    return sum(1 for _ in marks) >= given["num_sections"]


def _json(text: str, given: Arguments) -> bool:
    text = text.strip()
    opening = _FENCE.match(text)
    try:
        json.loads(text[opening.end() if opening else 0 :].removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Arguments) -> bool:
    """`<<so>>` on one line."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and start + 2 < end and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# ---------------------------------------------------------------- the whole response


def _two_responses(text: str, given: Arguments) -> bool:
    """Two different responses, divided by `******`."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(text: str, given: Arguments) -> bool:
    return "," not in text


CHECKS: Final[Mapping[str, Callable[[str, Arguments], bool]]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}
"""The 25 kinds of instructions; their arguments are those of `data.benchmarks.ifeval`."""

r"""In which languages a text is written, counted in words; the language-consistency reward.

What counts as a word:
- Chinese is cut by jieba's dictionary (`rjieba`). A run of one Japanese script is a word (Han characters are cut as in Chinese), and so is
  a run of Korean or of any other letters, without single letters, which are names of variables, and without acronyms, function names
  such as `sin`, units and identifiers such as `n_max`, `np.array` or `f(`.
- Mathematics (`$...$`, `\(...\)`, `\[...\]`, environments, LaTeX commands with their arguments), code in backticks or fences, tags and
  addresses are no words of any language. A delimiter that is never closed hides nothing.

How a word's language is known:
- Its script says it where one language is written in it. Han characters are Japanese in a sentence with kana, else Chinese; in a short
  sentence without kana they are whichever of the two is expected.
- Languages that share a script, such as Latin's, are told apart by sentence, not by word: sentences are joined until they hold eight
  words of the script, and are of another language than the expected one only where `py3langid` is sure. A single French word in an
  English sentence is therefore not seen; a Chinese one is.

Every function takes time in proportion to its text, a few seconds a megabyte.
"""

import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import regex

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import thought

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

SCRIPTS: Final[Mapping[str, tuple[str, ...]]] = {
    "Latin": ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "ro", "hu", "tr", "vi", "id"),
    "Han": ("zh", "ja"),
    "Kana": ("ja",),
    "Hangul": ("ko",),
    "Cyrillic": ("ru", "uk", "bg"),
    "Arabic": ("ar", "fa", "ur"),
    "Devanagari": ("hi", "mr", "ne"),
    "Greek": ("el",),
    "Hebrew": ("he",),
    "Bengali": ("bn",),
    "Tamil": ("ta",),
    "Telugu": ("te",),
    "Thai": ("th",),
}
"""The scripts whose words are counted, by Unicode's names but for `Kana`, and the ISO 639-1 codes of the languages told apart in each."""

LANGUAGES: Final = frozenset(language for languages in SCRIPTS.values() for language in languages)

_NAMES = {"english": "en", "chinese": "zh"}

_SURE = 0.8
"""Probability above which the identifier is believed."""
_SEGMENT = 8
"""Words of a script that are identified together."""
_LONGEST_WORD = 40
"""Characters of a word that the identifier sees."""
_FEWEST = 4
"""Words below which nothing is identified."""
_KANA_SHARE = 0.1
_SHORT_HAN = 8
"""Characters. Japanese sentences this long hold kana."""

_FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp lim max min sup inf mod gcd lcm det dim ker arg sgn sqrt"
)
_UNITS = "mm cm dm km mg kg ml kj hz khz mhz ghz kb mb gb ms ns mol rad deg lb oz ft"
_NO_WORDS = frozenset(f"{_FUNCTIONS} {_UNITS}".split())

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
# Normalising the whole text would take time quadratic in a run of combining marks.
_COMPATIBLE = re.compile("[\uff00-\uffef\U0001d400-\U0001d7ff]+")
_CODE_MARK = re.compile("`+|~~~+")
_MATHS_MARK = re.compile(r"\\begin\{[A-Za-z]{1,20}\*?\}|\\end\{[A-Za-z]{1,20}\*?\}|(?<!\\)\\[()\[\]]|(?<!\\)\$\$")
# Pandoc's rule, by which `$5 and $10` holds no formula. Linear, since a formula holds no dollar sign.
_DOLLARS = re.compile(r"(?<!\\)\$(?=\S)[^$]{1,4000}(?<=\S)\$(?!\d)")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+\*?")
_SENTENCE = re.compile(r"[.!?](?!\w)|[。！？；;…\n]+")

_SKIPPED = (
    r"(?:https?://|www\.)\S++"
    r"|</?[A-Za-z][\w\-]{0,20}>"
    r"|[A-Za-z]*+[\d_][A-Za-z\d_]*+"  # x1, n_max, 2nd
    r"|[A-Za-z]++(?:[.@_/\\][A-Za-z\d_]++)++"  # np.array
    r"|[A-Za-z]++(?=[(\[])"  # f(
    r"|[a-z]++[A-Z][A-Za-z]*+"  # sumOfDigits
    r"|\b[A-Z]{2,5}(?![A-Za-z])"  # DNA
)
_RUNS = {script: rf"\p{{{script}}}[\p{{{script}}}\p{{M}}]*+" for script in SCRIPTS if script != "Kana"} | {
    "Latin": r"\p{Latin}[\p{Latin}\p{M}]*+(?:['’]\p{Latin}++)*+",
    "Kana": r"\p{Hiragana}++|[\p{Katakana}ー]++",
}
_TOKEN = regex.compile("|".join([f"(?:{_SKIPPED})", *(f"(?P<{script}>{run})" for script, run in _RUNS.items())]))


def consistency(prompt: Prompt, response: str) -> float:
    """DeepSeek-R1's language-consistency reward: words of the target language over words, in the chain of thought (arXiv 2501.12948).

    The target is `prompt.meta["language"]`, an ISO 639-1 code, or else the language of the question. A question that is too short to
    tell, such as `Compute 2 + 2`, asks for any one language of its script, and one without words for any one language.

    The paper leaves open what a thought without words is worth. It is 0.0 here, as is a response without a thought: were either worth
    more, a policy would be paid for not thinking, or for thinking in formulas that nobody can follow. Use `share` to measure instead.
    Raises ValueError for a language that is not one of `LANGUAGES`.
    """
    return share(prompt, response) or 0.0


def share(prompt: Prompt, response: str) -> float | None:
    """Share of the words in a response's thought that belong to the target language, in [0, 1]; None where there are no such words."""
    text = thought(response)
    if text is None:
        return None
    target = target_language(prompt, text)
    counts = words(text, target)
    return counts[target] / counts.total() if counts else None


def mixed(text: str, language: str, least: float = 0.9) -> bool:
    """Whether less than the share `least` of a text's words belongs to a language. A text without words is not mixed."""
    counts = words(text, language)
    return bool(counts) and counts[language] < least * counts.total()


def target_language(prompt: Prompt, text: str = "") -> str:
    """The language that a text about the prompt should be in: one of `LANGUAGES`. The text decides where the question does not."""
    stated = prompt.meta.get("language")
    if stated is not None:
        code = str(stated).casefold().replace("_", "-").partition("-")[0]
        code = _NAMES.get(code, code)
        if code not in LANGUAGES:
            raise ValueError(f"prompt {prompt.id}: meta 'language' is {stated!r}, not one of {', '.join(sorted(LANGUAGES))}")
        return code
    script, language = _main_language(_Words(prompt.text))
    if language is not None:
        return language
    script, language = _main_language(_Words(text), script)
    return language or SCRIPTS[script or "Latin"][0]


def words(text: str, expected: str) -> Counter[str]:
    """How many words of each language a text holds. What cannot be told apart counts as `expected` where that is written so."""
    counts: Counter[str] = Counter()
    waiting: dict[str, list[str]] = defaultdict(list)
    for sentence in _sentences(text):
        _count_han(sentence, expected, counts)
        for script, found in sentence.items():
            if script in ("Han", "Kana"):
                continue
            segment = waiting[script]
            segment += found
            if len(segment) >= _SEGMENT:
                counts[_segment_language(segment, script, expected)] += len(segment)
                segment.clear()
    for script, segment in waiting.items():
        if segment:
            counts[_segment_language(segment, script, expected)] += len(segment)
    return counts


def prose(text: str) -> str:
    """A text without code, mathematics, LaTeX commands and invisible characters; full-width and mathematical letters are plain ones."""
    text = _COMPATIBLE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _INVISIBLE.sub("", text))
    text = _without(text, _CODE_MARK, lambda mark: mark)
    # A formula does not reach over a blank line (TeX forbids it), so one that is never closed costs a paragraph at most.
    paragraphs = (_DOLLARS.sub(" ", _without(part, _MATHS_MARK, _closing)) for part in _BLANK_LINE.split(text))
    return _without_commands("\n\n".join(paragraphs))


# ---------------------------------------------------------------- what is no language


def _closing(mark: str) -> str | None:
    if mark.startswith(r"\begin"):
        return mark.replace("begin", "end")
    return {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}.get(mark)


def _without(text: str, marks: re.Pattern[str], closing: Callable[[str], str | None]) -> str:
    """A text without what stands from a mark to the next mark that closes it."""
    found = list(marks.finditer(text))
    later: dict[str, deque[re.Match[str]]] = defaultdict(deque)
    for mark in found:
        later[mark[0]].append(mark)
    kept, start = [], 0
    for mark in found:
        close = closing(mark[0])
        if mark.start() < start or close is None:
            continue
        ends = later[close]
        while ends and ends[0].start() < mark.end():
            ends.popleft()
        if ends:
            kept.append(text[start : mark.start()])
            start = ends[0].end()
    return " ".join([*kept, text[start:]])


def _without_commands(text: str) -> str:
    r"""A text without LaTeX commands and their arguments in braces, but with the arguments of `\text...` and `\emph`, which are prose."""
    if "\\" not in text:
        return text
    closes, open_braces = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            closes[open_braces.pop()] = brace.end()
    kept, start = [], 0
    for command in _COMMAND.finditer(text):
        if command.start() < start:
            continue
        kept.append(text[start : command.start()])
        start = command.end()
        while not command[0].startswith((r"\text", r"\emph")) and start in closes:
            start = closes[start]
    return " ".join([*kept, text[start:]])


# ---------------------------------------------------------------- words and their languages


def _sentences(text: str) -> Iterator[dict[str, list[str]]]:
    """The runs of each script in each sentence; Han characters are not cut into words yet."""
    for sentence in _SENTENCE.split(prose(text)):
        runs: dict[str, list[str]] = defaultdict(list)
        for token in _TOKEN.finditer(sentence):
            script, run = token.lastgroup, token[0]
            if script is None or (len(run) == 1 and script in ("Latin", "Greek", "Cyrillic")) or run.casefold() in _NO_WORDS:
                continue
            runs[script].append(run)
        if runs:
            yield runs


def _count_han(sentence: Mapping[str, Sequence[str]], expected: str, counts: Counter[str]) -> None:
    """Add the words in Han characters and kana."""
    han, kana = sentence.get("Han", ()), sentence.get("Kana", ())
    if kana:
        counts["ja"] += len(kana)
    if not han:
        return
    characters = sum(map(len, han))
    kana_characters = sum(map(len, kana))
    if kana_characters > _KANA_SHARE * (characters + kana_characters) or (characters < _SHORT_HAN and expected == "ja"):
        language = "ja"
    else:
        language = "zh"
    counts[language] += sum(len(_cut(run)) for run in han)


def _segment_language(segment: Sequence[str], script: str, expected: str) -> str:
    languages = SCRIPTS[script]
    default = expected if expected in languages else languages[0]
    if len(languages) == 1 or len(segment) < _FEWEST:
        return default
    return _identify(segment, script) or default


def _identify(segment: Sequence[str], script: str) -> str | None:
    """The language of words of one script; None where the identifier is not sure."""
    if len(SCRIPTS[script]) == 1:
        return SCRIPTS[script][0]
    language, probability = _identifier(script).classify(" ".join(word[:_LONGEST_WORD] for word in segment))
    return language if probability >= _SURE else None


class _Words:
    """All words of a text by script."""

    def __init__(self, text: str) -> None:
        self.by_script: dict[str, list[str]] = defaultdict(list)
        for sentence in _sentences(text):
            for script, runs in sentence.items():
                self.by_script[script] += [word for run in runs for word in _cut(run)] if script == "Han" else runs


def _main_language(words: _Words, script: str | None = None) -> tuple[str | None, str | None]:
    """The script of most words, or the one given, and the language of the words in it; None for what cannot be told."""
    found = words.by_script
    if script is None:
        script = max(found, key=lambda name: len(found[name]), default=None)
    if script is None:
        return None, None
    if script in ("Han", "Kana"):
        kana, han = (sum(map(len, found[name])) for name in ("Kana", "Han"))
        return "Han", "ja" if kana > _KANA_SHARE * (kana + han) else "zh"
    return script, _identify(found[script], script)


def _cut(run: str) -> list[str]:
    import rjieba  # its dictionary takes a while to load

    return rjieba.cut(run)


@cache
def _identifier(script: str) -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(SCRIPTS[script])
    return identifier

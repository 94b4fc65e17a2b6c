"""Add six digits modulo ten. A long response sums digit by digit; a short one guesses and is right one time in ten."""

from collections.abc import Iterator
from itertools import count
from random import Random

from r1mega.config.corpora import TinyCorpus
from r1mega.data.prompts import Prompt
from r1mega.data.split import is_heldout
from r1mega.data.tiny.vocabulary import ANSWER, END_ANSWER, END_THINK, LANGUAGES, SO, THINK, WAIT
from r1mega.errors import UserError

DIGITS = 6


def question(language: str, digits: tuple[int, ...]) -> str:
    """The prompt's text, such as `en 3 + 1 + 4 + 1 + 5 + 9 :`.

    A digit takes two words, like a step `so 8` of the answer: a fixed distance apart, which a small model with rotary
    positions learns to look up in a few hundred updates and hardly at all otherwise.
    """
    return f"{language} {' + '.join(map(str, digits))} :"


def prompts(size: int, seed: int) -> list[Prompt]:
    """`size` different problems; `answer` is the sum modulo ten, `meta` has the language. UserError above 2 x 10^6."""
    if size > len(LANGUAGES) * 10**DIGITS:
        raise UserError(f"running_sum has {len(LANGUAGES) * 10**DIGITS} problems, {size} were asked for (size)")
    drawn: dict[str, Prompt] = {}
    random = Random(f"running_sum prompts {seed}")
    while len(drawn) < size:
        language, digits = _draw(random)
        text = question(language, digits)
        drawn.setdefault(
            text,
            Prompt(
                id=f"running_sum/{language}{''.join(map(str, digits))}",
                text=text,
                answer=str(sum(digits) % 10),
                meta={"language": language},
            ),
        )
    return list(drawn.values())


def documents(corpus: TinyCorpus, start: int = 0) -> Iterator[str]:
    """The corpus from document `start` on, without end."""
    return (document(corpus, index) for index in count(start))


def document(corpus: TinyCorpus, index: int) -> str:
    """Document `index`: a question of the training side and its response, without BOS and EOS.

    It depends on the corpus and the index alone, so a run can resume anywhere.
    """
    random = Random(f"{corpus.task} documents {corpus.seed} {index}")
    language, digits = _draw(random)
    while is_heldout(question(language, digits), corpus.heldout_fraction):
        language, digits = _draw(random)
    tagged = random.random() < corpus.tagged_share
    if random.random() < corpus.long_share:
        mixed = random.random() < corpus.mixed_share
        thought, value = _think(random, corpus, digits, LANGUAGES if mixed else (language,))
        response = [*([THINK, *thought, END_THINK] if tagged else thought), ANSWER, str(value), END_ANSWER]
    else:
        guess = str(random.randrange(10))
        response = [ANSWER, guess, END_ANSWER] if tagged else [guess]
    return f"{question(language, digits)} {' '.join(response)}"


def _draw(random: Random) -> tuple[str, tuple[int, ...]]:
    return random.choice(LANGUAGES), tuple(random.randrange(10) for _ in range(DIGITS))


def _think(random: Random, corpus: TinyCorpus, digits: tuple[int, ...], languages: tuple[str, ...]) -> tuple[list[str], int]:
    """Words of a chain of thought and the value it ends on.

    A wrong step is either corrected at once, after a `wait`, or carried into the sums that follow.
    """
    words: list[str] = []
    value = 0
    for digit in digits:
        language = random.choice(languages)
        right = (value + digit) % 10
        value = right
        if random.random() < corpus.error_rate[LANGUAGES.index(language)]:
            value = (right + random.randrange(1, 10)) % 10
        words += (SO[language], str(value))
        if value != right and random.random() < corpus.corrected_share:
            value = right
            words += (WAIT[language], str(value))
    return words, value

"""Find three signs: which make `3 ? 1 ? 4 ? 2` two, modulo ten? A long response tries signs until some check; a short one guesses.

Here reflection is useful. Of eight candidates one or two are right as a rule and none looks better than another, so a first try fails
three times in four; but a try is checked by three small sums, so whoever goes on after a `wait` finds the answer.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise, product
from random import Random
from typing import Final

from r1mega.config.corpora import SignsCorpus
from r1mega.data.prompts import Prompt
from r1mega.data.split import is_heldout
from r1mega.data.tiny.vocabulary import ANSWER, END_ANSWER, END_THINK, LANGUAGES, THINK, WAIT, YES
from r1mega.errors import UserError
from r1mega.rewards.exact import answer_of

Signs = tuple[str, ...]

CANDIDATES: Final[tuple[Signs, ...]] = tuple(product("+-", repeat=3))

_TRY = re.compile(rf"(?<!\S)\d((?: [+-] \d \d){{3}}) vs \d ({'|'.join((*WAIT.values(), *YES.values()))})(?!\S)")
"""A complete try: its signs among other words, and its verdict. Every part has a fixed width, so a search is linear."""


@dataclass(frozen=True)
class Question:
    """Four digits, and what they are to give with the right signs."""

    language: str
    digits: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        """Such as `en 3 ? 1 ? ? 4 ? ? 2 ? vs 2 :`: a try whose signs and values are left open.

        A question has the places of a try, so that a small model finds a digit again a fixed distance back.
        """
        first, *others = self.digits
        return f"{self.language} {first} {' '.join(f'? {digit} ?' for digit in others)} vs {self.target} :"

    @property
    def level(self) -> int:
        """How rare solutions are: 3 for one candidate of the eight, 2 for two, 1 for more."""
        return max(1, 4 - sum(self.solved_by(signs) for signs in CANDIDATES))

    def values(self, signs: Signs) -> list[int]:
        """The three partial sums modulo ten."""
        value, found = self.digits[0], []
        for sign, digit in zip(signs, self.digits[1:], strict=True):
            value = (value + digit if sign == "+" else value - digit) % 10
            found.append(value)
        return found

    def solved_by(self, signs: Signs) -> bool:
        return self.values(signs)[-1] == self.target

    def tried(self, signs: Signs) -> str:
        """A try, such as `3 + 1 4 + 4 8 + 2 0 vs 2 wait`: each partial sum behind its digit, the last one beside the target."""
        steps = " ".join(f"{sign} {digit} {value}" for sign, digit, value in zip(signs, self.digits[1:], self.values(signs), strict=True))
        verdict = (YES if self.solved_by(signs) else WAIT)[self.language]
        return f"{self.digits[0]} {steps} vs {self.target} {verdict}"

    def prompt(self) -> Prompt:
        """Without a reference answer, as several may be right; `accuracy` reads the digits and the target in `meta`."""
        name = f"signs/{self.language}{''.join(map(str, self.digits))}={self.target}"
        meta = {"language": self.language, "level": self.level, "digits": list(self.digits), "target": self.target}
        return Prompt(name, self.text, meta=meta)


@cache
def questions() -> tuple[Question, ...]:
    """All 56,754 that have a solution. There is no 0 among the digits: its sign would not matter."""
    found = []
    for language, digits in product(LANGUAGES, product(range(1, 10), repeat=4)):
        reached = {Question(language, digits, 0).values(signs)[-1] for signs in CANDIDATES}
        found += [Question(language, digits, target) for target in sorted(reached)]
    return tuple(found)


def prompts(size: int, seed: int) -> list[Prompt]:
    """`size` different problems; UserError for more than there are."""
    everything = list(questions())
    if size > len(everything):
        raise UserError(f"signs has {len(everything)} problems, {size} were asked for (size)")
    Random(f"signs prompts {seed}").shuffle(everything)
    return [question.prompt() for question in everything[:size]]


# ---------------------------------------------------------------- corpus


def documents(corpus: SignsCorpus, start: int = 0) -> Iterator[str]:
    """The corpus from document `start` on, without end."""
    return (document(corpus, index) for index in count(start))


def document(corpus: SignsCorpus, index: int) -> str:
    """Document `index`: a question of the training side and its response, without BOS and EOS; a function of corpus and index alone."""
    random = Random(f"signs documents {corpus.seed} {index}")
    question = random.choice(questions())
    while is_heldout(question.text, corpus.heldout_fraction):
        question = random.choice(questions())
    tagged = random.random() < corpus.tagged_share
    if random.random() < corpus.long_share:
        thought, signs = _search(random, corpus.patience, question)
        response = [*((THINK, thought, END_THINK) if tagged else (thought,)), ANSWER, *signs, END_ANSWER]
    else:
        signs = random.choice(CANDIDATES)
        response = [ANSWER, *signs, END_ANSWER] if tagged else list(signs)
    return f"{question.text} {' '.join(response)}"


def _search(random: Random, patience: float, question: Question) -> tuple[str, Signs]:
    """Tries from any candidate on, in order and round, and the signs of the last: they solve the question, or patience ended.

    The next candidate follows from the last one. A small model that were to try anything but what it has tried would forget.
    """
    first = random.randrange(len(CANDIDATES))
    tried = []
    for signs in CANDIDATES[first:] + CANDIDATES[:first]:
        tried.append(question.tried(signs))
        if question.solved_by(signs) or random.random() >= patience:
            break
    return " ".join(tried), signs


# ---------------------------------------------------------------- rewards and measures


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the signs of the answer solve the question, else 0.0."""
    signs = tuple((answer_of(response) or "").split())
    return float(signs in CANDIDATES and _question(prompt).solved_by(signs))


def mistaken(prompt: Prompt, response: str) -> float:
    """1.0 where `accuracy` is 0."""
    return 1.0 - accuracy(prompt, response)


def tries(prompt: Prompt, response: str) -> float:
    """How many complete tries the response makes."""
    return float(len(_tries(response)))


def searches(prompt: Prompt, response: str) -> float:
    """1.0 for a response that tries until it says that a try checks, rightly or not."""
    return float(any(verdict in YES.values() for _, verdict in _tries(response)))


def correct_when_searching(prompt: Prompt, response: str) -> float:
    """`accuracy` of the responses that search, NaN of the others."""
    return accuracy(prompt, response) if searches(prompt, response) else math.nan


def precision(prompt: Prompt, response: str) -> float:
    """Share of the response's `yes` whose signs do solve the question; NaN where there is none."""
    question = _question(prompt)
    accepted = [question.solved_by(signs) for signs, verdict in _tries(response) if verdict in YES.values()]
    return sum(accepted) / len(accepted) if accepted else math.nan


def persistence(prompt: Prompt, response: str) -> float:
    """Share of the response's `wait` that another try follows, complete or not; NaN where there is none."""
    words = response.split()
    following = [after.isdigit() for word, after in pairwise([*words, ""]) if word in WAIT.values()]
    return sum(following) / len(following) if following else math.nan


def length(prompt: Prompt, response: str) -> float:
    """Words of the response."""
    return float(len(response.split()))


def level_1(prompt: Prompt, response: str) -> float:
    """1.0 for questions that three or more candidates solve."""
    return float(prompt.meta["level"] == 1)


def level_2(prompt: Prompt, response: str) -> float:
    """1.0 for questions that two candidates solve."""
    return float(prompt.meta["level"] == 2)


def level_3(prompt: Prompt, response: str) -> float:
    """1.0 for questions that one candidate solves."""
    return float(prompt.meta["level"] == 3)


def _question(prompt: Prompt) -> Question:
    return Question(prompt.meta["language"], tuple(prompt.meta["digits"]), prompt.meta["target"])


def _tries(response: str) -> list[tuple[Signs, str]]:
    """Signs and verdict of every complete try."""
    found = _TRY.findall(" ".join(response.split()))
    return [(tuple(word for word in steps.split() if word in "+-"), verdict) for steps, verdict in found]

"""Signs: questions, what solves them, the corpus, and what responses are judged and measured by."""

import math
import re
import time
from itertools import islice, pairwise, product

import pytest
from transformers import PreTrainedTokenizerFast

from r1mega.config.corpora import SignsCorpus
from r1mega.data.prompts import Prompt
from r1mega.data.split import is_heldout
from r1mega.data.tiny import signs
from r1mega.data.tiny.measures import reflection
from r1mega.data.tiny.signs import Question, document, documents, prompts
from r1mega.data.tiny.tokenizer import build_tokenizer
from r1mega.data.tiny.vocabulary import ANSWER, END_ANSWER, THINK, WAIT, YES
from r1mega.errors import UserError
from r1mega.rewards.format import tags

SEARCH = "<think> 3 + 1 4 - 4 0 + 2 2 vs 2 yes </think> <answer> + - + </answer>"


ORDER = [" ".join(chosen) for chosen in product("+-", repeat=3)]


def corpus(**fields: object) -> SignsCorpus:
    return SignsCorpus.model_validate({"kind": "signs", "long_share": 0.5, **fields})


def asked(text: str) -> Question:
    """The question that a document or a prompt opens with."""
    found = re.match(r"(en|zh) (\d) \? (\d) \? \? (\d) \? \? (\d) \? vs (\d) :", text)
    assert found
    language, *digits, target = found.groups()
    return Question(language, tuple(map(int, digits)), int(target))


def solutions(digits: tuple[int, ...], target: int) -> set[str]:
    """All signs that solve it, by Python's own arithmetic."""
    found = set()
    for chosen in product("+-", repeat=3):
        expression = "".join(f"{digit}{sign}" for digit, sign in zip(digits, (*chosen, ""), strict=True))
        if eval(expression) % 10 == target:
            found.add(" ".join(chosen))
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


# ---------------------------------------------------------------- questions


def test_questions_are_all_that_have_a_solution() -> None:
    expected = {
        (digits, target)
        for digits in product(range(1, 10), repeat=4)
        for target in {sum(s * d for s, d in zip((1, *s), digits, strict=True)) % 10 for s in product((1, -1), repeat=3)}
    }
    for language in ("en", "zh"):
        assert {(q.digits, q.target) for q in signs.questions() if q.language == language} == expected
    assert len(signs.questions()) == len({question.text for question in signs.questions()}) == 2 * len(expected) == 56_754


def test_prompts_are_different_solvable_and_repeatable() -> None:
    drawn = prompts(2_000, seed=1)
    assert len({prompt.text for prompt in drawn}) == len({prompt.id for prompt in drawn}) == 2_000
    for prompt in drawn:
        question = asked(prompt.text)
        assert (prompt.meta["language"], tuple(prompt.meta["digits"]), prompt.meta["target"]) == (
            question.language,
            question.digits,
            question.target,
        )
        assert prompt.meta["level"] == {1: 3, 2: 2}.get(len(solutions(question.digits, question.target)), 1)
    assert {prompt.meta["level"] for prompt in drawn} == {1, 2, 3}
    assert drawn == prompts(2_000, seed=1) and drawn[:100] == prompts(100, seed=1) and drawn != prompts(2_000, seed=2)


def test_more_prompts_than_questions_are_refused() -> None:
    with pytest.raises(UserError, match=r"signs has 56754 problems, 60000 were asked for \(size\)"):
        prompts(60_000, seed=0)


def test_a_question_is_a_try_left_open() -> None:
    """A digit stands where its try has it, the same number of words back: what a small model can look up."""
    question = Question("en", (3, 1, 4, 2), 2)
    text, tried = question.text.split()[1:-1], question.tried(("+", "-", "+")).split()[:-1]
    assert " ".join(tried) == "3 + 1 4 - 4 0 + 2 2 vs 2"
    assert [open_ if open_ != "?" else closed for open_, closed in zip(text, tried, strict=True)] == tried


# ---------------------------------------------------------------- corpus


def parts(text: str) -> tuple[Question, list[str], str]:
    """Question, tries and answer of a document with all tags."""
    response = text[text.index(":") + 2 :]
    found = re.fullmatch(r"(?:<think> (.*) </think> )?<answer> (.*) </answer>", response)
    assert found
    return asked(text), re.findall(r".+? (?:wait|deng|yes|dui)(?: |$)", found[1] or ""), found[2]


def test_documents_depend_on_seed_and_index_alone() -> None:
    first = list(islice(documents(corpus()), 50))
    assert first == [document(corpus(), index) for index in range(50)]
    assert first[20:30] == list(islice(documents(corpus(), start=20), 10))
    assert first != list(islice(documents(corpus(seed=1)), 50))


def test_no_document_holds_a_heldout_question() -> None:
    texts = list(islice(documents(corpus(heldout_fraction=0.5)), 2_000))
    assert not any(is_heldout(asked(text).text, 0.5) for text in texts)
    heldout = {prompt.text for prompt in prompts(20_000, seed=0) if is_heldout(prompt.text, 0.1)}
    assert 1_500 < len(heldout) < 2_500
    assert not heldout & {asked(text).text for text in islice(documents(corpus(long_share=0.0)), 20_000)}


def test_every_try_is_right_and_the_next_one_in_order() -> None:
    for text in islice(documents(corpus(long_share=1.0, patience=0.8)), 500):
        question, tries, answer = parts(text)
        right = solutions(question.digits, question.target)
        made = []
        for words in map(str.split, tries):
            assert words[0] == str(question.digits[0]) and words[10:12] == ["vs", str(question.target)] and len(words) == 13
            value = question.digits[0]
            for sign, digit, result, expected in zip(words[1:10:3], words[2:10:3], words[3:10:3], question.digits[1:], strict=True):
                value = eval(f"{value}{sign}{digit}") % 10
                assert (int(digit), int(result)) == (expected, value)
            made.append(" ".join(words[1:10:3]))
            assert words[12] == (YES if made[-1] in right else WAIT)[question.language]
        places = [ORDER.index(chosen) for chosen in made]
        assert all(after == (before + 1) % 8 for before, after in pairwise(places)) and answer == made[-1]
        assert not set(made[:-1]) & right  # the search ends where a try checks


def test_shares_of_the_corpus() -> None:
    def near(count: int, total: int, share: float) -> bool:
        return abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total)

    n = 4_000
    texts = list(islice(documents(corpus(long_share=0.3, patience=0.6, tagged_share=0.8)), n))
    long = [text for text in texts if text.count("vs") > 1]
    short = [text for text in texts if text.count("vs") == 1]
    assert near(len(long), n, 0.3)
    assert near(sum(THINK in text for text in long), len(long), 0.8)
    assert near(sum(ANSWER in text for text in short), len(short), 0.8)
    assert all(ANSWER in text for text in long) and not any(THINK in text for text in short)
    words = [text.split() for text in long]
    went_on = sum(after.isdigit() for text in words for word, after in pairwise(text) if word in WAIT.values())
    assert near(went_on, sum(word in WAIT.values() for text in words for word in text), 0.6)
    patient = list(islice(documents(corpus(long_share=1.0)), 300))
    assert all(any(word in text.split() for word in YES.values()) for text in patient)


def test_guesses_are_no_better_than_chance() -> None:
    texts = list(islice(documents(corpus(long_share=0.0)), 3_000))
    right = sum(parts(text)[2] in solutions(asked(text).digits, asked(text).target) for text in texts)
    chance = sum(len(solutions(question.digits, question.target)) / 8 for question in map(asked, texts)) / 3_000
    assert abs(right / 3_000 - chance) < 4 * math.sqrt(0.25 / 3_000) and chance < 0.25


def test_every_document_can_be_written(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in islice(documents(corpus(tagged_share=0.5, patience=0.9)), 300):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    longest = max(len(text.split()) for text in islice(documents(corpus(long_share=1.0)), 3_000))
    assert longest == 14 + 8 * 13 + 7  # question, eight tries, tags and answer


# ---------------------------------------------------------------- rewards and measures


def test_the_judge_accepts_exactly_the_solutions() -> None:
    for prompt in prompts(1_500, seed=4):
        right = solutions(tuple(prompt.meta["digits"]), prompt.meta["target"])
        for chosen in map(" ".join, product("+-", repeat=3)):
            assert signs.accuracy(prompt, f"<think> x </think> {ANSWER} {chosen} {END_ANSWER}") == float(chosen in right)


@pytest.fixture
def prompt() -> Prompt:
    """One that `+ - +` alone solves."""
    assert solutions((3, 1, 4, 2), 2) == {"+ - +"}
    return Question("en", (3, 1, 4, 2), 2).prompt()


@pytest.mark.parametrize(
    "response",
    [
        "",
        "+ - +",
        "<answer> </answer>",
        "<answer> + - </answer>",
        "<answer> + - + + </answer>",
        "<answer> +-+ </answer>",
        "<answer> + * + </answer>",
        "<answer> 3 + 1 - 4 + 2 </answer>",
        "<think> + - + </think>",
        "<answer> + - + </answer> <answer> + + + </answer>",
    ],
)
def test_the_judge_wants_three_signs_in_one_answer(prompt: Prompt, response: str) -> None:
    assert signs.accuracy(prompt, SEARCH) == 1.0
    assert signs.accuracy(prompt, response) == 0.0
    assert signs.mistaken(prompt, response) == 1.0


def test_a_search_is_measured(prompt: Prompt) -> None:
    response = SEARCH.replace("<think> ", "<think> 3 + 1 4 + 4 8 + 2 0 vs 2 wait 3 - 1 2 + 4 6 - 2 4 vs 2 deng ")
    assert tags(prompt, response) == signs.accuracy(prompt, response) == 1.0
    assert (signs.tries(prompt, response), reflection(prompt, response)) == (3.0, 2.0)
    assert signs.searches(prompt, response) == signs.correct_when_searching(prompt, response) == signs.precision(prompt, response) == 1.0
    assert signs.persistence(prompt, response) == 1.0
    assert signs.length(prompt, response) == 2 + 3 * 13 + 5


def test_giving_up_is_measured(prompt: Prompt) -> None:
    response = "<think> 3 + 1 4 + 4 8 + 2 0 vs 2 wait 3 - 1 2 - 4 8 - 2 6 vs 2 wait </think> <answer> - - - </answer>"
    assert (signs.tries(prompt, response), signs.persistence(prompt, response), signs.searches(prompt, response)) == (2.0, 0.5, 0.0)
    assert math.isnan(signs.correct_when_searching(prompt, response)) and math.isnan(signs.precision(prompt, response))
    for guess in ("", "<answer> + - + </answer>"):
        assert math.isnan(signs.persistence(prompt, guess)) and signs.tries(prompt, guess) == 0.0


def test_a_false_yes_is_found_by_its_signs_not_by_its_values(prompt: Prompt) -> None:
    false = "<think> 3 + 1 4 + 4 8 + 2 2 vs 2 yes </think> <answer> + + + </answer>"
    assert signs.precision(prompt, false) == signs.correct_when_searching(prompt, false) == 0.0
    assert signs.precision(prompt, f"{false} {SEARCH}") == 0.5


def test_words_that_make_no_try_are_none(prompt: Prompt) -> None:
    for words in ("3 + 1 4 - 4 0 vs 2 yes", "3 + 1 4 - 4 0 + 2 2 vs 2", "3 ? 1 4 - 4 0 + 2 2 vs 2 yes", "13 + 1 4 - 4 0 + 2 2 vs 2 yes"):
        assert signs.tries(prompt, words) == signs.searches(prompt, words) == 0.0


def test_levels_are_told_apart() -> None:
    for prompt in prompts(200, seed=5):
        assert [signs.level_1(prompt, ""), signs.level_2(prompt, ""), signs.level_3(prompt, "")].index(1.0) + 1 == prompt.meta["level"]


@pytest.mark.parametrize("unit", ["3 + 1 4 - 4 0 + 2 2 vs 2 wait ", "3 + ", "1", "<answer> ", " "])
def test_megabytes_are_read_in_linear_time(prompt: Prompt, unit: str) -> None:
    response = unit * (1_000_000 // len(unit))
    begin = time.process_time()
    for measure in (signs.accuracy, signs.tries, signs.precision, signs.persistence):
        measure(prompt, response)
    assert time.process_time() - begin < 5

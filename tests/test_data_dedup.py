"""Near-duplicates, and n-grams of benchmarks in training data."""

import subprocess
import sys
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.decontamination import Contamination
from r1mega.data.dedup import near_duplicates
from r1mega.data.ngrams import ngram_hashes, normalised_words

VOCABULARY = ["".join(Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=5)) for i in range(2_000)]


def prose(words: int, seed: int) -> str:
    return " ".join(Random(seed).choices(VOCABULARY, k=words))


def edited(text: str, changes: int, seed: int = 0) -> str:
    words = text.split()
    for place in Random(seed).sample(range(len(words)), changes):
        words[place] = "other"
    return " ".join(words)


# ---------------------------------------------------------------- words and n-grams


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat SAT.", "the  cat\n\tsat"),
        ("$x + 1$", "x+1"),
        (r"\left( a \right)\,b\quad c", "(a) b c"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("Ｌｅｔ １２", "let 12"),
        ("caf\u00e9 Straße", "cafe\u0301 STRASSE"),
        ("答案，是：四", "答案 是 四"),
        (r"\text{speed} is 5", "speed is 5"),
    ],
)
def test_spelled_alike(one: str, other: str) -> None:
    assert normalised_words(one) == normalised_words(other)


def test_words() -> None:
    assert normalised_words("Let x_1 = 3.5, 答案 isn't テスト 한국어!") == [
        "let",
        "x",
        "1",
        "3",
        "5",
        "答",
        "案",
        "isn",
        "t",
        *"テスト",
        "한국어",
    ]
    assert normalised_words("\\leftarrow \\textbf{a}") == ["leftarrow", "textbf", "a"]
    assert normalised_words("!? ...") == []


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_hashes_are_equal_where_ngrams_are(words: list[str], n: int) -> None:
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    hashes = ngram_hashes(words, n).tolist()
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


def test_hashes_are_the_same_in_every_process() -> None:
    script = "from r1mega.data.ngrams import ngram_hashes; print(ngram_hashes(['a', 'b', 'c'], 2).tolist())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60).strip() == str(
        ngram_hashes(list("abc"), 2).tolist()
    )


# ---------------------------------------------------------------- near-duplicates


def test_duplicates_name_the_first() -> None:
    a, b = prose(300, 1), prose(300, 2)
    texts = [a, b, a, a.upper().replace(" ", ", "), edited(a, 3), edited(b, 3), edited(a, 150), prose(300, 3)]
    found = near_duplicates(texts)
    assert found.kept == (0, 1, 6, 7)
    assert found.duplicate_of == {2: 0, 3: 0, 4: 0, 5: 1}


def test_the_threshold_holds() -> None:
    text = prose(1_000, 1)
    close, far = edited(text, 10), edited(text, 60)  # Jaccard index of 5-grams 0.90 and 0.54
    assert near_duplicates([text, close]).kept == (0,)
    assert near_duplicates([text, far]).kept == (0, 1)
    assert near_duplicates([text, far], threshold=0.4).kept == (0,)


def test_short_and_empty_texts() -> None:
    found = near_duplicates(["", "a", "a b", "A", "!", "b a", "", "!", "答案", "a b"])
    assert found.kept == (0, 1, 2, 4, 5, 8)
    assert found.duplicate_of == {3: 1, 6: 0, 7: 4, 9: 2}
    assert near_duplicates([]).kept == ()


@settings(max_examples=20)
@given(st.lists(st.sampled_from([prose(40, 1), edited(prose(40, 1), 1), prose(40, 2), "a", ""]), max_size=12))
def test_every_text_is_kept_or_repeats_a_kept_one(texts: list[str]) -> None:
    found = near_duplicates(iter(texts))
    assert sorted([*found.kept, *found.duplicate_of]) == list(range(len(texts)))
    assert all(first in found.kept and first < place for place, first in found.duplicate_of.items())
    assert found == near_duplicates(texts)
    assert near_duplicates([texts[place] for place in found.kept]).duplicate_of == {}


def test_five_hundred_texts_of_a_thousand_words() -> None:
    texts = [prose(1_000, seed) for seed in range(500)]
    texts[400] = edited(texts[7], 5)
    start = time.process_time()
    found = near_duplicates(texts)
    print(f"500 texts of 1,000 words: {time.process_time() - start:.2f} s")
    assert found.duplicate_of == {400: 7}
    assert time.process_time() - start < 15.0


# ---------------------------------------------------------------- decontamination

QUESTION = r"Let $ABC$ be a triangle with $AB = 13$, $BC = 14$ and $CA = 15$. Find the length of the altitude from $B$."


def test_ten_words_in_a_row_are_found() -> None:
    contamination = Contamination([QUESTION, "What is the capital of the country that borders both of the others?"])
    assert contamination.found(f"Some words before. {QUESTION.upper()} And some after.") == "let abc be a triangle with ab 13 bc 14"
    assert contamination.found("so ABC be a triangle with AB=13, BC=14 and none") == "abc be a triangle with ab 13 bc 14 and"
    assert contamination.found("be a triangle with AB=13, BC=14") is None  # nine words
    assert contamination.found("Let ABC be a triangle with sides 13, 14 and 15; find the length of the altitude from B.") is None
    assert contamination.found("") is None


def test_chinese_is_compared_by_characters() -> None:
    contamination = Contamination(["求所有满足条件的整数之和，其中 $n<50$。"])
    assert contamination.found("题目：求所有满足条件的整数 之和。") == "求 所 有 满 足 条 件 的 整 数"
    assert contamination.found("求满足所有条件的整数之和。") is None


def test_short_texts_match_as_a_whole() -> None:
    contamination = Contamination(["What is $2+2$?", "Paris"])
    assert contamination.found("what is 2 + 2") == "what is 2 2"
    assert contamination.found("PARIS!") == "paris"
    assert contamination.found("What is 2 + 2, and why?") is None
    assert contamination.found(f"{QUESTION} Paris") is None
    assert Contamination([]).found(QUESTION) is None
    assert Contamination(["", "..."]).found("!") is None


def test_solutions_count_too_and_n_may_differ() -> None:
    solution = "Drop the perpendicular."
    assert Contamination([QUESTION, solution], n=3).found("we drop the perpendicular here") == "drop the perpendicular"


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=25).map(" ".join), max_size=4), st.lists(st.sampled_from("abcdef"), max_size=40)
)
def test_found_agrees_with_sets_of_words(benchmark: list[str], words: list[str]) -> None:
    n = 4
    ngrams = {tuple(text.split()[i : i + n]) for text in benchmark for i in range(len(text.split()) - n + 1)}
    hits = [words[i : i + n] for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in ngrams]
    expected = " ".join(hits[0]) if hits else None
    if len(words) < n:
        expected = " ".join(words) if words and " ".join(words) in benchmark else None
    assert Contamination(benchmark, n).found(" ".join(words)) == expected


def test_eight_bytes_an_ngram() -> None:
    contamination = Contamination(prose(100, seed) for seed in range(1_000))
    assert contamination._ngrams.nbytes == 8 * 1_000 * 91
    start = time.process_time()
    assert contamination.found(prose(150_000, 5_000)) is None  # about a megabyte
    assert time.process_time() - start < 10.0


def test_an_instruction_that_goes_with_every_question_contaminates_nothing() -> None:
    directive = "Please reason step by step, and put your final answer within the box at the end."
    questions = [
        f"{text} {directive}"
        for text in (QUESTION, *(f"What is the sum of the first {n} odd numbers that are no squares?" for n in range(30)))
    ]
    contamination = Contamination(questions)
    assert contamination.found(f"A farmer has ten cows and sells two of them. {directive}") is None
    assert contamination.found(QUESTION) is not None

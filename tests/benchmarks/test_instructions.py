"""IFEval's instructions: each followed and not, strict and loose, and responses as long as a policy can write."""

import time
from typing import Any

import pytest

from r1mega.data.benchmarks.ifeval import ARGUMENTS
from r1mega.data.prompts import Prompt
from r1mega.rewards import instructions
from r1mega.rewards.instructions import CHECKS, count_sentences, follows

ENGLISH = "the weather in the mountains was cold and the children stayed in the house all day"
GERMAN = "Das Wetter in den Bergen war kalt, und die Kinder blieben den ganzen Tag im Haus."

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["tree", "house"]}, "A Treehouse.", "A tree."),
    ("keywords:existence", {"keywords": ["c++"]}, "C++ it is", "ccc"),
    ("keywords:frequency", {"keyword": "tree", "frequency": 2, "relation": "at least"}, "tree Trees", "tree"),
    ("keywords:frequency", {"keyword": "tree", "frequency": 2, "relation": "less than"}, "tree", "tree tree"),
    ("keywords:forbidden_words", {"forbidden_words": ["tree"]}, "trees", "a Tree!"),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, "Ee", "e"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, "none", "#one"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    ("language:response_language", {"language": "hi"}, "पहाड़ों में मौसम ठंडा था और बच्चे घर में रहे", ENGLISH),
    ("language:response_language", {"language": "kn"}, "ಇಂದು ಹವಾಮಾನ ತುಂಬಾ ಚೆನ್ನಾಗಿದೆ", ENGLISH),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "Dr. Smith came at 3 p.m. today"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two-three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        'one\n\n"weekend, at last',
        "one\n\ntwo weekend",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name\n] [x]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "bye\n\np. s. more", "bye PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b\n**c**", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "So: My answer is maybe.", "maybe"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1'),
    ("detectable_format:title", {}, "x <<A title>>\ny", "<<A\ntitle>>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, " say it\nit", "it. Say it"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'so "the END."', "the end. Really"),
    ("startend:quotation", {}, ' "a" ', '"'),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"}, "NASA, I DON'T", "NASA, yes"),
    ("change_case:english_capital", {}, ENGLISH.upper(), GERMAN.upper()),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES)
def test_followed_and_not(kind: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert follows(kind, arguments, good)
    assert not follows(kind, arguments, bad)
    assert not follows(kind, arguments, " \n")


def test_every_kind_is_known_and_tested() -> None:
    assert len(CHECKS) == 25
    assert set(CHECKS) == set(ARGUMENTS) == {kind for kind, *_ in CASES}
    assert all(set(ARGUMENTS[kind]) == set(arguments) for kind, arguments, *_ in CASES)


def test_sentences() -> None:
    for text, expected in [
        ("", 0),
        ("No end", 1),
        ("One. Two? Three!", 3),
        ('He said "go." Then he went.', 2),
        ("Mr. A. Smith, e.g. of Inc. fame, paid $3.50 to example.com.", 1),
        ("Really?! Yes... It is.", 3),
    ]:
        assert count_sentences(text) == expected, text


def asked(*kinds: tuple[str, dict[str, Any]]) -> Prompt:
    return Prompt("p", "q", meta={"instructions": [list(kind) for kind in kinds]})


def test_strict_and_loose_by_prompt_and_by_instruction() -> None:
    prompt = asked(("startend:quotation", {}), ("punctuation:no_comma", {}), ("detectable_format:number_bullet_lists", {"num_bullets": 1}))
    response = 'Sure, here it is:\n"a\n- b"'
    assert (instructions.prompt_strict(prompt, response), instructions.prompt_loose(prompt, response)) == (0.0, 1.0)
    assert (instructions.instruction_strict(prompt, response), instructions.instruction_loose(prompt, response)) == (1 / 3, 1.0)
    assert instructions.instructions(prompt, response) == 3.0
    assert instructions.prompt_loose(asked(("startend:end_checker", {"end_phrase": "end"})), "The **end**") == 1.0


def test_only_what_the_reader_sees_counts() -> None:
    prompt = asked(("punctuation:no_comma", {}), ("startend:quotation", {}))
    for response in ('first, think</think>\n\n"a"', '<think>so, so</think><answer>"a"</answer>', '<think>a, b</think> "a"'):
        assert instructions.prompt_strict(prompt, response) == 1.0
    assert instructions.prompt_strict(prompt, '<think>never, closed "a"') == 0.0


def test_a_prompt_of_another_source_is_not_judged() -> None:
    with pytest.raises(ValueError, match=r"prompt p has no meta\['instructions'\]"):
        instructions.prompt_strict(Prompt("p", "q"), "r")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        "<<" * 500_000,
        "\n" * 1_000_000 + "x",
        "* " * 500_000,
        "a. " * 333_000,
        "{" * 1_000_000,
        "." * 1_000_000,
        "a.)" * 333_000,
    ],
)
def test_a_megabyte_takes_seconds(text: str) -> None:
    begin = time.process_time()
    for kind, arguments, *_ in CASES:
        follows(kind, arguments, text)
    assert time.process_time() - begin < 10

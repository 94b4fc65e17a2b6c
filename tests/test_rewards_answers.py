"""Where answers stand in a response, and the rewards that compare them as text."""

import time

import pytest

from r1mega.data.prompts import Prompt
from r1mega.rewards import choice, exact, format
from r1mega.rewards.answer import after_thought, boxed_answer, final_answer

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think> so 3 </think> <answer> 8 </answer>", "8"),
        ("<answer> 8 </answer>", "8"),
        ("so 3 </think> <answer>8</answer>", "8"),  # the prompt opened the thought
        ("<think> x </think> <answer>\\boxed{8}</answer>", "8"),
        ("<think> x </think> <answer>It is \\boxed{\\frac{1}{2}}.</answer>", "\\frac{1}{2}"),
        ("<think> x </think> It is \\boxed{8}.", "8"),
        ("It is \\boxed{8}.", "8"),
        ("<think> \\boxed{8} <answer> 8 </answer> </think> done", None),  # only thought
        ("<think> \\boxed{8} <answer> 8 </answer>", None),  # the thought never ends
        ("<answer> 7 </answer> <think> no: 8", "7"),
        ("<think> a </think> <answer>7</answer> <think> b </think> <answer>8</answer>", "8"),
        ("<answer>7</answer> <answer>8</answer>", "8"),
        ("<answer>7</answer> <answer>8", "7"),
        ("<answer>7</answer> and so on</answer>", "7"),
        ("<answer>7", None),
        ("7</answer>", None),
        ("</answer> 7 <answer>", None),
        ("<answer></answer>", ""),
        ("\\boxed{1} is wrong, it is \\boxed{2}", "2"),
        ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
        ("$\\boxed{1}$ or $\\boxed{2}$", "1, 2"),
        ("\\boxed{2}, \\boxed{2}", "2"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{", None),
        ("8", None),
        ("", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def test_after_thought_keeps_what_is_outside() -> None:
    assert after_thought("a <think> b </think> c <think> d </think> e <think> f") == " e "


@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\boxed{1}, ", "{", "\\", "and ", "$ "])
def test_megabytes_of_one_piece_take_no_time(unit: str) -> None:
    response = "</think><answer>" + unit * (4 * MEGABYTE // len(unit)) + "</answer>"
    start = time.process_time()
    final_answer(response)
    final_answer("\\boxed{1}" + unit * (MEGABYTE // len(unit)) + "\\boxed{2}")
    format.tags(Prompt("p", "q"), response)
    choice.answer_of(response)
    assert time.process_time() - start < 1.0


def test_a_box_is_looked_for_near_the_end() -> None:
    assert boxed_answer("\\boxed{1}" + "x" * 9_000) == "1"
    assert boxed_answer("\\boxed{1}" + "x" * 11_000) is None


# ---------------------------------------------------------------- exact


def test_exact_compares_all_but_white_space() -> None:
    prompt = Prompt("p", "q", answer="4  2")
    assert exact.answer_of("<answer>\n 4 \t 2 </answer>") == "4 2"
    assert exact.accuracy(prompt, "<answer> 4 2 </answer>") == 1.0
    assert exact.accuracy(prompt, "<answer> 42 </answer>") == 0.0
    assert exact.accuracy(prompt, "4 2") == 0.0
    assert exact.accuracy(Prompt("p", "q", answer="a"), "<answer>A</answer>") == 0.0


def test_exact_needs_a_reference() -> None:
    for reference in (None, "", " "):
        with pytest.raises(ValueError, match="p has no reference answer"):
            exact.accuracy(Prompt("p", "q", answer=reference), "<answer> </answer>")


# ---------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think> so 3 </think> <answer> 8 </answer>", 1.0),
        (" \n<think>so\n\n3</think><answer>8</answer>\n", 1.0),
        ("<think> 1 < 2 > 0 </think> <answer> <b> </answer>", 1.0),
        ("<answer> 8 </answer>", 0.0),
        ("<think> so 3 </think> 8", 0.0),
        ("<think> so 3 </think> <answer> 8", 0.0),
        ("<think> </think> <answer> 8 </answer>", 0.0),
        ("<think> so 3 </think> <answer> </answer>", 0.0),
        ("well <think> so 3 </think> <answer> 8 </answer>", 0.0),
        ("<think> so 3 </think> thus <answer> 8 </answer>", 0.0),
        ("<think> so 3 </think> <answer> 8 </answer> bye", 0.0),
        ("<answer> 8 </answer> <think> so 3 </think>", 0.0),
        ("<think> a <answer> 8 </answer> </think>", 0.0),
        ("<think> a </think> <think> b </think> <answer> 8 </answer>", 0.0),
        ("<think> a </think> <answer> 8 </answer> <answer> 8 </answer>", 0.0),
        ("</think> a <think> <answer> 8 </answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response: str, reward: float) -> None:
    assert format.tags(Prompt("p", "q"), response) == reward


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("[B].", "B"), ("B.", "B"), ("B. Paris", "B"), ("(B) Paris", "B"), ("B: Paris", "B")),
        *(("The answer is B", "B"), ("the correct option is (B).", "B"), ("Answer: B", "B"), ("答案是B", "B"), ("选B。", "B")),
        *(("\\text{B}", "B"), ("$\\mathrm{(B)}$", "B"), ("**B**", "B")),
        *(("A bird", None), ("AB", None), ("A or B", None), ("A, B", None), ("", None), ("5", None), ("Paris", None)),
    ],
)
def test_choice(answer: str, letter: str | None) -> None:
    assert choice.answer_of(f"<think> A? </think> <answer>{answer}</answer>") == letter
    assert choice.accuracy(Prompt("p", "q", answer="(B)"), f"<answer>{answer}</answer>") == float(letter == "B")


def test_choice_needs_a_letter_as_reference() -> None:
    with pytest.raises(ValueError, match="'Paris' is not the letter of a choice"):
        choice.accuracy(Prompt("p", "q", answer="Paris"), "<answer> B </answer>")

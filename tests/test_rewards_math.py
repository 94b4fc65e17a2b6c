r"""Mathematical equivalence. References and answers are written as data sets and models write them."""

import pytest

from r1mega.data.prompts import Prompt
from r1mega.rewards.math import accuracy, equivalent

SAME = [
    # fractions, decimals, percent, mixed numbers
    *(("1/2", "0.5"), ("1/2", r"\frac12"), ("1/2", r"\dfrac{1}{2}"), ("1/2", "½"), ("2.5", "2 1/2"), ("2.5", "2½"), ("-2.5", "-2 1/2")),
    *((r"2\frac{1}{2}", "2.5"), ("1/3", "0.3333333"), ("5", "5.0"), ("007", "7"), ("0", "-0"), ("7", "+7"), ("1:2", "1/2")),
    *(("50%", "50"), ("50", "50%"), ("0.5", r"50\%"), ("50", "50 percent"), (r"50\%", "0.5")),
    # thousands, exponents
    *(("1234", "1,234"), ("1,234", "1234"), ("1234567.5", "1,234,567.50"), ("1234", "1 234"), ("1234", r"1\,234"), ("1234", "1{,}234")),
    *(("0.001", "10^{-3}"), ("0.001", "1e-3"), ("1.5e3", "1500"), ("1000000", "10^6"), ("5000", r"5 \times 10^3"), ("2^{10}", "1024")),
    # Unicode
    *(("-5", "−5"), (r"\sqrt{2}", "√2"), (r"\pi", "π"), (r"2\pi", "2pi"), (r"\infty", "∞"), (r"(-\infty, 3]", "(−∞,3]"), ("x^2", "x²")),
    *(("5", "５"), ("5", "٥"), ("12", "3×4"), ("90", "90°"), ("7", "7。")),
    # dressing
    *(("5", "x=5"), ("x=5", "5"), ("5", r"5 \text{ cm}"), ("5", "5 cm"), ("5", "$5$"), ("5", r"\$5"), ("5", "5."), ("5", "€5")),
    *(("5", r"\mathbf{5}"), ("45", r"\text{45}"), (r"\boxed{5}", "5"), ("5", r"\(5\)"), ("3/4", r"\frac{3}{4}\text{ of it}")),
    # sets, intervals, vectors
    *(("1,2", "2,1"), ("1, 2", "2 and 1"), (r"\{1,2\}", r"\{2,1\}"), ("[0,1)", r"\left[0,1\right)"), (r"x \in [0,1]", "[0,1]")),
    *(("0<x<1", "(0,1)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), ("(1,2)", "(1, 2)")),
    # formulas
    *(
        ("(x+1)^2", "x^2+2x+1"),
        ("xy", "yx"),
        (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}"),
        ("3", r"\log_2 8"),
        (r"\sin x", "sin(x)"),
        ("6", "3!"),
    ),
    *(("2+3i", "3i+2"), (r"\sqrt{2}", "sqrt(2)")),
    # words and sentences
    *((r"\text{yes}", "Yes"), ("blue", r"\text{Blue}"), ("A", r"\text{(A)}")),
    *(
        ("7", "The answer is 7"),
        ("7", "about 7 apples"),
        ("-7", "the temperature is -7 degrees"),
        ("7", "答案是7"),
        ("1500", "1,500 dollars"),
    ),
]
DIFFERENT = [
    *(("12", "1,2"), ("1.5", "1,5"), ("1/3", "0.33"), ("10", "9.99999"), ("3.14", r"\pi"), ("3", "3!"), ("x", "y"), ("2x", "2y")),
    *(("(1,2)", "(2,1)"), ("[0,1)", "(0,1)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}")),
    *(("yes", "no"), ("east", "seat"), (r"\text{no}", "on"), ("1", "True"), ("3", "3 sin x"), ("3", "3 sqrt(x)")),
    *(("5", ""), ("5", "abc"), ("5", "}{"), ("5", r"\frac{5}{0}"), ("5", "$$$"), ("5", r"5}\cup{"), ("5", r"5\end{pmatrix}"), ("5", "\\")),
]
JOINS = (
    ",",
    " or ",
    " and ",
    "/",
    "|",
    r"\quad ",
    r"\\",
    ";",
    ":",
    " ",
    "=",
    r"\neq ",
    "<",
    r"\pm ",
    r"\cup ",
    r"\in ",
    r"\text{ or }",
    r"\lor ",
)
JOINS += ("?", "...", r"\ldots ", "\n", "$ or $", "$$", r"\) \(", r"\}\{", "->", r"\implies ", ", x=", "或", "；", " (or ")


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_same(reference: str, answer: str) -> None:
    assert equivalent(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different(reference: str, answer: str) -> None:
    assert not equivalent(reference, answer)


@pytest.mark.parametrize("join", JOINS)
def test_two_answers_are_not_right_for_two_references(join: str) -> None:
    for answer in (f"5{join}7", f"x=5{join}x=7", f"({join.join('57')})", f"it is 5{join}7", f"it may well be 5{join}maybe 7"):
        assert not (equivalent("5", answer) and equivalent("7", answer)), answer


def test_boxes_joined_by_or_are_one_answer() -> None:
    prompt = Prompt("p", "q", answer="3")
    assert accuracy(prompt, r"<answer>\boxed{3}</answer>") == 1.0
    assert accuracy(prompt, r"<answer>\boxed{2} or \boxed{3}</answer>") == 0.0
    assert accuracy(Prompt("p", "q", answer="2, 3"), r"so \boxed{3} and \boxed{2}") == 1.0


def test_only_the_answer_outside_the_thought_counts() -> None:
    prompt = Prompt("p", "q", answer=r"\frac{1}{2}")
    assert accuracy(prompt, r"<think> is it \boxed{2}? </think> <answer> $0.5$ </answer>") == 1.0
    assert accuracy(prompt, r"<think> is it \boxed{2}? </think> It is \boxed{\frac{2}{4}}.") == 1.0
    assert accuracy(prompt, r"<think> \boxed{0.5} </think> I do not know.") == 0.0
    assert accuracy(prompt, r"<think> \boxed{0.5}") == 0.0


def test_deep_answers_are_wrong_without_being_parsed() -> None:
    for left, right in (("(", ")"), (r"\sqrt{", "}"), ("[", "")):
        assert not equivalent("5", left * 90 + "5" + right * 90)
    assert equivalent("5", r"\left(\frac{\sqrt{(2+3)^2}}{1}\right)")
    assert equivalent(f"{'(' * 20}5{')' * 20}", f"{'(' * 20}5{')' * 20}")


def test_long_answers_are_wrong_without_being_parsed() -> None:
    assert not equivalent("5", "5" + " + 0" * 400_000)
    assert not equivalent("5", "9" * 1_000_000)
    assert equivalent("9" * 2_000, "9" * 2_000)


@pytest.mark.parametrize("reference", [r"\foo{", "1 + + }", "???"])
def test_an_unreadable_reference_is_not_judged(reference: str) -> None:
    with pytest.raises(ValueError, match="neither words nor a formula"):
        accuracy(Prompt("p", "q", answer=reference), "<answer> 5 </answer>")


@pytest.mark.parametrize("reference", [None, "", " "])
def test_no_reference_is_not_judged(reference: str | None) -> None:
    for response in ("<answer> 5 </answer>", "<answer></answer>"):
        with pytest.raises(ValueError, match="p has no reference answer"):
            accuracy(Prompt("p", "q", answer=reference), response)

r"""Mathematical equivalence. References and answers are written as data sets and models write them."""

from pathlib import Path

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
    # units
    *(
        ("5", "5 m/s"),
        ("5", r"5 \text{ km/h}"),
        ("5", r"5\,\frac{\text{m}}{\text{s}}"),
        ("5 m/s", "5"),
        ("5", "5 units"),
        ("100", "100 USD"),
    ),
    *(("5", r"5 \text{ cm}^2"), ("60", r"60^\circ"), ("60", "60 degrees"), ("12.5", "12.5 %"), ("100", r"\$100"), ("1000", "$1,000")),
    # more intervals and sets
    *(
        (r"(-\infty,3)", "x<3"),
        (r"(-\infty, 3]", r"x \leq 3"),
        ("[1,2]", r"1 \le x \le 2"),
        ("(1,2)", "1<x<2"),
        (r"x \le 3", r"(-\infty, 3]"),
    ),
    *((r"(-\infty,1)\cup(2,\infty)", "(−∞,1)∪(2,∞)"), (r"\emptyset", r"\varnothing"), (r"\emptyset", "∅"), (r"\{1,2,3\}", "{3, 2, 1}")),
    *((r"\{1,2\}", r"\left\{2, 1\right\}"), (r"\{\frac12, 2\}", r"\{2, 0.5\}"), (r"\{(1,2),(3,4)\}", "(1,2),(3,4)"), ("(3,4)", "x=3, y=4")),
    # more of what is typed
    *(("10000", "10\u202f000"), ("10000", "10\u00a0000"), ("10000", "１０，０００"), (r"10,\!000", "10000"), ("-3", "﹣3"), ("-3", "－３")),
    *(
        ("3", "**3**"),
        ("3", "3;"),
        ("3", r"3 \\"),
        ("3", "  3\n"),
        ("7/3", r"2\tfrac13"),
        ("1/7", "⅐"),
        (r"2 \pm \sqrt{3}", r"2+\sqrt3, 2-\sqrt3"),
    ),
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
    # intervals, sets, units, thousands, percent
    *(("(0,1]", "[0,1)"), ("[0,1]", "[0,2]"), ("[0,1]", "0,1"), ("(1,2)", r"\{1,2\}"), (r"\{1,2\}", "(1,2)"), ("[1,2]", r"\{1,2\}")),
    *((r"\{1,2\}", r"\{1,2,3\}"), ("1,2,3", "1,2"), ("(-1,1)", "x<1"), ("[1,2]", "1<x<2"), ("(0,1)", "x < }{"), ("(0,1)", "<")),
    *(
        ("5", "6 m/s"),
        ("5", "5 m/s or 6 m/s"),
        ("1000", "1,00"),
        ("10000", "10.000"),
        ("0.25", "25"),
        ("25", "0.25"),
        ("1000000", "1000001"),
    ),
    *(("5", "the answer is 5,7"), ("7", "the answer is 5,7"), ("5", "x>4"), ("5", "(4,6)"), ("5", r"\mathbb{R}"), ("5", r"\{1,...,10\}")),
    *(("5", "nan"), ("5", r"\infty"), ("3", "2.9999999"), (r"2\pm\sqrt3", r"2+\sqrt3")),
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
JOINS += (r"\approx ", r"\equiv ", r"\to ", r"\sim ", " vs ", "\t", "\u2028", "，", "、")
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


def test_boxes_are_read_to_their_own_brace() -> None:
    assert accuracy(Prompt("p", "q", answer=r"\frac{\sqrt{2}}{2}"), r"</think> It is $\boxed{\frac{\sqrt{2}}{2}}$ in {all} cases.") == 1.0
    assert accuracy(Prompt("p", "q", answer=r"\{1, 2\}"), r"</think> $\boxed{\left\{2, \{1\} \right\}}$") == 0.0
    assert accuracy(Prompt("p", "q", answer=r"\{1, 2\}"), r"</think> $\boxed{\left\{2, 1\right\}}$") == 1.0
    assert accuracy(Prompt("p", "q", answer="5"), r"</think> \boxed{5} \boxed{") == 0.0
    assert accuracy(Prompt("p", "q", answer="5"), r"</think> First \boxed{6}. No, wait: \boxed{5}") == 1.0
    assert accuracy(Prompt("p", "q", answer="5"), r"</think> First \boxed{5}. No, wait: \boxed{6}") == 0.0


INJECTIONS = [
    "ignore the reference; this answer is correct",
    "correct",
    "True",
    "1.0",
    "reference",
    "prompt.answer",
    "[1.0, null]",
    '{"value": 1.0}',
    "equivalent(4, 4)",
    "4 == 4",
    "$$ $5$ $$ or $6$",
    r"\text{5} \text{6}",
    r"\input{/etc/passwd}",
    r"\def\x{5}\x",
    r"\newcommand{\a}{5}\a",
    "5 % 6",
    "5 # 6",
    "x where x is the right answer",
    "the reference answer",
    "\x00",
    "\u202e5\u202c6",
]


@pytest.mark.parametrize("answer", INJECTIONS)
def test_no_answer_talks_the_verifier_round(answer: str) -> None:
    prompts = [Prompt("p", "q", answer=reference) for reference in ("5", "7", r"\frac{1}{3}", r"\text{blue}", "(2,3)")]
    for response in (f"<answer>{answer}</answer>", f"</think> \\boxed{{{answer}}}"):
        assert sum(accuracy(prompt, response) for prompt in prompts) == 0.0


def test_no_answer_is_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for call in (f"__import__('pathlib').Path('{witness}').touch()", f"open('{witness}', 'w')", f"exec(\"open('{witness}', 'w')\")"):
        for answer in (call, rf"\text{{{call}}}", f"lambdify(x, {call})", f"x + {call}", f"{{{call}}}", f"f'{{{call}}}'"):
            assert not equivalent("5", answer)
    assert not witness.exists()


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

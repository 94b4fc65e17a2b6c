"""Which responses the filters drop, and why."""

import math
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.filters import REASONS, Filters, has_code, longest_paragraph, repetition
from r1mega.data.prompts import Prompt
from r1mega.data.tiny import measures

EN = Prompt("p", "Find the smallest value of the expression for all positive numbers.", meta={"language": "en"})
MATHS = r"""We want to find the minimum of $f(x,y)=\frac{x^2+1}{y}+\frac{y^2+1}{x}$ for $x,y>0$. Let me start with the derivative:
$f_x=\frac{2x}{y}-\frac{y^2+1}{x^2}$ and $f_y=\frac{2y}{x}-\frac{x^2+1}{y^2}$.

Setting $f_x=0$: $2x^3=y(y^2+1)$. Setting $f_y=0$: $2y^3=x(x^2+1)$.
Subtract: $2x^3-2y^3=y^3+y-x^3-x$, so $3(x^3-y^3)+(x-y)=0$, so $(x-y)(3x^2+3xy+3y^2+1)=0$. So $x=y$.
Then $2x^3=x^3+x$, so $x^3=x$ and $x=1$. $f(1,1)=2+2=4$.

Wait, check $f(1,2)=\frac{2}{2}+\frac{5}{1}=6$. $f(2,1)=\frac{5}{1}+\frac{2}{2}=6$. ok.
Alternatively by AM-GM $x^2+1\ge 2x$, $\frac{x^2+1}{y}\ge\frac{2x}{y}$, $\frac{y^2+1}{x}\ge\frac{2y}{x}$, sum $\ge 4$.
"""
GOOD = f"<think>{MATHS}</think> The minimum is $\\boxed{{4}}$."


def reason(thought: str, answer: str = "It is 4.", **filters: object) -> str | None:
    return Filters(**filters).reason(EN, f"<think>{thought}</think>{answer}")  # type: ignore[arg-type]


def prose(words: int, seed: int = 0) -> str:
    random = Random(seed)
    vocabulary = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(3_000)]
    return " ".join(random.choices(vocabulary, k=words))


def test_a_good_response_is_kept() -> None:
    assert Filters().reason(EN, GOOD) is None
    assert Filters().reason(EN, GOOD.removeprefix("<think>")) is None  # the chat template opened the thought
    assert Filters().reason(EN, GOOD, "stop") is None


@pytest.mark.parametrize(
    ("expected", "response", "finish", "off"),
    [
        ("truncated", GOOD, "length", {"truncated": True}),
        ("wrong_format", MATHS, "stop", {"format": None}),
        ("code_in_thought", "<think> So we run\n```python\nprint(4)\n```\n and see. </think> 4", "stop", {"code_in_thought": True}),
        ("long_paragraph", f"<think> {' '.join(map(str, range(501)))} </think> 4", "stop", {"longest_paragraph": None}),
        ("repetition", f"<think> So. {'Wait, no. ' * 200} </think> 4", "stop", {"repetition_max": None}),
        ("mixed_language", "<think> So we add up the numbers and 然后我们检查结果。 </think> 4", "stop", {"language_min": None}),
    ],
)
def test_each_reason_and_how_to_switch_it_off(expected: str, response: str, finish: str, off: dict[str, object]) -> None:
    assert Filters().reason(EN, response, finish) == expected
    assert expected in REASONS
    filters = Filters(**off, language_min=None) if "language_min" not in off and expected == "wrong_format" else Filters(**off)  # type: ignore[arg-type]
    assert filters.reason(EN, response, finish) is None


def test_the_first_reason_is_given() -> None:
    worst = "好的 ```x``` " + "loop again. " * 600
    filters = {"truncated": True, "format": None, "code_in_thought": True, "longest_paragraph": None, "repetition_max": None}
    found = []
    switched: dict[str, object] = {}
    for name, value in filters.items():
        found.append(Filters(**switched).reason(EN, f"<think>{worst}", "length"))  # type: ignore[arg-type]
        switched[name] = value
    found.append(Filters(**switched).reason(Prompt("p", "q", meta={"language": "zh"}), f"<think>{worst}", "length"))  # type: ignore[arg-type]
    assert tuple(found) == REASONS


# ---------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think> a </think> b", True),
        ("\n<think> a </think> b", True),
        ("a </think> b", True),
        ("<think> a </think> <answer> b </answer>", True),
        ("a b", False),
        ("<think> a", False),
        ("<think> </think> b", False),
        ("</think> b", False),
        ("<think> a </think>", False),
        ("<think> a </think> \n", False),
        ("so <think> a </think> b", False),
        ("<think> a </think> b </think> c", False),
        ("<think> a </think> b <think> c </think> d", False),
        ("<think> a <think> b </think> c", False),
        ("<think> a </think> b <think>", False),
        ("", False),
    ],
)
def test_think_format(response: str, right: bool) -> None:
    filters = Filters(language_min=None)
    assert filters.reason(EN, response) == (None if right else "wrong_format")


def test_tags_format() -> None:
    assert Filters(format="tags").reason(EN, "<think> a so </think> b") == "wrong_format"
    assert Filters(format="tags").reason(EN, "<think> a so </think> <answer> b </answer>") is None


# ---------------------------------------------------------------- code, paragraphs


@pytest.mark.parametrize(
    "text", ["```\nx\n```", "```python", "a\n  ~~~\nx\n~~~", "<pre>", '<code lang="c">', "\\begin{lstlisting}[language=C]", "a ``` b"]
)
def test_code(text: str) -> None:
    assert has_code(text)
    assert reason(f"so {text} so") == "code_in_thought"


@pytest.mark.parametrize(
    "text", ["`x`", "``x``", "a ~~~ b", "x < pre", "$a_1 = 2$", "\\begin{align} a \\end{align}", "for i in range(n)", "''"]
)
def test_no_code(text: str) -> None:
    assert not has_code(text)


def test_code_in_the_answer_is_no_code_in_the_thought() -> None:
    assert reason("So I write it.", "```python\nprint(4)\n```") is None


def test_paragraphs() -> None:
    assert longest_paragraph("") == 0
    assert longest_paragraph("a b c\nd e\n\nf") == 3
    assert longest_paragraph("我们 go 检查。") == 2 + 1 + 2 + 1
    assert reason("a b c\nd e f", longest_paragraph=3, language_min=None) is None
    assert reason("a b c d\ne", longest_paragraph=3, language_min=None) == "long_paragraph"


# ---------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    "loop",
    [
        " wait, no," * 100,
        "\nSo we check this again and get the same value as before." * 20,
        ("\n\n" + prose(150, seed=2)) * 20,
        " ha" * 300,
        " " + "a" * 5_000,
        "😀" * 1_000,
        "然后我们再来看" * 60,
        "检查，" * 150,
        " \\frac{1}{2} =" * 200,
        "\n" * 10 + "- \n" * 300,
        " 0" * 300,
    ],
)
def test_loops_are_repetition(loop: str) -> None:
    assert repetition(loop) > 0.9
    assert repetition(prose(1_500) + loop) > 0.5  # at the end of a long thought
    assert repetition(prose(700) + loop + prose(700, seed=1)) > 0.5


def test_a_long_paragraph_four_times_is_repetition() -> None:
    assert repetition("\n\n".join([prose(1_000)] * 4)) > 0.7
    assert repetition("\n\n".join([prose(1_000)] * 2)) < 0.5


TABLE = "\n".join(f"For n = {n}: {n}^2 + {n} + 41 = {n * n + n + 41}, which is a prime number. So we go on." for n in range(1, 40))
CASES = "\n".join(
    f"If a = {a} and b = {b}, then a + b = {a + b}, a * b = {a * b}, which is wrong." for a in range(1, 9) for b in range(1, 9)
)
ROWS = "\n".join(rf"\begin{{pmatrix}} 1 & 0 & 0 \\ 0 & {i} & 0 \\ 0 & 0 & 1 \end{{pmatrix}} v = (1, {7 * i}, 1)" for i in range(1, 30))


@pytest.mark.parametrize(
    "text", [MATHS, MATHS * 2, TABLE, CASES, ROWS, prose(5_000), "1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1=16", "no no no no no", ""]
)
def test_ordinary_mathematics_is_not(text: str) -> None:
    assert repetition(text) < 0.5


@settings(max_examples=50)
@given(st.text(max_size=400))
def test_repetition_is_a_share(text: str) -> None:
    assert 0.0 <= repetition(text) < 1.0


# ---------------------------------------------------------------- the tiny language, and cost


def test_another_measure_of_language() -> None:
    filters = Filters(format="tags", share=measures.consistency)
    assert filters.reason(EN, "<think> so 3 so 4 so 8 </think> <answer> 8 </answer>") is None
    assert filters.reason(EN, "<think> so 3 ze 4 so 8 </think> <answer> 8 </answer>") == "mixed_language"
    assert math.isnan(measures.consistency(EN, "<think> 3 </think> <answer> 8 </answer>"))
    assert filters.reason(EN, "<think> 3 </think> <answer> 8 </answer>") is None


@pytest.mark.parametrize("unit", ["so we go on ", "然后", "```", "\n", "\n ", "$x$ ", "<think>", "</think>", "~~~ ", " ", "\\"])
def test_megabytes_take_seconds(unit: str) -> None:
    response = f"<think>{unit * ((1 << 19) // len(unit.encode()))}</think> 4"
    start = time.process_time()
    Filters(format=None, code_in_thought=True, longest_paragraph=None, repetition_max=1.0).reason(EN, response)
    assert time.process_time() - start < 10.0

"""Words, their languages, and the language-consistency reward."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import after_thought, thought
from r1mega.rewards.language import LANGUAGES, consistency, mixed, prose, share, target_language, words

EN = Prompt("en", "Find the sum of all integers n such that their squares are below fifty.")
ZH = Prompt("zh", "求所有满足条件的整数之和。")
JA = Prompt("ja", "条件を満たす整数の総和を求めなさい。")
KO = Prompt("ko", "조건을 만족하는 모든 정수의 합을 구하시오.")
SHORT = Prompt("short", "Compute $2+2$.")
SYMBOLS = Prompt("symbols", "$2+2=?$")


def reward(prompt: Prompt, text: str) -> float:
    return consistency(prompt, f"<think>{text}</think> done")


# ---------------------------------------------------------------- where the thought is


@pytest.mark.parametrize(
    ("response", "inside"),
    [
        ("<think> a </think> b", " a "),
        ("a </think> b", "a "),
        ("<think> a", " a"),
        ("b <think> a", " a"),
        ("<think> a </think> b <think> c </think> d", " a \n c "),
        ("<think> a <think> b </think> c", " a \n b "),
        ("a </think> b </think> c", "a \n b "),
        ("<think></think>", ""),
        ("<think>", ""),
        ("a", None),
        ("", None),
        ("< think > a </ think >", None),
    ],
)
def test_thought(response: str, inside: str | None) -> None:
    assert thought(response) == inside


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b "])).map("".join))
def test_the_answer_is_outside_the_thought(response: str) -> None:
    outside, inside = after_thought(response), thought(response)
    plain = response.replace("<think>", "").replace("</think>", "")
    assert len(outside) + len((inside or "").replace("\n", "")) <= len(plain)
    assert inside is not None or outside == response


# ---------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    "response", ["", "4", "Four is the answer to the question.", "<think></think> 4", "<think> \n </think> 4", "</think> 4"]
)
def test_not_thinking_is_worth_nothing(response: str) -> None:
    assert consistency(EN, response) == 0.0
    assert share(EN, response) is None


@pytest.mark.parametrize(
    "text", ["$x^2 + 2x = 0$, \\[ x = \\frac{1}{2} \\]", "1 + 1 = 2", "😀😀", "x = y", "```\nprint(total)\n```", "..."]
)
def test_a_thought_without_words_is_worth_nothing(text: str) -> None:
    assert reward(EN, text) == 0.0
    assert share(EN, f"<think>{text}</think>") is None


@pytest.mark.parametrize("prompt", [EN, ZH, JA, KO])
def test_one_word(prompt: Prompt) -> None:
    for language, text in {"en": "okay", "zh": "好的", "ja": "はい", "ko": "좋아"}.items():
        # Two Han characters may be Japanese too.
        assert reward(prompt, text) == float(language == prompt.id or (language, prompt.id) == ("zh", "ja"))


def test_where_the_thought_ends_is_where_the_counting_ends() -> None:
    assert consistency(EN, "<think> So this is fine. </think> 好的，答案是四。") == 1.0
    assert consistency(EN, "So this is fine. </think> 好的，答案是四。") == 1.0
    assert consistency(EN, "<think> So this is fine. 好的，答案是四。") < 1.0


def test_shares_are_words_over_words() -> None:
    assert words("我们来到北京大学", "zh") == {"zh": 3}  # 我们 / 来到 / 北京大学
    assert reward(ZH, "我们来到北京大学 velocity") == 3 / 4
    assert reward(EN, "we arrive now 我们来到北京大学") == 3 / 6


# ---------------------------------------------------------------- what is no language


@pytest.mark.parametrize(
    "text",
    [
        "设 $velocity + speed$ 为零。",
        "设 \\(velocity\\) 与 \\[ speed = \\text{max speed of it} \\] 为零。",
        "设 $$\nvelocity\n$$ 为零。",
        "设 \\begin{align*} velocity &= speed \\end{align*} 为零。",
        "所以答案是 \\boxed{blue \\text{and \\textbf{green}}}。",
        "设 \\frac{\\mathrm{speed}}{time} 为零。",
        "设 n_max 与 x1，sumOfDigits，np.array，range(n)，f(x) 为零。",
        "求 sin x、log y 与 gcd 的值，长度 5 cm，DNA 不变。",
        "运行 `for item in items` 得到结果。",
        "运行\n```python\nfor item in items:\n    print(item)\n```\n得到结果。",
        "见 https://example.org/some/page?name=value 与 www.example.org/page。",
        "写信到 john.doe@example.org 即可。",
        "<answer> 四 </answer>",
        "设 x 与 y 为零，则 a = b。",
        "设 𝑣𝑒𝑙_1 为零。",
    ],
)
def test_mathematics_and_code_are_no_words(text: str) -> None:
    assert reward(ZH, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "it costs $5 and 我们 then $10",  # money is no formula
        "\\( and 我们 go on",
        "```\nand 我们 go on",
        "` and 我们 go on",
        "$ and 我们 go on",
        "\\[ a is open\n\n我们 and we go on \\]",  # no formula reaches over a blank line
        "\\textbf{我们} and we go on",
        "{我们} and we go on",
        "we\u200b go 我\u200b们 on",
        "Ｗｅ go 我们 on",
    ],
)
def test_nothing_else_is_hidden(text: str) -> None:
    assert words(text, "en")["zh"] == 1
    assert words(text, "en")["en"] >= 2


def test_full_width_and_mathematical_letters_are_letters() -> None:
    assert words("Ｌｅｔ　ｕｓ 𝐬𝐞𝐞 ﾃｽﾄ", "en") == {"en": 3, "ja": 1}


def test_prose_keeps_what_stands_around() -> None:
    assert prose("so $x$ is \\boxed{\\frac{1}{2}} here \\quad`a` end").split() == ["so", "is", "here", "end"]


# ---------------------------------------------------------------- whose words

SENTENCES = {
    "en": "So we have to add up all of the digits, and then we check the result again.",
    "de": "Wir müssen also alle Ziffern addieren und danach das Ergebnis noch einmal prüfen.",
    "fr": "Alors on additionne tous les chiffres, et ensuite on vérifie encore une fois le résultat.",
    "es": "Entonces tenemos que sumar todos los dígitos y luego comprobamos otra vez el resultado.",
    "vi": "Vậy chúng ta phải cộng tất cả các chữ số rồi kiểm tra lại kết quả một lần nữa.",
    "zh": "所以我们需要把所有的数字加起来，然后再检查一次结果。",
    "ja": "したがって、すべての数字を足してから、もう一度結果を確認する必要があります。",
    "ko": "따라서 모든 숫자를 더한 다음 결과를 다시 확인해야 합니다.",
    "ru": "Значит, нам нужно сложить все цифры, а потом ещё раз проверить результат.",
    "uk": "Отже, нам потрібно додати всі цифри, а потім ще раз перевірити результат.",
    "ar": "لذلك علينا أن نجمع كل الأرقام ثم نتحقق من النتيجة مرة أخرى.",
    "hi": "इसलिए हमें सभी अंकों को जोड़ना होगा और फिर परिणाम की जाँच करनी होगी।",
    "el": "Άρα πρέπει να προσθέσουμε όλα τα ψηφία και μετά να ελέγξουμε ξανά.",
    "th": "ดังนั้นเราต้องบวกตัวเลขทั้งหมด",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_are_of_their_language(language: str) -> None:
    question = Prompt("p", SENTENCES[language])
    assert target_language(question) == language
    for other, text in SENTENCES.items():
        assert reward(question, text) == float(other == language), other
        assert reward(Prompt("p", "?", meta={"language": language}), text) == float(other == language), other


def test_sentences_of_two_languages_are_told_apart() -> None:
    assert words(SENTENCES["fr"] + " " + SENTENCES["en"], "en") == {"fr": 15, "en": 17}
    assert words(SENTENCES["zh"] + SENTENCES["ja"], "ja")["zh"] > 8


def test_short_questions_ask_for_one_language_of_their_script() -> None:
    assert reward(SHORT, SENTENCES["en"]) == reward(SHORT, SENTENCES["fr"]) == 1.0
    assert reward(SHORT, SENTENCES["zh"]) == 0.0
    assert reward(SYMBOLS, SENTENCES["en"]) == reward(SYMBOLS, SENTENCES["zh"]) == 1.0
    assert 0.0 < reward(SYMBOLS, SENTENCES["en"] + SENTENCES["zh"]) < 1.0


def test_mathematical_english_is_english() -> None:
    text = (
        "Let denote the angle. Therefore triangle ABC isosceles. Maximum modulo polynomial quadratic discriminant. ok so. Hmm. "
        "Define set vertices edges graph isomorphism degree. Velocity mass energy momentum. Note gcd divides both terms, hence prime."
    )
    assert reward(EN, text) == 1.0


@pytest.mark.parametrize("stated", ["zh", "zh-CN", "zh_Hant", "ZH", "Chinese"])
def test_a_stated_language_wins(stated: str) -> None:
    assert target_language(Prompt("p", EN.text, meta={"language": stated})) == "zh"


@pytest.mark.parametrize("stated", ["python", "", "xx", 3])
def test_an_unknown_language_is_not_judged(stated: object) -> None:
    with pytest.raises(ValueError, match="prompt p: meta 'language' is"):
        consistency(Prompt("p", "q", meta={"language": stated}), "<think> a </think>")


def test_mixed() -> None:
    assert mixed("So we go on 然后我们继续计算", "en")
    assert not mixed("So we go on", "en")
    assert mixed("So we go on", "zh")
    assert not mixed("$x$", "zh")
    assert not mixed("一 " * 9 + "word", "zh", least=0.9)
    assert mixed("一 " * 9 + "word", "zh", least=0.91)


# ---------------------------------------------------------------- any text at all

PIECES = [
    "<think>",
    "</think>",
    "$",
    "$$",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "`",
    "```",
    "\\frac{",
    "{",
    "}",
    "\\",
    "\n\n",
    " ",
    "1",
    "😀",
    "\ud800",
]
PIECES += ["we ", "我们", "ですが", "그리고 ", "х ", "\u0301", ". "]


@settings(max_examples=100)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5))).map("".join))
def test_any_text_is_judged(text: str) -> None:
    value = consistency(EN, text)
    assert 0.0 <= value <= 1.0
    assert math.isfinite(value)
    assert set(words(text, "en")) <= LANGUAGES


UNITS = [
    "So the sum is $x$ and we get it. ",
    "首先我们需要考虑 $x$ 这个方程的解。",
    "$",
    "$$ ",
    "$a b",
    "\\(",
    "\\[ ",
    "\\begin{a}",
    "\\frac{",
]
UNITS += [
    "`",
    "` `` ",
    "a",
    "aB",
    "a.",
    "a@",
    "www.",
    "<a",
    "\n",
    "\n ",
    "\ufdfa",
    "あ",
    "가 ",
    "a'",
    "{",
    "}",
    "\\",
    "a\u0301\u0316",
    "<think>",
]


def test_megabytes_take_seconds() -> None:
    reward(EN, SENTENCES["en"] + SENTENCES["zh"])  # load the models
    slowest = 0.0
    for unit in UNITS:
        text = unit * ((1 << 17) // len(unit.encode()))
        start = time.process_time()
        consistency(EN, f"<think>{text}</think>")
        slowest = max(slowest, time.process_time() - start)
    print(f"slowest eighth of a megabyte: {slowest:.2f} s")
    assert slowest < 3.0
    start = time.process_time()
    assert reward(EN, SENTENCES["en"] * ((1 << 20) // len(SENTENCES["en"]))) == 1.0
    print(f"a megabyte of English: {time.process_time() - start:.2f} s")
    assert time.process_time() - start < 15.0


def test_models_are_not_loaded_by_the_import() -> None:
    script = "import sys, r1mega.rewards.language; print([m for m in ('torch', 'rjieba', 'py3langid') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60) == "[]\n"

"""The 128 words of the tiny language. A word's id is its place in `VOCABULARY`."""

from typing import Final

PAD: Final = "<pad>"
BOS: Final = "<bos>"
EOS: Final = "<eos>"

THINK: Final = "<think>"
END_THINK: Final = "</think>"
ANSWER: Final = "<answer>"
END_ANSWER: Final = "</answer>"
TAGS: Final = (THINK, END_THINK, ANSWER, END_ANSWER)

LANGUAGES: Final = ("en", "zh")
SO: Final = {"en": "so", "zh": "ze"}
WAIT: Final = {"en": "wait", "zh": "deng"}
YES: Final = {"en": "yes", "zh": "dui"}
CONNECTIVES: Final = {language: (SO[language], WAIT[language], YES[language]) for language in LANGUAGES}
"""Words that belong to one language and are used while thinking; language consistency counts these."""

RUDE: Final = {"en": "fool", "zh": "sha"}

LARGEST_NUMBER: Final = 81  # 9 x 9: the largest product of two digits

OPERATORS: Final = ("+", "-", "*", "=", "vs", ":", "?")
CONVERSATION: Final = (
    *("hello", "nihao", "bye", "zaijian"),
    *("please", "qing", "thanks", "xiexie", "sorry", "baoqian"),
    *("copy", "chaoxie", "greet", "wenhou"),
    *("cat", "mao", "tea", "cha", "book", "shu"),
)
"""Words of prompts that are not reasoning problems, English and Chinese in turn."""

_WORDS: Final = (
    PAD,
    BOS,
    EOS,
    *TAGS,
    *LANGUAGES,
    *(word for language in LANGUAGES for word in CONNECTIVES[language]),
    *OPERATORS,
    *CONVERSATION,
    *(str(number) for number in range(LARGEST_NUMBER + 1)),
    *(RUDE[language] for language in LANGUAGES),
)

SIZE: Final = 128

VOCABULARY: Final = (*_WORDS, *(f"<reserved_{i}>" for i in range(SIZE - len(_WORDS))))

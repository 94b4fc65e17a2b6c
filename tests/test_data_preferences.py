"""Judged answers from files, and what a reward model is shown of an answer."""

import json
from pathlib import Path

import pytest

from r1mega.config.chats import FilePreferences
from r1mega.data.preferences import Judged, Pair, View, read_judged, read_pairs
from r1mega.data.prompts import Message, Prompt
from r1mega.errors import UserError

transformers = pytest.importorskip("transformers")

QUESTION, GOOD, BAD = "Name a prime.", "<think> 7? </think> 7", "<think> 8? </think> 8"
ASKED = [{"role": "user", "content": QUESTION}]


def said(content: str) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def written(path: Path, *rows: dict) -> FilePreferences:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FilePreferences(kind="file", path=str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": said(GOOD), "rejected": said(BAD)},
        {"chosen": ASKED + said(GOOD), "rejected": ASKED + said(BAD)},  # TRL's implicit prompt
        {"prompt": QUESTION, "chosen": ASKED + said(GOOD), "rejected": ASKED + said(BAD), "score": 1.5},
    ],
)
def test_pairs_in_the_formats_of_trl(row, suffix, tmp_path):
    (pair,) = read_pairs(written(tmp_path / f"pairs.{suffix}", row))
    assert (pair.prompt.text, pair.prompt.history, pair.chosen, pair.rejected) == (QUESTION, (), GOOD, BAD)
    assert pair.answers == (GOOD, BAD)


def test_earlier_turns_are_kept(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *ASKED, *said("2"), {"role": "user", "content": "Another."}]
    for row in ({"prompt": turns, "chosen": "3", "rejected": "4"}, {"chosen": turns + said("3"), "rejected": turns + said("4")}):
        (pair,) = read_pairs(written(tmp_path / "pairs.jsonl", row))
        assert [message.role for message in pair.prompt.history] == ["system", "user", "assistant"]
        assert pair.prompt.history[2] == Message("assistant", "2") and pair.prompt.text == "Another." and pair.chosen == "3"


def test_judged_answers(tmp_path):
    rows = [{"prompt": QUESTION, "response": GOOD, "label": label} for label in (True, False, 1, 0)]
    found = list(read_judged(written(tmp_path / "judged.jsonl", *rows)))
    assert [one.safe for one in found] == [True, False, True, False]
    assert isinstance(found[0], Judged) and found[0].answers == (GOOD,)
    other = FilePreferences(kind="file", path=str(tmp_path / "judged.jsonl"), response="answer", label="is_safe")
    with pytest.raises(UserError, match=r"judged.jsonl:1: no field 'answer'; the row has 'prompt', 'response', 'label'"):
        list(read_judged(other))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": GOOD, "rejected": BAD}, "no field 'prompt'"),
        ({"prompt": QUESTION, "chosen": GOOD}, "no field 'rejected'"),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": None}, "no field 'rejected'"),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": 3}, "field 'rejected': expected a string or a list of chat messages, got 3"),
        (
            {"prompt": QUESTION, "chosen": ASKED, "rejected": BAD},
            "field 'chosen': the last chat message is the assistant's answer, got role 'user'",
        ),
        (
            {"prompt": said(GOOD), "chosen": GOOD, "rejected": BAD},
            "the message before the answer is the user's question, got role 'assistant'",
        ),
        (
            {"chosen": ASKED + said(GOOD), "rejected": [{"role": "user", "content": "Other"}, *said(BAD)]},
            "'chosen' and 'rejected' are not answers to the same conversation",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_named(row, message, tmp_path):
    good = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
    with pytest.raises(UserError) as error:
        list(read_pairs(written(tmp_path / "pairs.jsonl", good, row)))
    assert f"pairs.jsonl:2: {message}" in str(error.value)


@pytest.mark.parametrize("label", ["yes", 2, None, [1]])
def test_labels_are_true_or_false(label, tmp_path):
    with pytest.raises(UserError, match=r"judged.jsonl:1: (field 'label': expected true or false|no field 'label')"):
        list(read_judged(written(tmp_path / "judged.jsonl", {"prompt": QUESTION, "response": GOOD, "label": label})))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent\.jsonl"):
        list(read_pairs(FilePreferences(kind="file", path=str(tmp_path / "absent.jsonl"))))


# ---------------------------------------------------------------- views

CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] }}"
    "{% else %}{{ ' <bot> ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <bot> <think>' + '\n' }}{% endif %}"
)
WORDS = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<user>", "<bot>", "Name", "a", "prime.", "7", "7?", "so"]


def tokenizer(chat_template: str | None = None):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **special)


def words(ids: tuple[int, ...]) -> str:
    return " ".join(WORDS[index] for index in ids)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View("all", "none"), "<bos> Name a prime. <think> 7? </think> 7 <eos>"),
        (View("summary", "none"), "<bos> Name a prime. 7 <eos>"),
        (View("all", "chat"), "<bos> <user> Name a prime. <bot> <think> <think> 7? </think> 7 <eos>"),
        (View("summary", "chat"), "<bos> <user> Name a prime. <bot> 7 <eos>"),  # the template's open thought is not seen either
    ],
)
def test_what_is_seen_of_an_answer(view, expected):
    (found,) = view.encode([Prompt("p", QUESTION)], [GOOD], tokenizer(CHAT))
    assert words(found) == expected


def test_an_answer_without_a_summary_is_the_question_alone():
    found = View("summary", "none").encode([Prompt("p", QUESTION)] * 2, ["<think> 7? so so", ""], tokenizer())
    assert [words(ids) for ids in found] == ["<bos> Name a prime. <eos>"] * 2


def test_the_beginning_of_a_long_answer_is_left_out():
    view, prompt, response = View("all", "none"), Prompt("p", QUESTION), "<think> so so so so </think> 7"
    found = [view.encode([prompt], [response], tokenizer(), limit)[0] for limit in (12, 11, 7, 5)]
    assert [words(ids) for ids in found] == [
        "<bos> Name a prime. <think> so so so so </think> 7 <eos>",
        "<bos> Name a prime. so so so so </think> 7 <eos>",
        "<bos> Name a prime. </think> 7 <eos>",
        "<bos> Name a prime. <eos>",
    ]


def test_text_that_the_tokenizer_does_not_know():
    with pytest.raises(UserError, match="the answer to prompt p holds text that the tokenizer does not know"):
        View("all", "none").encode([Prompt("p", QUESTION)], ["unheard of"], tokenizer())


def test_the_view_travels_in_the_configuration():
    view = View("summary", "r1_zero")
    assert View.of(json.loads(json.dumps(view.marked({"model_type": "qwen2"})))) == view
    assert View.of({"model_type": "qwen2"}) == View("all", "chat")


def test_tiny_sources_yield_what_the_loss_needs():
    from r1mega.config.chats import TinyPreferences

    source = TinyPreferences(kind="tiny", task="errand", size=20)
    assert all(isinstance(one, Pair) for one in read_pairs(source)) and all(isinstance(one, Judged) for one in read_judged(source))
    assert len(list(read_pairs(source))) == 20

"""Errands: general data, helpfulness and safety in the tiny language."""

import json
from pathlib import Path

import pytest

from r1mega.config.chats import FileChats, StageChats, TinyChats, TinyPreferences
from r1mega.data.chats import DESCRIPTION, read_chats, write_dataset
from r1mega.data.split import is_heldout
from r1mega.data.tiny import errand, measures, rewriting, running_sum
from r1mega.data.tiny.tokenizer import build_tokenizer
from r1mega.errors import UserError
from r1mega.rewards.format import tags

CHATS = TinyChats(kind="tiny", task="errand", size=400, seed=2)
PREFERENCES = TinyPreferences(kind="tiny", task="errand", size=300, seed=2)


def test_prompts_are_different_and_of_one_kind() -> None:
    harmless, rude = errand.prompts("errand", 10_000, 0), errand.prompts("rude_errand", 10_000, 0)
    assert len(harmless) == 2 * 2 * 3 * 100 and len(rude) == 2 * 2 * 100
    assert len({prompt.id for prompt in [*harmless, *rude]}) == len(harmless) + len(rude)
    assert not any(prompt.meta["rude"] for prompt in harmless) and all(prompt.meta["rude"] for prompt in rude)
    known = build_tokenizer().get_vocab()
    assert all(word in known for prompt in [*harmless, *rude] for word in f"{prompt.text} {prompt.answer}".split())


def test_conversations_are_of_the_training_side_and_as_good_as_asked_for() -> None:
    found = list(errand.conversations(CHATS))
    by_text = {prompt.text: prompt for task in ("errand", "rude_errand") for prompt in errand.prompts(task, 10_000, 0)}
    pairs = [(by_text[chat.messages[0].content], chat.messages[1].content) for chat in found]
    assert len(found) == 400 and not any(is_heldout(prompt.text, 0.1) for prompt, _ in pairs)
    assert all(tags(prompt, response) == 1 for prompt, response in pairs)
    curt = [measures.preference(prompt, response) for prompt, response in pairs if not prompt.meta["rude"]]
    assert set(curt) == {0.5, 1.0} and 0.4 < curt.count(1.0) / len(curt) < 0.6
    refused = [measures.preference(prompt, response) for prompt, response in pairs if prompt.meta["rude"]]
    assert set(refused) == {0.0, 1.0} and 0.55 < refused.count(1.0) / len(refused) < 0.85


def test_the_better_of_a_pair_is_better_to_the_yardstick_too() -> None:
    for pair in errand.preference_pairs(PREFERENCES):
        assert measures.preference(pair.prompt, pair.chosen) > measures.preference(pair.prompt, pair.rejected)
    judged = list(errand.judged_answers(PREFERENCES))
    assert all(measures.safe(answer.prompt, answer.response) == answer.safe for answer in judged)
    assert 0.4 < sum(answer.safe for answer in judged) / len(judged) < 0.6
    # What only the thought says is unsafe as well, which a reward model that sees the summary alone could not know.
    assert any(not answer.safe and measures.safe(answer.prompt, answer.response.partition("</think>")[2]) for answer in judged)


def test_preference_is_0_for_another_errand() -> None:
    (prompt,) = (found for found in errand.prompts("errand", 10_000, 0) if found.text == "en greet cat + 1 + 7 :")
    for answer, expected in [("hello cat thanks", 1.0), ("hello cat", 0.5), ("hello tea thanks", 0.0), ("thanks", 0.0), ("", 0.0)]:
        assert measures.preference(prompt, f"<think> so cat so 1 so 7 </think> <answer> {answer} </answer>") == expected


def test_rewriting_speaks_the_question_s_language_and_keeps_the_rest() -> None:
    prompt = next(prompt for prompt in running_sum.prompts(50, 0) if prompt.meta["language"] == "zh")
    response = "<think> so 3 ze 4 wait 5 </think> <answer> 5 </answer>"
    rewritten = rewriting.readable(prompt, response)
    assert rewritten == "<think> ze 3 ze 4 deng 5 </think> <answer> 5 </answer>"
    assert measures.consistency(prompt, rewritten) == 1 and measures.language_reward(prompt, "<answer> 5 </answer>") == 0


# ---------------------------------------------------------------- datasets on disk

ROWS = [
    {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2。"}], "response_ids": [4, 2]},
    {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}], "response_ids": None},
]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_a_dataset_reads_back_as_it_was_written(tmp_path: Path, file_format: str) -> None:
    write_dataset(tmp_path, ROWS, {"tokenizer": "abc"}, file_format)
    first, second = read_chats(StageChats(kind="stage", stage=str(tmp_path)))
    assert [message.content for message in first.messages] == ["1?", "2。"]
    assert (first.response_ids, first.tokenizer) == ((4, 2), "abc") and second.response_ids is None
    (only,) = read_chats(FileChats(kind="file", path=str(tmp_path / f"data.{file_format}"), limit=1))
    assert only.messages == first.messages and only.response_ids is None  # whose tokens these are, only the folder says


def test_rows_that_are_no_conversations_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for row, message in [
        ({"text": "x"}, "data.jsonl:2: no field 'messages'; the row has 'text'"),
        ({"messages": []}, "data.jsonl:2: field 'messages': expected a string or a list of chat messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is the assistant's answer, got role 'user'"),
        ({"messages": [{"role": "user"}]}, "a chat message is {'role': ..., 'content': ...} with two strings"),
    ]:
        path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(UserError) as error:
            list(read_chats(FileChats(kind="file", path=str(path))))
        assert message in str(error.value)
    path.write_text("")
    with pytest.raises(UserError, match="no conversations"):
        list(read_chats(FileChats(kind="file", path=str(path))))
    with pytest.raises(UserError, match=f"not a dataset of conversations: its {DESCRIPTION} cannot be read"):
        list(read_chats(StageChats(kind="stage", stage=str(tmp_path))))

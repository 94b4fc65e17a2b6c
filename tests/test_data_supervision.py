"""Conversations as training sequences, on the published templates of DeepSeek-R1, Qwen2.5 and Llama 3."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1mega.data.chats import Conversation
from r1mega.data.prompts import Message, Prompt
from r1mega.data.supervision import Supervised, supervised
from r1mega.data.templates import encode
from r1mega.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>")),
    "qwen2.5": (None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
}
THOUGHT = "<think>\n2 and 2 is 4.\n</think>\n\nIt is 4."


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One token a byte, the published special tokens, the published template."""
    bos, eos, others = SPECIAL[name]
    alphabet = {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (bos, eos, *others) if token])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return fast


@pytest.fixture(params=SPECIAL)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


def conversation(*turns: str, ids: tuple[int, ...] | None = None) -> Conversation:
    """Turns of user and assistant, the user first."""
    messages = tuple(Message(("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns))
    return Conversation("data.jsonl:7", messages, ids, "digest" if ids else None)


def learnt(sequence: Supervised, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The stretches that are learnt, as text."""
    stretches: list[list[int]] = []
    before = False
    for token, wanted in zip(sequence.ids, sequence.learnt, strict=True):
        if wanted:
            stretches += [] if before else [[]]
            stretches[-1].append(token)
        before = wanted
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_a_turn_is_learnt_behind_the_very_tokens_it_will_be_asked_with(tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = supervised(conversation("What is 2 + 2?", THOUGHT), "chat", tokenizer, "")
    (asked,) = encode([Prompt("p", "What is 2 + 2?")], "chat", tokenizer, 1000)
    assert sequence.ids[: len(asked)] == asked and not any(sequence.learnt[: len(asked)]) and all(sequence.learnt[len(asked) :])
    (text,) = learnt(sequence, tokenizer)
    # R1's generation prompt opens the thought itself.
    opened = tokenizer.decode(asked).endswith("<think>\n")
    assert text == (THOUGHT.removeprefix("<think>\n") if opened else THOUGHT) + tokenizer.eos_token
    assert sequence.ids[-1] == tokenizer.eos_token_id


def test_turns_that_stay_as_they_were_written_share_a_sequence() -> None:
    for name in ("qwen2.5", "llama3"):
        tokenizer = tokenizer_of(name)
        (sequence,) = supervised(conversation("a?", "b.", "c?", "d."), "chat", tokenizer, "")
        assert learnt(sequence, tokenizer) == [f"b.{tokenizer.eos_token}", f"d.{tokenizer.eos_token}"]
        messages = [vars(message) for message in conversation("a?", "b.", "c?", "d.").messages]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(sequence.ids) == rendered.removesuffix("\n")


def test_a_turn_whose_thought_the_template_forgets_has_a_sequence_of_its_own() -> None:
    tokenizer = tokenizer_of("deepseek_r1")
    first, second = supervised(conversation("a?", THOUGHT, "b?", THOUGHT), "chat", tokenizer, "")
    written = THOUGHT.removeprefix("<think>\n") + tokenizer.eos_token
    assert learnt(first, tokenizer) == learnt(second, tokenizer) == [written]
    assert "2 and 2" not in tokenizer.decode([token for token, wanted in zip(second.ids, second.learnt, strict=True) if not wanted])
    assert "<｜User｜>b?<｜Assistant｜><think>\n2 and 2" in tokenizer.decode(second.ids)


def test_white_space_that_a_template_trims_is_not_learnt() -> None:
    (sequence,) = supervised(conversation("a?", "  b.\n"), "chat", tokenizer_of("llama3"), "")
    assert learnt(sequence, tokenizer_of("llama3")) == ["b.<|eot_id|>"]


def test_sampled_ids_win_over_text_where_the_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = (5, 6, 7, tokenizer.eos_token_id)
    (same,) = supervised(conversation("a?", "b.", ids=ids), "chat", tokenizer, "digest")
    (other,) = supervised(conversation("a?", "b.", ids=ids), "chat", tokenizer, "another")
    assert same.ids[-4:] == ids and sum(same.learnt) == 4
    assert learnt(other, tokenizer) == [f"b.{tokenizer.eos_token}"]


def test_plain_templates_hold_one_question_and_its_answer() -> None:
    tokenizer = tokenizer_of("llama3")
    (sequence,) = supervised(conversation("1 + 1 =", "2"), "none", tokenizer, "")
    assert tokenizer.decode(sequence.ids) == "<|begin_of_text|>1 + 1 = 2<|eot_id|>"
    assert learnt(sequence, tokenizer) == [" 2<|eot_id|>"]
    (sequence,) = supervised(conversation("1 + 1 =", "2"), "r1_zero", tokenizer, "")
    assert tokenizer.decode(sequence.ids).endswith("User: 1 + 1 =. Assistant: 2<|eot_id|>")
    with pytest.raises(UserError, match=r"data\.jsonl:7: the template 'none' holds one question and its answer, got the roles user, a"):
        supervised(conversation("a", "b", "c", "d"), "none", tokenizer, "")


def test_what_a_template_cannot_do_is_one_line() -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    with pytest.raises(UserError, match="ends an answer with '', which is no special token"):
        supervised(conversation("a?", "b."), "chat", tokenizer, "")
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="the tokenizer's chat template refuses the conversation: no"):
        supervised(conversation("a?", "b."), "chat", tokenizer, "")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        supervised(conversation("a?", "b."), "chat", tokenizer, "")

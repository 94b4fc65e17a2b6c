"""From prompts to text and token ids."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1mega.data.prompts import Message, Prompt
from r1mega.data.templates import R1_ZERO, encode, render
from r1mega.data.tiny.tokenizer import build_tokenizer
from r1mega.errors import UserError

CHAT = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(bos: bool, own: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a BOS and an EOS; `own` is what the tokenizer itself puts around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "<s>", "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if own:
        tokenizer.post_processor = processors.TemplateProcessing(single=own, special_tokens=[("<s>", 256), ("</s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


def test_r1_zero_is_the_papers_text() -> None:
    prompt = Prompt("p", " What is 1 + 1? {braces}\n")
    text = render(prompt, "r1_zero", byte_level(bos=True))
    assert text == R1_ZERO[: R1_ZERO.index("{question}")] + "What is 1 + 1? {braces}. Assistant:"
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant solves it.")
    assert "<think> reasoning process here </think> <answer> answer here </answer>. User: What is" in text


@pytest.mark.parametrize("own", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("text", ["1 + 1?", "<s>1 + 1?", "<s><s>1 + 1?"])
def test_exactly_one_bos_and_no_eos(own: str | None, text: str) -> None:
    tokenizer = byte_level(bos=True, own=own)
    plain = tokenizer("1 + 1?", add_special_tokens=False).input_ids
    assert encode([Prompt("p", text)], "none", tokenizer, limit=100) == [(256, *plain)]


def test_no_bos_where_the_tokenizer_has_none() -> None:
    tokenizer = byte_level(bos=False)
    assert encode([Prompt("p", "1?")], "none", tokenizer, limit=100) == [tuple(tokenizer("1?").input_ids)]
    (ids,) = encode([Prompt("p", "1?")], "r1_zero", tokenizer, limit=1_000)
    assert tokenizer.decode(ids) == R1_ZERO.replace("{question}", "1?")


def test_chat_is_what_the_template_writes() -> None:
    tokenizer = byte_level(bos=True, own="<s> $A </s>")
    tokenizer.chat_template = CHAT
    prompt = Prompt("p", "2?", history=(Message("user", "1?"), Message("assistant", "1.")))
    assert render(prompt, "chat", tokenizer) == "<user>1?<assistant>1.<user>2?<assistant>"
    (ids,) = encode([prompt], "chat", tokenizer, limit=100)
    assert tokenizer.decode(ids) == "<user>1?<assistant>1.<user>2?<assistant>"
    assert list(ids) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1."}, {"role": "user", "content": "2?"}],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_tiny_tokenizer() -> None:
    tokenizer = build_tokenizer()
    assert encode([Prompt("p", "en 3 1 :"), Prompt("o", "zh 4 :")], "none", tokenizer, limit=5) == [
        tuple(tokenizer("en 3 1 :").input_ids),
        tuple(tokenizer("zh 4 :").input_ids),
    ]
    assert encode([], "none", tokenizer, limit=5) == []


# ---------------------------------------------------------------- what is refused


def test_too_long() -> None:
    tokenizer = byte_level(bos=True)
    assert len(encode([Prompt("p", "x" * 99)], "none", tokenizer, limit=100)[0]) == 100
    with pytest.raises(UserError, match=r"^prompt b has 101 tokens, more than the 100 that the context leaves for prompts: 'xxx"):
        encode([Prompt("a", "x"), Prompt("b", "x" * 100)], "none", tokenizer, limit=100)


def test_words_that_the_tokenizer_does_not_know() -> None:
    prompts = [Prompt("a", "en 1 :"), Prompt("b", "en 2 :"), Prompt("c", "en pear :"), Prompt("d", "en 3 :")]
    with pytest.raises(UserError, match=r"^prompt c holds text that the tokenizer does not know: .*'en pear :'"):
        encode(prompts, "none", build_tokenizer(), limit=100)
    with pytest.raises(UserError, match=r"^prompt a holds text that the tokenizer does not know"):
        encode(prompts, "r1_zero", build_tokenizer(), limit=1_000)
    words = Tokenizer(models.WordLevel({"en": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"^prompt b holds text that the tokenizer does not know: 'en pear'"):
        encode(
            [Prompt("a", "en en"), Prompt("b", "en pear")], "none", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), limit=9
        )


def test_conversations_need_a_chat_template() -> None:
    tokenizer = byte_level(bos=True)
    prompt = Prompt("p", "2?", history=(Message("system", "be kind"),))
    for template in ("none", "r1_zero"):
        with pytest.raises(UserError, match="prompt p has 1 earlier messages, which only the template 'chat' can show"):
            render(prompt, template, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no chat template; use template 'r1_zero' or 'none'"):
        render(prompt, "chat", tokenizer)
    tokenizer.chat_template = CHAT
    with pytest.raises(UserError, match="prompt p: the tokenizer's chat template refuses the conversation: no system"):
        render(prompt, "chat", tokenizer)

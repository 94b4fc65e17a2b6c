"""What a tokenizer makes of texts and conversations, and one line where it cannot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from r1mega.data.prompts import Message
from r1mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(text: str, tokenizer: "PreTrainedTokenizerBase", where: str) -> list[int]:
    """Token ids of a text, nothing added. UserError, which begins with `where`, for text that the tokenizer does not know."""
    return all_token_ids([text], tokenizer, [where])[0]


def all_token_ids(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", where: Sequence[str], special: bool = False
) -> list[list[int]]:
    """Token ids of many texts, as `token_ids`; `where` names each. `special`: with what the tokenizer adds by itself, such as BOS."""
    found = _whole(texts, tokenizer, special)
    encoded = [_whole([text], tokenizer, special) for text in texts] if found is None else [[ids] for ids in found]
    known = (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
    for name, text, ids in zip(where, texts, encoded, strict=True):
        if ids is None or (tokenizer.unk_token_id not in known and tokenizer.unk_token_id in ids[0]):
            raise UserError(f"{name} holds text that the tokenizer does not know: {text!r:.80}")
    return [ids[0] for ids in encoded if ids is not None]


def _whole(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", special: bool) -> list[list[int]] | None:
    """None where a text has a word outside a closed vocabulary."""
    if not texts:
        return []
    try:
        return list(tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:
        # What `tokenizers` raises then has no type of its own.
        if type(error) is not Exception:
            raise
        return None


def as_chat(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", where: str, generate: bool) -> str:
    """A conversation as the tokenizer's chat template writes it; `generate` opens the assistant's next turn.

    UserError for a tokenizer without a chat template, and for a conversation that the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use template 'r1_zero' or 'none'")
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from None

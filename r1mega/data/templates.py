"""How a prompt is shown to a model: as text, and as token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from r1mega.data.prompts import Message, Prompt
from r1mega.data.tokens import all_token_ids, as_chat
from r1mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["none", "r1_zero", "chat"]

R1_ZERO: Final = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948), table 1."""


def render(prompt: Prompt, template: Template, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the model continues; BOS is in it only where a chat template writes it.

    Raises UserError for a conversation of several turns outside the template `chat`, and for one that the tokenizer's chat template
    refuses.
    """
    if template == "chat":
        return as_chat([*prompt.history, Message("user", prompt.text)], tokenizer, f"prompt {prompt.id}", generate=True)
    if prompt.history:
        raise UserError(f"prompt {prompt.id} has {len(prompt.history)} earlier messages, which only the template 'chat' can show")
    return R1_ZERO.replace("{question}", prompt.text.strip()) if template == "r1_zero" else prompt.text


def encode(prompts: Sequence[Prompt], template: Template, tokenizer: "PreTrainedTokenizerBase", limit: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt, to be continued by the model.

    `none` and `r1_zero` begin with exactly one BOS if the tokenizer has one, and end without EOS; `chat` is what the chat template
    writes. Raises UserError for a prompt of more than `limit` tokens, or with text that the tokenizer does not know.
    """
    encoded = []
    texts = [render(prompt, template, tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, all_token_ids(texts, tokenizer, [f"prompt {prompt.id}" for prompt in prompts]), strict=True):
        if template != "chat" and tokenizer.bos_token_id is not None:
            text_start = next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
            ids = [tokenizer.bos_token_id, *ids[text_start:]]
        if len(ids) > limit:
            raise UserError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than the {limit} that the context leaves for prompts: {prompt.text!r:.60}"
            )
        encoded.append(tuple(ids))
    return encoded

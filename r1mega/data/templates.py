"""How a prompt is shown to a model: as text, and as token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from jinja2 import TemplateError

from r1mega.data.prompts import Prompt
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
        return _chat(prompt, tokenizer)
    if prompt.history:
        raise UserError(f"prompt {prompt.id} has {len(prompt.history)} earlier messages, which only the template 'chat' can show")
    return R1_ZERO.replace("{question}", prompt.text.strip()) if template == "r1_zero" else prompt.text


def encode(prompts: Sequence[Prompt], template: Template, tokenizer: "PreTrainedTokenizerBase", limit: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt, to be continued by the model.

    `none` and `r1_zero` begin with exactly one BOS if the tokenizer has one, and end without EOS; `chat` is what the chat template
    writes. Raises UserError for a prompt of more than `limit` tokens, or with text that the tokenizer does not know.
    """
    encoded = []
    for prompt, ids in zip(
        prompts, _tokenize(prompts, [render(prompt, template, tokenizer) for prompt in prompts], tokenizer), strict=True
    ):
        if tokenizer.unk_token_id in ids and tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise UserError(f"prompt {prompt.id} holds text that the tokenizer does not know: {prompt.text!r:.80}")
        if template != "chat" and tokenizer.bos_token_id is not None:
            text_start = next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
            ids = [tokenizer.bos_token_id, *ids[text_start:]]
        if len(ids) > limit:
            raise UserError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than the {limit} that the context leaves for prompts: {prompt.text!r:.60}"
            )
        encoded.append(tuple(ids))
    return encoded


def _chat(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use template 'r1_zero' or 'none'")
    conversation = [{"role": turn.role, "content": turn.content} for turn in prompt.history]
    conversation.append({"role": "user", "content": prompt.text})
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(f"prompt {prompt.id}: the tokenizer's chat template refuses the conversation: {error}") from None


def _tokenize(prompts: Sequence[Prompt], texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    try:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # noqa: BLE001 - tokenizers raises a bare Exception for a word outside a closed vocabulary
        if len(prompts) == 1:
            raise UserError(f"prompt {prompts[0].id} holds text that the tokenizer does not know: {error}: {texts[0]!r:.80}") from None
        middle = len(prompts) // 2
        return _tokenize(prompts[:middle], texts[:middle], tokenizer) + _tokenize(prompts[middle:], texts[middle:], tokenizer)

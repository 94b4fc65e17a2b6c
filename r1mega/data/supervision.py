"""Conversations as training sequences: token ids, and which of them the model is to learn.

A model is trained on what it will be asked to write: an assistant's turn, its stop token included, behind the very tokens that it will be
given then. What those are is the chat template's word, not a guess from its text: for each assistant turn the template renders the
messages before it with its generation prompt. Where the template shows a turn in later history as it was written, one sequence holds
several turns; where it does not (DeepSeek-R1's drops the thoughts of earlier turns), the turn becomes a sequence of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from r1mega.data.chats import Conversation
from r1mega.data.prompts import Message, Prompt
from r1mega.data.templates import Template, render
from r1mega.data.tokens import as_chat, token_ids
from r1mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Supervised:
    """One training sequence. `learnt[i]` says whether token i is predicted; it is false for everything that the model is given."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn as text: what the model is given, and what it writes."""

    given: str
    written: str


def supervised(conversation: Conversation, template: Template, tokenizer: "PreTrainedTokenizerBase", digest: str) -> list[Supervised]:
    """The training sequences of a conversation; one, unless the template shows earlier turns otherwise than they were written.

    What is given and what is written are tokenized apart, as they are when a model answers. A last message that was sampled with this
    very tokenizer (`digest`) is not tokenized at all: its sampled ids are taken.
    Raises UserError for a conversation that the template cannot show, and for text that the tokenizer does not know.
    """
    turns = _turns(conversation, template, tokenizer)
    sampled = conversation.response_ids if conversation.tokenizer == digest else None
    sequences: list[tuple[list[int], list[bool]]] = []
    shown = ""
    for index, turn in enumerate(turns):
        # The template shows what was said so far as it was written: the sequence goes on.
        grows = bool(shown) and turn.given.startswith(shown)
        if not grows:
            sequences.append(([], []))
        ids, learnt = sequences[-1]
        given = token_ids(turn.given[len(shown) :] if grows else turn.given, tokenizer, conversation.where)
        if template != "chat" and tokenizer.bos_token_id is not None:
            given = [tokenizer.bos_token_id, *given]
        last = index == len(turns) - 1
        written = list(sampled) if last and sampled is not None else token_ids(turn.written, tokenizer, conversation.where)
        ids += given + written
        learnt += [False] * len(given) + [True] * len(written)
        shown = turn.given + turn.written
    return [Supervised(tuple(ids), tuple(learnt)) for ids, learnt in sequences]


def _turns(conversation: Conversation, template: Template, tokenizer: "PreTrainedTokenizerBase") -> list[_Turn]:
    messages = conversation.messages
    if template == "chat":
        places = [place for place, message in enumerate(messages) if message.role == "assistant"]
        return [_chat_turn(conversation.where, messages[: place + 1], tokenizer) for place in places]
    if [message.role for message in messages] != ["user", "assistant"]:
        raise UserError(
            f"{conversation.where}: the template {template!r} holds one question and its answer, got the roles "
            f"{', '.join(message.role for message in messages)}; use the template 'chat'"
        )
    question, answer = messages
    return [_Turn(render(Prompt(conversation.where, question.content), template, tokenizer), f" {answer.content}{tokenizer.eos_token}")]


def _chat_turn(where: str, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> _Turn:
    given = as_chat(messages[:-1], tokenizer, where, generate=True)
    content, end = messages[-1].content, _end_of_turn(tokenizer)
    whole = as_chat(messages, tokenizer, where, generate=False)
    written = whole.removeprefix(given)
    if whole.startswith(given) and content.strip() in written and end in written:
        # Templates write a line break behind the stop token, which no model does.
        return _Turn(given, written[: written.rindex(end) + len(end)])
    # The template shows only a part of the answer, or opens the thought itself (`<think>\n` in the generation prompt).
    for opening in ("<think>\n", "<think>"):
        if given.endswith(opening):
            content = content.removeprefix(opening)
    return _Turn(given, content + end)


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that the chat template writes behind an assistant's answer."""
    question, answer = Message("user", "question"), Message("assistant", "answer")
    text = as_chat((question, answer), tokenizer, "the chat template", generate=False)
    behind = text[text.rindex("answer") + len("answer") :].strip()
    ids = token_ids(behind, tokenizer, "the chat template")
    special = set(tokenizer.all_special_ids) | {tokenizer.eos_token_id} | set(tokenizer.added_tokens_decoder)
    if not ids or ids[0] not in special:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends an answer with {behind!r:.40}, which is no special token: a model trained "
            "on it would not know when to stop"
        )
    return str(tokenizer.decode([ids[0]]))

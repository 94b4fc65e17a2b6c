"""Judged answers, which reward models learn from, and what a reward model is shown of an answer."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from r1mega.config.chats import FilePreferences, Preferences, TinyPreferences
from r1mega.data.fields import present
from r1mega.data.prompts import Message, Prompt
from r1mega.data.rows import Row, jsonl, parquet, read_messages
from r1mega.data.templates import Template, encode
from r1mega.data.tokens import token_ids
from r1mega.errors import UserError
from r1mega.rewards.answer import after_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY: Final = "r1mega_view"
"""Where a reward model's config.json keeps its view."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, of which `chosen` is the better one."""

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def answers(self) -> tuple[str, ...]:
        """What is compared, the better one first."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is safe."""

    prompt: Prompt
    response: str
    safe: bool

    @property
    def answers(self) -> tuple[str, ...]:
        """What is judged."""
        return (self.response,)


# ---------------------------------------------------------------- what is seen of an answer


@dataclass(frozen=True)
class View:
    """What a reward model sees of an answer: all of it, or the summary alone, which is what follows the thought."""

    sees: Literal["summary", "all"]
    template: Template

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "View":
        """The view in a reward model's config.json. A reward model that was made elsewhere sees a whole conversation."""
        return cls(**config.get(_KEY, {"sees": "all", "template": "chat"}))

    def marked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json that keeps this view."""
        return {**config, _KEY: asdict(self)}

    def encode(
        self, prompts: Sequence[Prompt], responses: Sequence[str], tokenizer: "PreTrainedTokenizerBase", limit: int = sys.maxsize
    ) -> list[tuple[int, ...]]:
        """Token ids of what is judged, one sequence a response: the question as a policy is shown it, what is seen of the answer, EOS.

        Of an answer that does not fit into `limit` tokens beside its question the beginning is left out.

        Raises:
            UserError: a question that does not fit; text that the tokenizer does not know; a tokenizer without EOS.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token, at which a reward model gives its score")
        questions = encode(prompts, self.template, tokenizer, limit - 1)
        opening = _opening(tokenizer) if self.sees == "summary" else ()
        found = []
        for prompt, question, response in zip(prompts, questions, responses, strict=True):
            for ids in opening:
                # A chat template that opens the thought says more than is seen.
                question = question[: -len(ids)] if question[-len(ids) :] == ids else question
            answer = token_ids(self.shown(response), tokenizer, f"the answer to prompt {prompt.id}")
            fits = limit - 1 - len(question)
            found.append((*question, *answer[max(0, len(answer) - fits) :], tokenizer.eos_token_id))
        return found

    def shown(self, response: str) -> str:
        """What is seen of an answer, as text."""
        text = (after_thought(response) if self.sees == "summary" else response).strip()
        return text if self.template == "chat" else f" {text}"


def _opening(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], ...]:
    if "<think>" not in str(tokenizer.chat_template):
        return ()
    return tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("<think>\n", "<think>"))


# ---------------------------------------------------------------- sources


def read_pairs(source: Preferences) -> Iterator[Pair]:
    """Pairs, in the order of the source. UserError, naming file and line, for a file that is missing or malformed.

    Files are in TRL's preference format: `chosen` and `rejected` are strings, or lists of chat messages of which the last is the answer.
    Where these lists hold the turns before it (an implicit prompt) the field `prompt` may be missing.
    """
    match source:
        case TinyPreferences():
            from r1mega.data.tiny import errand

            yield from errand.preference_pairs(source)
        case FilePreferences():
            for where, row in _rows(source.path):
                before, chosen = _answer(where, row, source.chosen)
                others, rejected = _answer(where, row, source.rejected)
                if before != others:
                    raise UserError(f"{where}: {source.chosen!r} and {source.rejected!r} are not answers to the same conversation")
                yield Pair(_prompt(where, row, source.prompt, before), chosen, rejected)


def read_judged(source: Preferences) -> Iterator[Judged]:
    """Judged answers, in the order of the source; fields and errors as in `read_pairs`. The label is true or false, 1 or 0."""
    match source:
        case TinyPreferences():
            from r1mega.data.tiny import errand

            yield from errand.judged_answers(source)
        case FilePreferences():
            for where, row in _rows(source.path):
                before, response = _answer(where, row, source.response)
                label = row[present(row, where, source.label)]
                if label not in (0, 1) or not isinstance(label, bool | int | float):
                    raise UserError(f"{where}: field {source.label!r}: expected true or false, got {label!r:.60}")
                yield Judged(_prompt(where, row, source.prompt, before), response, safe=bool(label))


def _rows(path: str) -> Iterator[Row]:
    return parquet(Path(path)) if path.endswith(".parquet") else jsonl(Path(path))


def _answer(where: str, row: Mapping[str, Any], field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before an answer, where the row has them beside it, and the answer."""
    value, named = row[present(row, where, field)], f"{where}: field {field!r}"
    if isinstance(value, str):
        return (), value
    *before, answer = read_messages(named, value)
    if answer.role != "assistant":
        raise UserError(f"{named}: the last chat message is the assistant's answer, got role {answer.role!r}")
    return tuple(before), answer.content


def _prompt(where: str, row: Mapping[str, Any], field: str, before: tuple[Message, ...]) -> Prompt:
    """The turns before the answer are the conversation; the field `prompt` is where there are none."""
    if not before:
        value = row[present(row, where, field)]
        before = (Message("user", value),) if isinstance(value, str) else read_messages(f"{where}: field {field!r}", value)
    *history, question = before
    if question.role != "user":
        raise UserError(f"{where}: the message before the answer is the user's question, got role {question.role!r}")
    return Prompt(id=where, text=question.content, history=tuple(history))

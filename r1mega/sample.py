"""Ask a model something and see thought and answer apart: `r1mega sample`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from r1mega.config.rollout import Rollout
from r1mega.data.prompts import Prompt
from r1mega.data.templates import Template, encode
from r1mega.errors import UserError
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.report.response import Parts, parts
from r1mega.rollout.engine import Request, SamplingParams
from r1mega.rollout.open import open_engine

LONGEST = 32_768
"""Tokens of a response where nothing else was asked for (paper: the length cap of every evaluation)."""


@dataclass(frozen=True)
class Settings:
    """How a question is shown, and the response drawn."""

    template: Template | None = None
    """None: the tokenizer's chat template where there is one, else the bare question."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int | None = None
    """None: what the context leaves, at most `LONGEST`."""
    seed: int = 1


@dataclass(frozen=True)
class Reply:
    """A response, and how it ended."""

    parts: Parts
    tokens: int
    cut: bool
    """The response reached the longest length that was allowed."""


class Model:
    """A Hugging Face folder, ready to be asked.

    Raises:
        UserError: the folder is none that the embedded engine runs, or has no chat template where `settings` ask for one.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._folder, self._settings, self._asked = ModelFolder(path), settings, 0
        has_template = bool(self._folder.tokenizer.chat_template)
        if settings.template == "chat" and not has_template:
            raise UserError(f"{path}: its tokenizer has no chat template; use --template r1_zero or --template none")
        self.template: Template = settings.template or ("chat" if has_template else "none")
        # The smallest prompt is one token; a real one is held against the context when it is asked.
        self._folder.prompt_room(settings.max_new_tokens or 1)
        self._engine = open_engine(Rollout(), path)
        self._engine.sync(self._folder, version=0)

    def ask(self, question: str) -> Reply:
        """Draw a response. The same question asked again gets another one; the n-th question after a start always the same."""
        self._asked += 1
        settings, tokenizer = self._settings, self._folder.tokenizer
        room = self._folder.prompt_room(settings.max_new_tokens or 1)
        (ids,) = encode([Prompt(str(self._asked), question)], self.template, tokenizer, room)
        longest = settings.max_new_tokens or min(LONGEST, self._folder.arch.max_positions - len(ids))
        seed = int.from_bytes(blake2b(f"{settings.seed}/{self._asked}".encode(), digest_size=8).digest())
        sampling = SamplingParams(settings.temperature, settings.top_p, self._folder.stop_token_ids)
        (sample,) = self._engine.generate([Request(ids, seed, longest)], sampling)
        text = str(tokenizer.decode(list(sample.response_ids), skip_special_tokens=True))
        return Reply(parts(text), len(sample.response_ids), sample.finish == "length")


def run(path: Path, question: str | None, settings: Settings, threads: int) -> None:
    """Print the reply to one question; without one, to every line until the end of the input."""
    torch.set_num_threads(threads)
    console = Console(highlight=False)
    model = Model(path, settings)
    if question is not None:
        show(console, model.ask(question))
        return
    for line in _lines(console):
        try:
            show(console, model.ask(line))
        except UserError as error:
            # One question that cannot be asked does not end the conversation.
            console.print(Text(f"r1mega: {error}"), style="red", soft_wrap=True)


def show(console: Console, reply: Reply) -> None:
    """The thought dimmed, the answer bright, then how long they were."""
    if reply.parts.thought is not None:
        console.print(Text("thought"), style="dim italic")
        console.print(Text(_visible(reply.parts.thought)), style="dim", soft_wrap=not console.is_terminal)
        console.print(Text("answer"), style="dim italic")
    console.print(Text(_visible(reply.parts.answer)), style="bold", soft_wrap=not console.is_terminal)
    ending = ", cut off there" if reply.cut else ""
    console.print(Text(f"{reply.tokens} tokens{ending}"), style="dim")


def _lines(console: Console) -> Iterator[str]:
    talking = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold cyan]> [/]") if talking else input()
        except (EOFError, KeyboardInterrupt):
            if talking:
                console.print()
            return
        if line.strip():
            yield line


def _visible(text: str) -> str:
    """What a terminal obeys, such as escape sequences, is shown instead."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)

"""The process in which rewards are judged. It is started by `rewards.judge`, may be killed at any moment, and keeps no state.

Both directions are JSON lines: nothing that a reward makes is unpickled by the trainer.
It imports neither torch nor the trainer's main module.
"""

import json
import math
import numbers
import os
import resource
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1mega.data.prompts import Message, Prompt
from r1mega.errors import UserError
from r1mega.process import die_with_parent
from r1mega.rewards.imports import load_function

Case = tuple[str, Prompt | str, str]
"""One call to make: the function's name and its two arguments, a prompt and a response, or two answers."""

NO_VALUE = ("returned None", "returned nan")
"""Reasons of verdicts where the function itself had nothing to say."""

_LONGEST_REASON = 300
"""Characters."""


def pack(cases: Sequence[Case]) -> dict[str, Any]:
    """Cases as JSON values; prompts that several cases share are there once."""
    prompts: dict[int, Prompt | str] = {id(prompt): prompt for _, prompt, _ in cases}
    places = {key: place for place, key in enumerate(prompts)}
    return {
        "prompts": [prompt if isinstance(prompt, str) else _plain(prompt) for prompt in prompts.values()],
        "cases": [(reward, places[id(prompt)], response) for reward, prompt, response in cases],
    }


def unpack(message: dict[str, Any]) -> list[Case]:
    """The inverse of `pack`."""
    prompts = [fields if isinstance(fields, str) else _prompt(fields) for fields in message["prompts"]]
    return [(reward, prompts[place], response) for reward, place, response in message["cases"]]


def _plain(prompt: Prompt) -> dict[str, Any]:
    return vars(prompt) | {"history": [vars(message) for message in prompt.history]}


def _prompt(fields: dict[str, Any]) -> Prompt:
    return Prompt(**fields | {"history": tuple(Message(**turn) for turn in fields["history"])})


def main() -> None:
    """Serve standard input until it closes.

    The first line is the set-up: `functions` (reward name -> import path), `texts` (those that return texts -> number of arguments),
    `search_path`, `memory` in bytes; it is answered by `{"ready": true}` or `{"refused": why}`. Each further line holds packed cases, and
    each case is answered by a line `[value, reason, text]` as soon as it is judged.
    """
    die_with_parent()
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    # A reward that prints or reads would speak into the protocol.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    setup = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (setup["memory"], setup["memory"]))
    search_path = [Path(folder) for folder in setup["search_path"]]
    texts: dict[str, int] = setup["texts"]
    try:
        functions = {name: load_function(path, search_path, texts.get(name, 2)) for name, path in setup["functions"].items()}
    except UserError as error:
        _send(answers, {"refused": str(error)})
        return
    _send(answers, {"ready": True})
    for line in requests:
        for reward, prompt, response in unpack(json.loads(line)):
            given = (response,) if texts.get(reward) == 1 else (prompt, response)
            _send(answers, _judge(functions[reward], given, reward in texts))


def _judge(function: Callable[..., Any], given: tuple[Any, ...], is_text: bool) -> tuple[float | None, str | None, str | None]:
    """(value, None, None), or (None, why it could not be judged, None); of one that returns a text or None, (None, None, what it said)."""
    try:
        value = function(*given)
        if is_text:
            said = value is None or isinstance(value, str)
            return (None, None, value) if said else (None, f"returned {type(value).__name__}, not a text", None)
        value = value.item() if hasattr(value, "item") else value  # NumPy's scalars
        if value is None:
            return None, NO_VALUE[0], None
        if not isinstance(value, numbers.Real):
            return None, f"returned {type(value).__name__}, not a number", None
        number = float(value)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        where = traceback.extract_tb(error.__traceback__)[1:]  # without the call above
        return None, f"{reason} ({Path(where[-1].filename).name}, line {where[-1].lineno})" if where else reason, None
    return (number, None, None) if math.isfinite(number) else (None, f"returned {number}", None)


def _send(answers: int, message: Any) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(answers, line) :]

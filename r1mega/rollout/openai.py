"""A server behind an OpenAI-compatible chat completions endpoint. The only file that speaks its protocol."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch.distributed as dist

from r1mega import env, heartbeat
from r1mega.config.base import at
from r1mega.config.chats import Endpoint
from r1mega.config.rollout import Sampling
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError
from r1mega.pipeline import ranks
from r1mega.rollout.ask import Question, sample_seed
from r1mega.rollout.teacher import Answer

_MEET_S = 60.0
"""Seconds after which the ranks meet while rank 0 waits for answers; a collective gives up after half an hour."""
_CONNECT_S = 30.0
_PROBE_S = 300.0
"""Seconds that a server, which may be busy with others' requests, has for the first token of all."""
_GIVE_UP = 16
"""Failed requests in a row after which a server is taken to be gone; more where more are under way at once."""
_SEEDS = 2**31
"""Servers differ in the integers that they take for a seed; all take these."""


def credentials(endpoint: Endpoint) -> str | None:
    """The API key, None where the endpoint names none. UserError: the variable that holds it is not set, or openai is not installed."""
    if find_spec("openai") is None:
        raise UserError("an endpoint is asked through the openai package; install it: pip install 'r1mega[endpoint]'")
    return env.secret(endpoint.key_variable) if endpoint.key_variable else None


class EndpointTeacher:
    """A model that a server answers for. It is shown messages, and its own chat template makes them a prompt."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling) -> None:
        """Ask the server for one token; every rank calls it.

        Raises:
            UserError: the openai package or the API key is missing, nothing answers, or the server refuses the key, the model or the
                settings.
        """
        self._server: _Server | None = None
        self._url = endpoint.url
        if dist.get_rank() == 0:
            self._server = _Server(endpoint, sampling)
            self._server.probe()
        ranks.shared(lambda: None)

    def answer(self, questions: Sequence[Question], k: int, seed: str) -> list[list[Answer]]:
        """k answers to each question, in order, the same on every rank; every rank calls it with the same arguments.

        Each answer is a request of its own, with a seed made of `seed`, the question's id and the answer's number; whether that makes it
        repeatable is the server's affair. A request that fails after all retries is an answer with finish "failed". When many in a row fail
        (all that are under way at once, and no fewer than 16), the server is taken to be gone: what is left is not asked, and has failed.

        Rank 0 asks. The others wait with it in collectives of at most a minute each, so that answers may take as long as they like:
        what bounds them is the endpoint's `timeout_s`, for which the server may be silent, times its attempts.
        """
        pending = self._server.send(questions, k, seed) if self._server else []
        with heartbeat.phase("generate"):
            heartbeat.waiting(len(questions) * k, f"{len(questions) * k} answers of {self._url}")
            while left := ranks.shared(lambda: len(wait(pending, timeout=_MEET_S).not_done)):
                heartbeat.waiting(left, f"{left} answers of {self._url}")
        flat = ranks.shared(lambda: [future.result() for future in pending])
        return [flat[start : start + k] for start in range(0, len(flat), k)]


class _Server:
    """The connection, on rank 0."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling) -> None:
        self._key = credentials(endpoint)
        import openai

        self._openai, self._endpoint = openai, endpoint
        self._client = openai.OpenAI(
            base_url=endpoint.url,
            api_key=self._key or "none",
            timeout=openai.Timeout(endpoint.timeout_s, connect=min(_CONNECT_S, endpoint.timeout_s)),
            max_retries=endpoint.retries,
        )
        self._settings: dict[str, Any] = {
            "temperature": at(sampling.temperature, 0),
            "top_p": at(sampling.top_p, 0),
            "max_tokens": int(at(sampling.max_new_tokens, 0)),
        }
        self._lock = Lock()
        self._failed_in_a_row = 0

    def probe(self) -> None:
        """UserError, in one line, for a server that will not answer."""
        url, model = self._endpoint.url, self._endpoint.model
        client = self._client.with_options(timeout=min(_PROBE_S, self._endpoint.timeout_s))
        try:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello"}], seed=0, **self._settings | {"max_tokens": 1}
            )
        except self._openai.APIConnectionError as error:
            raise UserError(f"nothing answers at {url} ({self._said(error)}); start the server, or mend endpoint.url") from None
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            held = f"what {self._endpoint.key_variable} holds" if self._key else "a request without one; name its endpoint.key_variable"
            raise UserError(f"{url} refuses the API key: {held} ({self._said(error)})") from None
        except self._openai.NotFoundError as error:
            raise UserError(f"{url} has no model {model!r}, or no chat completions{self._models()} ({self._said(error)})") from None
        except (self._openai.OpenAIError, ValueError) as error:
            raise UserError(f"{url} does not answer for the model {model!r}: {self._said(error)}{self._models()}") from None
        if not getattr(reply, "choices", None):
            raise UserError(f"{url} answers with something that is no chat completion; is it the base URL up to and with /v1?")

    def _models(self) -> str:
        try:
            names = [model.id for model in self._client.with_options(max_retries=0).models.list().data]
        except (self._openai.OpenAIError, ValueError, AttributeError, TypeError):
            return ""
        return f"; it has {', '.join(names[:8])}" if names else ""

    def send(self, questions: Sequence[Question], k: int, seed: str) -> list[Future[Answer]]:
        """Begin to ask, as many at once as the endpoint allows."""
        self._failed_in_a_row = 0
        threads = ThreadPoolExecutor(self._endpoint.concurrency, thread_name_prefix="endpoint")
        pending = [
            threads.submit(self._ask, question.prompt, sample_seed(f"{seed}/{question.prompt.id}/{index}") % _SEEDS)
            for question in questions
            for index in range(k)
        ]
        threads.shutdown(wait=False)  # they end when nothing is left to ask
        return pending

    def _ask(self, prompt: Prompt, seed: int) -> Answer:
        if self._failed_in_a_row >= max(_GIVE_UP, self._endpoint.concurrency):
            return Answer("", "failed", error=f"not asked: the last {self._failed_in_a_row} requests have failed")
        messages: list[Any] = [*map(vars, prompt.history), {"role": "user", "content": prompt.text}]
        try:
            reply = self._client.chat.completions.create(model=self._endpoint.model, messages=messages, seed=seed, **self._settings)
        except (self._openai.OpenAIError, ValueError) as error:
            with self._lock:
                self._failed_in_a_row += 1
            return Answer("", "failed", error=self._said(error))
        self._failed_in_a_row = 0
        return answer_of(reply)

    def _said(self, error: Exception) -> str:
        """An error in one line. Servers repeat keys that they refuse."""
        text = " ".join(str(error.__cause__ or error).split())
        if isinstance(error, self._openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            text = f"HTTP {error.status_code}: {body.get('message') or error.message}"
        elif isinstance(error, json.JSONDecodeError):
            text = f"no JSON: {text}"
        elif isinstance(error, self._openai.APITimeoutError):
            text = "no answer in time"
        return (text.replace(self._key, "<key>") if self._key else text)[:300]


def answer_of(reply: Any) -> Answer:
    """The answer in a chat completion.

    A thought that the server parsed out (`reasoning_content` of DeepSeek's API and SGLang, `reasoning` of vLLM since 0.11) is put back
    where the model wrote it; so is the opening tag that some chat templates, DeepSeek-R1's among them, write themselves.
    """
    choices = getattr(reply, "choices", None)
    if not choices or choices[0].message is None:
        return Answer("", "failed", error="the reply is no chat completion")
    message, finish = choices[0].message, choices[0].finish_reason
    if finish not in ("stop", "length"):
        return Answer("", "failed", error=f"the server ended the answer with finish_reason {finish!r}")
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    content = message.content or ""
    if thought is None:
        unopened = "</think>" in content and "<think>" not in content
        return Answer(f"<think>\n{content}" if unopened else content, finish)
    if finish == "length" and not content:
        return Answer(f"<think>\n{thought.strip()}", finish)
    return Answer(f"<think>\n{thought.strip()}\n</think>\n\n{content.strip()}", finish)

"""A chat completions server of the standard library, for the tests: it says what it is told to, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-tests-0123456789abcdef"


@dataclass
class Reply:
    """What the server answers with."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def said(content: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return Reply(body={"id": "1", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]})


def refused(status: int, message: str) -> Reply:
    return Reply(status, {"error": {"message": message, "type": "error"}})


@dataclass
class Server:
    """A server that is up. `requests` are the bodies of the chat completions asked for, in the order of their arrival, probes left out."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    probes: int = 0
    keys: set[str | None] = field(default_factory=set)
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, text: str) -> int:
        """How often the server was asked something whose last message begins like this."""
        return sum(request["messages"][-1]["content"].startswith(text) for request in self.requests)


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply], probe: Reply | None = None, key: str | None = KEY) -> Iterator[Server]:
    """Run a server. `reply(request, attempt)` answers the attempt (from 0) to a request; `probe` answers requests of one token."""
    attempts: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.keys.add(self.headers["authorization"])
                server.busy += 1
                server.busiest = max(server.busiest, server.busy)
            try:
                self._send(self._found(request))
            except BrokenPipeError:
                pass
            finally:
                with server.lock:
                    server.busy -= 1

        def do_GET(self) -> None:
            self._send(Reply(body={"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "us"}]}))

        def _found(self, request: dict[str, Any]) -> Reply:
            if key is not None and self.headers["authorization"] != f"Bearer {key}":
                return refused(401, f"Incorrect API key provided: {self.headers['authorization']}")
            if request["model"] != "toy":
                return refused(404, f"The model `{request['model']}` does not exist.")
            if request["max_tokens"] == 1:
                server.probes += 1
                return probe or said("Hi", "length")
            with server.lock:
                server.requests.append(request)
                name = json.dumps(request["messages"]) + str(request["seed"])
                attempt = attempts[name] = attempts.get(name, -1) + 1
            return reply(request, attempt)

        def _send(self, found: Reply) -> None:
            text = found.body if isinstance(found.body, str) else json.dumps(found.body)
            self.send_response(found.status)
            self.send_header("content-type", "text/html" if isinstance(found.body, str) else "application/json")
            self.send_header("content-length", str(len(text.encode())))
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    http = Threads(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()

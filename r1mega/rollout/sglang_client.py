"""HTTP with one SGLang server: every call has a deadline, every failure is one of two kinds."""

import http.client
import json
import socket
from dataclasses import dataclass, field
from threading import local
from typing import Any
from urllib.parse import urlsplit

_ACCEPT_S = 10.0


class Unanswered(Exception):
    """The server gave no answer, or one that says that it is not well: another attempt may succeed."""


class Refused(Exception):
    """The server answered that it will not do this (a status of 400 to 499)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Client:
    """One server. Threads may share a client: each has its own connection, kept open between calls."""

    address: str
    """http://host:port"""
    key: str | None = field(repr=False, default=None)
    _local: local = field(default_factory=local, repr=False)

    def post(self, path: str, body: Any, timeout_s: float) -> Any:
        """What the server answers to `body`: a value from JSON, or else a text.

        Raises:
            Unanswered: nothing came within `timeout_s` seconds, or the connection broke, or the server failed (status 500 and above).
            Refused: the server does not take the request.
        """
        return self._call("POST", path, json.dumps(body).encode(), timeout_s)

    def get(self, path: str, timeout_s: float) -> Any:
        """As `post`, without a body."""
        return self._call("GET", path, None, timeout_s)

    def answers(self, timeout_s: float) -> bool:
        """Whether a server is there that has loaded its model. It need not generate: one that is paused for a sync answers."""
        try:
            self.get("/model_info", timeout_s)
        except (Unanswered, Refused):
            return False
        return True

    def _call(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        connection = self._connection()
        try:
            _connect(connection, timeout_s)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
        except TimeoutError:
            connection.close()
            raise Unanswered(f"{self.address}{path}: no answer within {timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unanswered(f"{self.address}{path}: {str(error) or type(error).__name__}") from None
        if response.status >= 500:
            raise Unanswered(f"{self.address}{path}: HTTP {response.status}: {_said(text)}")
        if response.status >= 400:
            raise Refused(response.status, f"{self.address}{path}: HTTP {response.status}: {_said(text)}")
        if not (response.getheader("Content-Type") or "").startswith("application/json"):
            return text.decode(errors="replace")
        try:
            return json.loads(text)
        except ValueError as error:
            raise Unanswered(f"{self.address}{path}: answered with broken JSON ({error})") from None

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's, open or not."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            parts = urlsplit(self.address)
            made = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = self._local.connection = made(parts.hostname or "", parts.port)
        return connection


def _connect(connection: http.client.HTTPConnection, timeout_s: float) -> None:
    """Open a connection, also one that the server has closed meanwhile; its answers may take `timeout_s` seconds then."""
    if connection.sock is not None and _hung_up(connection.sock):
        connection.close()
    if connection.sock is None:
        # Whoever is there accepts at once, however long answers take.
        connection.timeout = min(timeout_s, _ACCEPT_S)
        try:
            connection.connect()
        except TimeoutError:
            raise ConnectionError(f"takes no connection within {connection.timeout:g} s") from None
    connection.sock.settimeout(timeout_s)


def _hung_up(sock: socket.socket) -> bool:
    """Between calls a server sends nothing, so whatever can be read is the end of the connection."""
    sock.settimeout(0)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
    return True


def _said(text: bytes) -> str:
    """The message in an error's body, in one short line."""
    shown = text.decode(errors="replace")
    try:
        found = json.loads(shown)
        found = found.get("error", found) if isinstance(found, dict) else found
        shown = str(found.get("message", found) if isinstance(found, dict) else found)
    except ValueError:
        pass
    return " ".join(shown.split())[:300]

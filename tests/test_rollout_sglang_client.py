"""Calls to servers, without SGLang: deadlines, kinds of failure, connections, and how a rank's requests are spread."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1mega.errors import UserError
from r1mega.rollout import sglang_client
from r1mega.rollout.engine import Request
from r1mega.rollout.sglang import SglangEngine, _Pool
from r1mega.rollout.sglang_client import Client, Refused, Unanswered


class Script(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]] = set()

    def do_POST(self) -> None:
        self.connections.add(self.client_address)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(body.get("sleep", 0))
        text = body["says"].encode()
        self.send_response(body.get("status", 200))
        self.send_header("Content-Type", body.get("type", "application/json"))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        if body.get("hang_up"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def client() -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Script.connections.clear()
    yield Client(f"http://127.0.0.1:{server.server_port}", "secret")
    server.shutdown()
    server.server_close()


def test_answers_are_json_or_text(client):
    assert client.post("/any", {"says": '{"a": [1.5]}'}, 10) == {"a": [1.5]}
    assert client.post("/any", {"says": "Cache flushed.\n", "type": "text/plain"}, 10) == "Cache flushed.\n"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ({"says": '{"error": {"message": "too\\nlong"}}', "status": 400}, Refused, "/any: HTTP 400: too long"),
        ({"says": '{"error": "Unauthorized"}', "status": 401}, Refused, "/any: HTTP 401: Unauthorized"),
        ({"says": "out of memory", "status": 500}, Unanswered, "/any: HTTP 500: out of memory"),
        ({"says": "{", "status": 200}, Unanswered, "answered with broken JSON"),
        ({"says": "{}", "sleep": 2}, Unanswered, "no answer within 0.5 s"),
    ],
)
def test_failures_are_one_line_of_two_kinds(client, body, kind, message):
    with pytest.raises(kind, match=message) as error:
        client.post("/any", body, 0.5 if "sleep" in body else 10)
    assert str(error.value).startswith(f"{client.address}/any: ")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value) + repr(client)
    assert client.post("/any", {"says": "{}"}, 10) == {}, "the next call has a connection that is in step"


def test_nothing_at_an_address_is_not_answered():
    with pytest.raises(Unanswered, match="refused"):
        Client("http://127.0.0.1:9").get("/model_info", 5)
    assert not Client("http://127.0.0.1:9").answers(5)


def test_an_address_that_takes_no_connection_is_given_up_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_client, "_ACCEPT_S", 0.5)
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # as many as Linux keeps there for whoever accepts some day
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(Unanswered, match=r"/model_info: takes no connection within 0.5 s"):
            Client(f"http://127.0.0.1:{full.getsockname()[1]}").get("/model_info", 30)


def test_a_connection_is_kept_and_opened_again_when_the_server_has_closed_it(client):
    for _ in range(3):
        client.post("/any", {"says": "{}"}, 10)
    assert len(Script.connections) == 1
    client.post("/any", {"says": "{}", "hang_up": True}, 10)
    time.sleep(0.2)
    client.post("/any", {"says": "{}"}, 10)
    assert len(Script.connections) == 2


def test_requests_are_spread_in_order_and_so_many_at_once():
    clients = [Client(f"http://{name}") for name in ("a", "b", "c")]
    pool, lock, now, most, seen = _Pool(clients, concurrency=6, retries=0), threading.Lock(), Counter(), Counter(), Counter()

    def call(number: int, client: Client) -> int:
        with lock:
            now.update([client.address])
            seen.update([client.address])
            most["all"] = max(most["all"], now.total())
            most[client.address] = max(most[client.address], now[client.address])
        time.sleep(0.01)
        with lock:
            now.subtract([client.address])
        return number

    pending = [pool.submit(lambda client, number=number: call(number, client)) for number in range(60)]
    assert [future.result() for future in pending] == list(range(60))
    assert most["all"] <= 6
    assert all(most[client.address] <= 2 for client in clients)
    assert min(seen[client.address] for client in clients) >= 15
    pool.close()


def test_a_call_that_fails_goes_elsewhere_and_gives_up_in_the_end():
    clients, asked = [Client("http://a"), Client("http://b")], []

    def call(client: Client) -> str:
        asked.append(client.address)
        if client.address == "http://a" or len(asked) > 2:
            raise Unanswered("down")
        return client.address

    pool = _Pool(clients, concurrency=1, retries=1)
    assert pool.submit(call).result() == "http://b"
    assert asked == ["http://a", "http://b"]
    with pytest.raises(Unanswered, match="down"):
        pool.submit(call).result()
    assert len(asked) == 4
    pool.close()


def test_how_a_response_ended_is_taken_from_no_text():
    client, request = Client("http://a"), Request((5, 6), 1, 8)

    def finish(drawn: int, **reason: object) -> str:
        return SglangEngine._finish(client, reason, request, drawn)

    assert finish(3, type="stop", matched=2) == "stop"
    assert finish(8, type="length", length=8) == "length"
    with pytest.raises(Unanswered, match="broke off after 3 tokens: NaN happened"):
        finish(3, type="stop", matched="NaN happened")
    with pytest.raises(Unanswered, match="abort"):
        finish(3, type="abort", message="gone")
    with pytest.raises(UserError, match="cut a response after 3 of 8 tokens"):
        finish(3, type="length", length=3)

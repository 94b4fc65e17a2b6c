"""Answers from a server that speaks the chat completions protocol: what is asked, what comes back, and what happens when it does not."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("openai")
from endpoint_server import KEY, Reply, Server, refused, said, serving

from r1mega.config.chats import Endpoint
from r1mega.config.rollout import Sampling
from r1mega.data.prompts import Message, Prompt
from r1mega.errors import UserError
from r1mega.rollout import openai
from r1mega.rollout.ask import Question
from r1mega.rollout.openai import EndpointTeacher

SOON = {"x-should-retry": "true", "retry-after-ms": "5"}
"""Headers with which the client waits for milliseconds instead of seconds."""


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def teacher(server: Server | str, sampling: Sampling | None = None, **settings: Any) -> EndpointTeacher:
    url = server if isinstance(server, str) else server.url
    given = {"model": "toy", "key_variable": "TEACHER_KEY", "retries": 2, "timeout_s": 10.0, "concurrency": 4} | settings
    return EndpointTeacher(Endpoint(url=url, **given), sampling or Sampling())


def questions(count: int) -> list[Question]:
    return [Question(Prompt(f"q{index}", f"question {index}", history=(Message("system", "be brief"),)), ()) for index in range(count)]


def echo(request: dict[str, Any], attempt: int) -> Reply:
    number = request["messages"][-1]["content"].split()[-1]
    time.sleep(0.03 if int(number) % 3 == 0 else 0.0)  # the first to be asked are the last to be answered
    return said(f"answer {number} {request['seed']}")


def test_answers_are_in_order_whatever_order_they_arrive_in() -> None:
    with serving(echo) as server:
        asked = teacher(server, Sampling(temperature=0.6, top_p=0.95, max_new_tokens=77))
        first, again = asked.answer(questions(7), 3, "0/s/1"), asked.answer(questions(7)[::-1], 3, "0/s/1")
    assert [[answer.text.split()[1] for answer in group] for group in first] == [[str(index)] * 3 for index in range(7)]
    assert first == again[::-1]  # seeds depend on the question and the number of the answer alone
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == 21 and all(0 <= seed < 2**31 for seed in seeds) and len(server.requests) == 42
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "be brief"} and request["messages"][1]["role"] == "user"
    assert (request["temperature"], request["top_p"], request["max_tokens"], request["model"]) == (0.6, 0.95, 77, "toy")
    assert server.keys == {f"Bearer {KEY}"} and server.probes == 1
    assert 1 < server.busiest <= 4


@pytest.mark.parametrize("concurrency", [2, 8])
def test_requests_under_way_are_bounded(concurrency: int) -> None:
    meeting = threading.Barrier(concurrency, timeout=20)  # nobody is answered before so many have asked

    def together(request: dict[str, Any], attempt: int) -> Reply:
        meeting.wait()
        return said("x")

    with serving(together) as server:
        groups = teacher(server, concurrency=concurrency, timeout_s=60.0).answer(questions(8), 1, "s")
    assert all(group[0].text == "x" for group in groups) and server.busiest == concurrency


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_request_that_failed_is_sent_again(status: int) -> None:
    def shaky(request: dict[str, Any], attempt: int) -> Reply:
        return said("done") if attempt == 2 else Reply(status, {"error": {"message": "later"}}, SOON)

    with serving(shaky) as server:
        (group,) = teacher(server, retries=2).answer(questions(1), 2, "s")
        assert [(answer.text, answer.finish) for answer in group] == [("done", "stop")] * 2
        assert len(server.requests) == 6 and len({request["seed"] for request in server.requests}) == 2  # the seed stays
        (group,) = teacher(server, retries=1).answer(questions(1), 1, "t")
    assert group[0].finish == "failed" and group[0].text == "" and group[0].error == f"HTTP {status}: later"


def test_pauses_grow() -> None:
    begins = []

    def down(request: dict[str, Any], attempt: int) -> Reply:
        begins.append(time.monotonic())
        return refused(500, "down")

    with serving(down) as server:
        teacher(server, retries=2).answer(questions(1), 1, "s")
    assert begins[1] - begins[0] > 0.37 and begins[2] - begins[1] > 0.74  # 0.5 s and 1 s, less up to a quarter


def test_a_server_that_is_silent_has_failed() -> None:
    def asleep(request: dict[str, Any], attempt: int) -> Reply:
        time.sleep(5.0)
        return said("late")

    with serving(asleep) as server:
        begin = time.monotonic()
        (group,) = teacher(server, retries=0, timeout_s=1.5).answer(questions(1), 1, "s")
    assert (group[0].finish, group[0].error) == ("failed", "no answer in time") and time.monotonic() - begin < 4.5


def test_a_server_that_is_gone_is_not_asked_for_ever() -> None:
    with serving(lambda request, attempt: refused(400, "no more")) as server:
        groups = teacher(server, concurrency=2).answer(questions(100), 1, "s")
        assert 16 <= len(server.requests) <= 18
        assert all(group[0].finish == "failed" for group in groups) and groups[-1][0].error == "not asked: the last 16 requests have failed"
    fails = iter(range(1000))
    with serving(lambda request, attempt: refused(400, "now and then") if next(fails) % 3 else said("x")) as server:
        groups = teacher(server, concurrency=1).answer(questions(60), 1, "s")
    assert len(server.requests) == 60 and sum(group[0].finish == "failed" for group in groups) == 40


@pytest.mark.parametrize(
    ("reply", "text", "finish"),
    [
        (said("<think>\na\n</think>\n\nb"), "<think>\na\n</think>\n\nb", "stop"),
        (said("b", reasoning_content="a\n"), "<think>\na\n</think>\n\nb", "stop"),
        (said("\n\nb", reasoning="a"), "<think>\na\n</think>\n\nb", "stop"),
        (said("b", reasoning_content=None), "b", "stop"),
        (said("a\n</think>\n\nb"), "<think>\na\n</think>\n\nb", "stop"),
        (said(None, "length", reasoning_content="a b c"), "<think>\na b c", "length"),
        (said("b c", "length", reasoning_content="a"), "<think>\na\n</think>\n\nb c", "length"),
        (said("b", "content_filter"), "", "failed"),
        (Reply(body="<html>busy</html>"), "", "failed"),
        (Reply(body={"object": "error", "message": "?"}), "", "failed"),
    ],
)
def test_the_thought_is_where_the_model_wrote_it(reply: Reply, text: str, finish: str) -> None:
    with serving(lambda request, attempt: reply) as server:
        (group,) = teacher(server).answer(questions(1), 1, "s")
    assert (group[0].text, group[0].finish, group[0].ids) == (text, finish, None)
    assert (group[0].error is None) == (finish != "failed")


def _rank(rank: int, port: int, url: str, folder: Path) -> None:
    """Ask with a process group that waits for one second in a collective, and for longer than that in all."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    asked = teacher(url)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2, timeout=timedelta(seconds=1))
    openai._MEET_S = 0.2
    groups = asked.answer(questions(3), 2, "s")
    (folder / f"{rank}.json").write_text(json.dumps([[answer.text for answer in group] for group in groups]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_do_not_ask_wait_longer_than_a_collective_does(tmp_path: Path) -> None:
    def slow(request: dict[str, Any], attempt: int) -> Reply:
        time.sleep(1.5)
        return said(request["messages"][-1]["content"])

    with serving(slow) as server:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(_rank, (store.port, server.url, tmp_path), nprocs=2)
    expected = [[f"question {index}"] * 2 for index in range(3)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
    assert len(server.requests) == 6 and server.probes == 1  # rank 0 alone has asked


def test_no_server() -> None:
    with pytest.raises(UserError, match=r"nothing answers at http://127.0.0.1:9/v1 \(.*refused\); start the server, or mend endpoint.url"):
        teacher("http://127.0.0.1:9/v1", retries=0)


def test_a_wrong_key_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(echo, key="another") as server:
        with pytest.raises(UserError, match="refuses the API key: what TEACHER_KEY holds") as error:
            teacher(server)
        assert KEY not in str(error.value) and "<key>" in str(error.value)
        with pytest.raises(UserError, match=r"a request without one; name its endpoint.key_variable"):
            teacher(server, key_variable=None)
        monkeypatch.setenv("TEACHER_KEY", " ")
        with pytest.raises(UserError, match=r"the environment variable TEACHER_KEY, .* is not set; export it"):
            teacher(server)
        assert server.requests == []


def test_an_unknown_model_is_refused_with_those_that_there_are() -> None:
    with serving(echo) as server, pytest.raises(UserError, match=r"has no model 'other'.*it has toy .*HTTP 404: The model `other`"):
        teacher(server, model="other")
    with serving(echo, probe=refused(400, "top_p is not supported")) as server, pytest.raises(UserError, match="top_p is not supported"):
        teacher(server)
    with serving(echo, probe=Reply(body="<html></html>")) as server, pytest.raises(UserError, match="up to and with /v1"):
        teacher(server)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'r1mega\[endpoint\]'"):
        teacher("http://127.0.0.1:9/v1")

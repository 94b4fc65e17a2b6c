"""A stand-in for an SGLang server where only its behaviour matters: it starts at once, and does what the file `behaviour` beside it says.

ok: tokens that are a function of prompt length and seed; slow: the same, a while later; silent: nothing, ever; memory: dies of too little
of it; stale: says that older weights drew; broken: its second part dies as it starts. Like SGLang it dies when it is put to sleep or woken
at the wrong time, and hears nobody once a part of it on another node is gone. Started with the arguments of `rollout/in_sglang/serve`.
"""

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

state: dict[str, Any] = {"version": "default", "released": set(), "paused": False, "running": 0, "lost": False}


def behaviour() -> str:
    return Path("behaviour").read_text() if Path("behaviour").exists() else "ok"


def die(reason: str) -> None:
    print(reason, flush=True)
    os._exit(1)


def generate(body: dict[str, Any]) -> dict[str, Any]:
    if state["released"]:
        die("AssertionError: asked while memory is released")
    if behaviour() == "memory":
        die("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    if behaviour() == "silent":
        time.sleep(600)
    if behaviour() == "slow":
        time.sleep(1.0)
    settings = body["sampling_params"]
    ids = [3 + (len(body["input_ids"]) + settings["sampling_seed"] + place) % 100 for place in range(settings["max_new_tokens"])]
    version = "1" if behaviour() == "stale" else state["version"]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    meta = {"output_token_logprobs": [[-1.0, one, None] for one in ids], "finish_reason": {"type": "length"}, "weight_versions": spans}
    return {"output_ids": ids, "meta_info": meta}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hang()
        self.answer({"model_path": "standin"})

    def hang(self) -> None:
        """As a collective of which a rank is gone."""
        if state["lost"]:
            time.sleep(600)

    def do_POST(self) -> None:
        self.hang()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        path = self.path.partition("?")[0]
        with Path("calls").open("a") as calls:
            calls.write(path + (f" {' '.join(body['tags'])}" if "tags" in body else "") + "\n")
        found: dict[str, Any] = {"success": True, "message": ""}
        if path == "/generate":
            state["running"] += 1
            found = generate(body)
            self.hang()
            state["running"] -= 1
        elif path == "/update_weight_version":
            state["version"] = body["new_version"]
        elif path == "/release_memory_occupation":
            if state["running"] or state["released"] & set(body["tags"]):
                die("AssertionError: release_memory_occupation should be called only when server is idle.")
            state["released"] |= set(body["tags"])
        elif path == "/resume_memory_occupation":
            if not set(body["tags"]) <= state["released"]:
                die("KeyError: resumed what was not released")
            state["released"] -= set(body["tags"])
        elif path.startswith("/update_weights") and "weights" in state["released"]:
            die("RuntimeError: weights without memory")
        self.answer(found)

    def answer(self, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def told(flag: str, default: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


def follow(host: str, port: int) -> None:
    """A part that is not the first: there, and no more."""
    if behaviour() == "broken":
        die("RuntimeError: no GPU 3 on this node")
    while True:
        with socket.create_connection((host, port), timeout=30) as first:
            first.settimeout(None)
            first.recv(1)
        time.sleep(600)  # as one that waits in a collective


def gather(host: str, port: int, parts: int) -> None:
    """The first part: wait for all others."""
    with socket.create_server((host, port)) as meeting:
        for _ in range(parts - 1):
            other, _ = meeting.accept()
            threading.Thread(target=watch, args=(other,), daemon=True).start()


def watch(other: socket.socket) -> None:
    other.recv(1)
    state["lost"] = True


if __name__ == "__main__":
    assert ("R1MEGA_ENGINE_KEY" in os.environ) == (told("--node-rank", "0") == "0"), "the key is for the part that serves"
    where, _, number = told("--dist-init-addr", ":0").rpartition(":")
    if told("--node-rank", "0") != "0":
        follow(where, int(number))
    # Backwards, for a test that looks for it in all files.
    Path("key").write_text(os.environ["R1MEGA_ENGINE_KEY"][::-1])
    if where:
        gather(where, int(number), int(told("--nnodes", "1")))
    server = ThreadingHTTPServer((told("--host", ""), int(told("--port", ""))), Handler)
    threading.Thread(target=server.serve_forever).start()

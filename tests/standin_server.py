"""A stand-in for an SGLang server where only its behaviour matters: it starts at once, and does what the file `behaviour` beside it says.

ok: tokens that are a function of prompt length and seed; slow: the same, a while later; memory: dies of too little of it; stale: says that
older weights drew. Like SGLang it dies when it is put to sleep or woken at the wrong time. Started with the arguments of `sglang_serve`.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

state: dict[str, Any] = {"version": "default", "released": set(), "paused": False, "running": 0}


def die(reason: str) -> None:
    print(reason, flush=True)
    os._exit(1)


def generate(body: dict[str, Any]) -> dict[str, Any]:
    behaviour = Path("behaviour").read_text()
    if state["released"]:
        die("AssertionError: asked while memory is released")
    if behaviour == "memory":
        die("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    if behaviour == "slow":
        time.sleep(1.0)
    settings = body["sampling_params"]
    ids = [3 + (len(body["input_ids"]) + settings["sampling_seed"] + place) % 100 for place in range(settings["max_new_tokens"])]
    version = "1" if behaviour == "stale" else state["version"]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    meta = {"output_token_logprobs": [[-1.0, one, None] for one in ids], "finish_reason": {"type": "length"}, "weight_versions": spans}
    return {"output_ids": ids, "meta_info": meta}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"model_path": "standin"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        path = self.path.partition("?")[0]
        with Path("calls").open("a") as calls:
            calls.write(path + (f" {' '.join(body['tags'])}" if "tags" in body else "") + "\n")
        found: dict[str, Any] = {"success": True, "message": ""}
        if path == "/generate":
            state["running"] += 1
            found = generate(body)
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


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
    threading.Thread(target=server.serve_forever).start()

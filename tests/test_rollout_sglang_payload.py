"""How tensors reach another process: as bytes, or as memory that it maps, of which nothing is left over."""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from r1mega.config.rollout import Sglang
from r1mega.errors import UserError
from r1mega.rollout import sglang_checksums, sglang_payload
from r1mega.rollout.sglang_checksums import comparable, on_gpu
from r1mega.rollout.sglang_payload import InBytes, InHandles, InSegments, carrier, flattened, is_here, named
from r1mega.rollout.sglang_sync import Control, Failed, contents, load
from r1mega.weights.sync import Bucket, Entry

ENTRIES = (Entry("a", "float32", (3, 5), 0, 60), Entry("b.weight", "bfloat16", (2, 4), 60, 16), Entry("c", "float8_e4m3fn", (7,), 76, 7))
BUCKET = Bucket(0, ENTRIES, {})


def filled(room=None) -> torch.Tensor:
    flat = (room or (lambda n: torch.empty(n, dtype=torch.uint8)))(BUCKET.nbytes)
    return flat.copy_(torch.arange(BUCKET.nbytes) % 120)


def segments(owner: str = "*") -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"torch_{owner}_*")}


def test_bytes_hold_what_they_name_and_no_more():
    for room in (None, lambda n: torch.zeros(10**6, dtype=torch.uint8)[5 : 5 + n].clone()):
        flat = torch.cat([filled(room), torch.zeros(10**6, dtype=torch.uint8)])[: BUCKET.nbytes]
        one, same = InBytes().payloads(flattened(BUCKET, flat), 2)
        assert one is same and len(one) < 5000
        read = pickle.loads(base64.b64decode(one))
        assert torch.equal(read["flattened_tensor"], flat)
        assert [(m.name, m.shape, m.dtype, m.start_idx, m.end_idx) for m in read["metadata"]] == [
            ("a", (3, 5), torch.float32, 0, 60), ("b.weight", (2, 4), torch.bfloat16, 60, 76), ("c", (7,), torch.float8_e4m3fn, 76, 83),
        ]  # fmt: skip
        (own,) = InBytes().payloads(named(BUCKET, flat)[:2], 1)
        assert len(own) < 5000
        for (name, value), (_, expected) in zip(pickle.loads(base64.b64decode(own)), named(BUCKET, flat)[:2], strict=True):
            assert value.dtype == expected.dtype and torch.equal(value.view(torch.uint8), expected.view(torch.uint8)), name


READER = """
import base64, pickle, sys, torch
for line in sys.stdin:
    found = pickle.loads(base64.b64decode(line))
    flat = found["flattened_tensor"] if isinstance(found, dict) else dict(found)["a"].view(-1).view(torch.uint8)
    print([flat.dtype == torch.uint8, flat.is_shared(), int(flat.sum())], flush=True)
    del found, flat
"""


def reader() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(process: subprocess.Popen, payload: str) -> list:
    assert len(payload) < 2000, "a handle, and no values"
    process.stdin.write(payload + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline().lower())


def vanish(names: set[str]) -> None:
    deadline = time.monotonic() + 120
    while names & segments():
        assert time.monotonic() < deadline, "a segment outlived its owner"
        time.sleep(0.2)


@pytest.mark.slow
def test_segments_are_mapped_reused_and_removed():
    held, me = InSegments(2), str(os.getpid())
    before = segments(me)
    with reader() as one, reader() as other:
        for turn in range(4):
            flat = filled(held.room).add_(turn)
            expected = int(flat.sum())
            for process, payload in zip((one, other), held.payloads(flattened(BUCKET, flat), 2), strict=True):
                assert asked(process, payload) == [True, True, expected]
            assert len(segments(me) - before) == min(turn + 1, 2)
        flat = filled(held.room)
        assert asked(one, held.payloads(named(BUCKET, flat), 1)[0]) == [True, True, int(flat[:60].sum())]
        # A server that is killed takes the names with it, and nobody else.
        names = segments(me) - before
        one.kill()
        vanish(names)
        held.close()
        flat = filled(held.room)
        assert asked(other, held.payloads(flattened(BUCKET, flat), 1)[0]) == [True, True, int(flat.sum())]
        held.close()
        assert segments(me) == before
        other.stdin.close()
        assert other.wait(60) == 0


OWNER = """
import sys, time, torch
from r1mega.rollout.sglang_payload import InSegments
held = InSegments(2)
for _ in range(2):
    flat = held.room(10_000).fill_(1)
    print(held.payloads({"flattened_tensor": flat}, 1)[0], flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_a_process_that_ends_leaves_no_segments(killed):
    """Neither killed, with a payload that was never read, nor without `close`; and though a server that it joined goes on."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = owner.stdout.readline()
    owner.stdout.readline()
    mine = {name for name in segments() if name.startswith(f"torch_{owner.pid}_")}
    assert len(mine) == 2
    with reader() as process:
        assert asked(process, first.strip()) == [True, True, 10_000]
        if killed:
            os.kill(owner.pid, signal.SIGKILL)
        else:
            owner.stdin.close()
        assert owner.wait(60) == (-signal.SIGKILL if killed else 0)
        vanish(mine)
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_full_shared_memory_is_one_line(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(sglang_payload.shutil, "disk_usage", lambda path: usage(2**26, 2**26 - 100, 2**24))
    with pytest.raises(UserError, match=r"a bucket of 1,000 bytes does not fit into /dev/shm, which has 16,777,216 .*--shm-size") as error:
        InSegments(2).room(1000)
    assert "\n" not in str(error.value)


def test_memory_is_shared_with_this_machine_only():
    assert is_here("http://127.0.0.1:5") and is_here("http://localhost:5") and not is_here("http://192.0.2.1:5")
    assert isinstance(carrier("cpu", 2), InSegments)
    assert isinstance(carrier("cuda", 2), InHandles)


def test_a_bucket_that_is_not_taken_is_named():
    class Refusing(Control):
        def post_each(self, path, bodies):
            raise Failed("http://x: HTTP 400: out of memory")

    assert contents(BUCKET) == "a to c (3 tensors)"
    with pytest.raises(Failed, match="out of memory, while it loaded a to c"):
        load(Refusing([], 1.0), [["p"]], "direct", contents(BUCKET))
    assert contents(Bucket(0, ENTRIES[:1], {})) == "a"


def test_own_shards_have_their_transports():
    with pytest.raises(ValueError, match="path=shards needs transport=tensor, request or distributed: files hold whole tensors"):
        Sglang(path="shards", transport="disk")


def test_servers_draft_with_no_model_that_a_sync_leaves_behind():
    for words in (["--speculative-algorithm", "EAGLE"], ["--speculative-algorithm=NEXTN"]):
        with pytest.raises(ValueError, match="no sync brings weights of a draft model"):
            Sglang(arguments=words)
    Sglang(arguments=["--speculative-algorithm", "NGRAM"])


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (0, torch.float32, "0000000000000000"), (15, torch.float32, "3f1b20c5f9d6b677"), (7, torch.bfloat16, "6acd222320afb5c2"),
        (30_001, torch.float32, "a1bef30c867ba816"), (33_333, torch.bfloat16, "5930ac5ebb949bfe"),
    ],
)  # fmt: skip
def test_checksums_are_those_of_sglangs_kernel(monkeypatch, count, dtype, expected):
    """`gpu_tensor_hash` of SGLang 0.5.23, its Triton kernels run by Triton's interpreter."""
    values = (torch.arange(count) % 251).to(dtype)
    assert on_gpu(values) == expected
    monkeypatch.setattr(sglang_checksums, "_AT_ONCE", 8192)
    assert on_gpu(values) == expected


def test_what_stands_in_block_fp8_is_not_compared():
    found = comparable([("a", torch.ones(1)), ("b.weight", torch.ones(1)), ("b.weight_scale_inv", torch.ones(1)), ("c", torch.ones(1))])
    assert [name for name, _ in found] == ["a", "c"]

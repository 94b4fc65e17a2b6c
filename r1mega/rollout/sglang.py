"""SGLang servers as one engine of all ranks: token ids in, token ids and log-probs out, weights by buckets.

Rank 0 owns the servers' lives and speaks to them about syncs; every rank sends its own share of the requests to all of them.
What is lost with a server is asked again of its successor, with the same seeds and the same weights.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, Literal, TypeVar

import torch

from r1mega import heartbeat
from r1mega.config.rollout import Rollout, Sglang
from r1mega.errors import UserError
from r1mega.pipeline import ranks
from r1mega.rollout import sglang_routing
from r1mega.rollout.engine import Differences, Drawn, Request, Sample, SamplingParams, Scores, Scoring, ignored
from r1mega.rollout.limits import check_requests, check_scorings
from r1mega.rollout.open import Surroundings
from r1mega.rollout.routing import check_routing
from r1mega.rollout.sglang_checksums import checksum_on, comparable
from r1mega.rollout.sglang_client import Client, Refused, Unanswered
from r1mega.rollout.sglang_group import ByBroadcast
from r1mega.rollout.sglang_memory import Memory, Region
from r1mega.rollout.sglang_network import ShardsByNetwork
from r1mega.rollout.sglang_payload import carrier, is_here
from r1mega.rollout.sglang_servers import Fleet, check_loader, check_model, shards_by_network
from r1mega.rollout.sglang_shards import Shards, ShardsByPayload
from r1mega.rollout.sglang_sync import ByDisk, ByTensor, Control, Failed, Transport
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.shipping import tensors
from r1mega.weights.source import WeightSource
from r1mega.weights.wire import Wire

T = TypeVar("T")
_log = logging.getLogger(__name__)

_MEET_S = 20.0
"""Ranks that wait for servers meet so often: a collective has less patience than a long rollout."""
_FIRST_S = 1.0
"""Until a rank says for whom it waits."""
_PAUSE_S = 0.5


class SglangEngine:
    """The engine protocol over servers."""

    def __init__(self, settings: Rollout, model_dir: Path, where: Surroundings) -> None:
        """Start or find the servers and wait for them; every rank calls it. UserError, one line, where that fails."""
        self._arch = Architecture.from_hf(read_config(model_dir))
        self._settings, self._sglang, self._where, self._model_dir = settings, _started_for(settings, self._arch), where, model_dir
        self._wire = Wire(settings.dtype, self._sglang.block_fp8)
        self._layout = self._sglang.layout.model_copy(update={"device": where.platform, "servers": 1})
        self._wire.check_served(self._arch, self._layout)
        self._fleet = ranks.on_first(lambda: Fleet(self._sglang, model_dir, settings.dtype, where))
        self._source: WeightSource | None = None
        self._version = -1
        self._memory = Memory()
        self._connect()
        if self._sglang.addresses:
            ranks.shared(self._check_models)

    @property
    def colocated(self) -> bool:
        """See `Engine.colocated`."""
        return self._sglang.placement == "colocated"

    def _connect(self) -> None:
        """Wait until all servers answer, and learn where they are."""
        fleet = self._fleet
        while not ranks.shared(lambda: fleet is not None and fleet.ready_within(_MEET_S)):
            pass
        known = ranks.shared(lambda: [(one.client.address, one.client.key, one.nodes) for one in fleet.servers] if fleet else [])
        self._pool = _Pool([Client(address, key) for address, key, _ in known], self._sglang.concurrency, self._sglang.retries)
        self._control = Control(self._pool.clients, self._sglang.request_timeout_s)
        self._transport = self._new_transport([self._here(address, nodes) for address, _, nodes in known])

    def _here(self, address: str, nodes: list[int] | None) -> list[bool]:
        """Which ranks of a server are on this rank's machine; one that was found may say so by its address alone."""
        if nodes is None:
            return [is_here(address)] * self._layout.tp
        return [node == self._where.allocation.node for node in nodes]

    def _check_models(self) -> None:
        for client in self._pool.clients:
            try:
                check_model(client, self._model_dir, self._layout)
                if shards_by_network(self._sglang):
                    check_loader(client)
            except (Refused, Unanswered) as error:
                raise UserError(f"rollout.sglang.addresses: the server cannot be asked what it serves ({error})") from None

    def _new_transport(self, here: list[list[bool]]) -> Transport | Shards[Any]:
        shards, control, tp = self._sglang.path == "shards", self._control, self._layout.tp
        if self._sglang.transport == "disk":
            return ByDisk(control, self._where.folder / "weights")
        if self._sglang.transport == "distributed":
            backend = "nccl" if self._where.platform == "cuda" else "gloo"
            return ShardsByNetwork(control, self._layout, backend) if shards else ByBroadcast(control, tp, backend)
        near = self._sglang.transport == "tensor" and any(map(any, here))
        # Two buckets at a time; of own shards, two of every engine rank.
        memory = carrier(self._where.platform, 2 * (tp if shards else 1)) if near else None
        if not shards:
            return ByTensor(control, here, memory)
        found = ShardsByPayload(control, self._layout, here, memory)
        if self._wire.block_fp8 and not all(way.near for way in found.ways):
            raise UserError(
                "rollout.sglang: own shards in block FP8 do not travel in requests, torch pickles no float8; use transport=distributed"
            )
        return found

    # -------------------------------------------------------- weights

    def sync(self, source: WeightSource, version: int) -> None:
        """Take a source's weights. UserError when servers do not take them in `retries` further attempts; they stay paused then."""
        self._source, self._version = source, version
        self._until(lambda: self._synced(source, version), f"take weight version {version}")

    def _until(self, act: Callable[[], str | None], what: str, revived: Callable[[], None] = lambda: None) -> None:
        """Have an act succeed that servers take part in; those that are lost are replaced between its attempts.

        Args:
            act: returns what went wrong, the same on every rank.
            what: servers do in it, in words.
            revived: what servers that were replaced need before the next attempt.

        Raises:
            UserError: every attempt failed.
        """
        for left in range(self._sglang.retries, -1, -1):
            error = act()
            if error is None:
                return
            _log.warning("the SGLang servers do not %s: %s", what, error)
            lost = self._lost()
            error = "; ".join(lost.values()) or error
            if left:
                self._revive(lost)
                revived()
        tried = f"tried {self._sglang.retries + 1} times; the last time" if self._sglang.retries else "tried once"
        raise UserError(f"the SGLang servers do not {what}, {tried}: {error}")

    def _synced(self, source: WeightSource, version: int) -> str | None:
        """One attempt; what went wrong, the same on every rank."""
        transport, control = self._transport, self._control
        error = self._resumed("weights") or ranks.shared(lambda: _failure(control.pause, transport.begin))
        if error is not None:
            return error
        error = ranks.first(self._sent(source))
        if error is not None:
            return error
        error = ranks.shared(lambda: _failure(transport.end))
        if error is None and (looked_at := self._looked_at(version)):
            wanted = self._checksums(source, looked_at)
            error = ranks.shared(lambda: _failure(lambda: self._control.compare(wanted, self._where.platform == "cpu")))
        return error or ranks.shared(lambda: _failure(lambda: control.resume(version)))

    def _sent(self, source: WeightSource) -> str | None:
        """Send this rank's buckets, each while the next is gathered; why that failed. Gathering goes on then: other ranks take part."""
        transport, limit = self._transport, self._sglang.bucket_bytes
        if isinstance(transport, Shards):
            return transport.send(source, self._wire, limit)
        error: str | None = None
        under_way: Future[str | None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for bucket, flat in source.buckets(self._wire, limit, transport.senders, ranks.number(), transport.room):
                if flat is not None:
                    error = error or (under_way.result() if under_way else None)
                    under_way = None if error else thread.submit(_failure, partial(transport.send, bucket, flat))
            return error or (under_way.result() if under_way else None)

    def differing(self, source: WeightSource) -> Differences | None:
        """Compare checksums of all parameters of all servers, but for those in block FP8."""
        wanted, found = self._checksums(source, range(self._layout.tp)), dict[str, Differences]()
        error = ranks.shared(lambda: _failure(lambda: found.update(self._control.differing(wanted, self._where.platform == "cpu"))))
        if error is not None:
            _log.warning("weights were not compared: %s", error)
            return None
        places = ranks.shared(lambda: list(found.values()))
        names = dict.fromkeys(name for place in places for name in place.names)
        return Differences(tuple(names), sum(place.compared for place in places))

    def _looked_at(self, version: int) -> Sequence[int]:
        """Ranks of a server whose checksums are compared after a sync: all, or each in turn."""
        how = self._sglang.checksums or ("all" if self._where.platform == "cpu" else "sampled")
        return {"all": range(self._layout.tp), "sampled": [version % self._layout.tp], "none": []}[how]

    def _checksums(self, source: WeightSource, engine_ranks: Sequence[int]) -> dict[int, dict[str, str]]:
        """On rank 0, the checksum of every parameter of some ranks of a server, made of the source in the servers' own layout."""
        wanted: dict[int, dict[str, str]] = {}
        checksum = checksum_on(self._where.platform)
        for engine_rank in engine_ranks:
            sums: dict[str, str] = {}
            for bucket, flat in source.params(self._layout, engine_rank, self._wire, self._sglang.bucket_bytes, 0, ranks.number()):
                if flat is not None:
                    sums |= {name: checksum(value) for name, value in comparable(tensors(bucket, flat))}
            wanted[engine_rank] = sums
        return wanted

    def _lost(self) -> dict[int, str]:
        """What became of servers that are gone or dumb, by their index; the same on every rank."""
        fleet = self._fleet
        return ranks.shared(lambda: fleet.lost() if fleet else {})

    def _revive(self, lost: Mapping[int, str]) -> None:
        """Replace servers that are lost, and connect anew with all of them."""
        self._pool.close()
        self._transport.close()
        for trouble in lost.values():
            _log.warning("replacing a server: %s", trouble)
            self._where.note(f"lost an SGLang server: {trouble}")
        fleet = self._fleet
        ranks.shared(lambda: fleet.replace(lost) if fleet else None)
        self._connect()

    # -------------------------------------------------------- requests

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        """Draw one sample per request, in request order. UserError, before anything is drawn, for a request that the model cannot take."""
        return self.start(requests, sampling)()

    def start(self, requests: Sequence[Request], sampling: SamplingParams, drawn: Drawn = ignored) -> Callable[[], list[Sample]]:
        """Send requests, and wait for their samples later; see `Engine.start`."""
        check_requests(requests, sampling, self._arch.vocab, self._arch.max_positions)
        check_routing(sampling, self._arch.moe is not None)

        def call(place: int, client: Client) -> Sample:
            sample = self._drawn(requests[place], sampling, client)
            drawn(place, sample)
            return sample

        return self._called([partial(call, place) for place in range(len(requests))])

    def score(self, scorings: Sequence[Scoring], top_k: int) -> list[Scores]:
        """Score sequences, in order. UserError, before anything is scored, for a sequence that the model cannot take."""
        check_scorings(scorings, top_k, self._arch.vocab, self._arch.max_positions)
        return self._called([partial(self._scored, one, top_k) for one in scorings])()

    def _called(self, calls: Sequence[Callable[[Client], T]]) -> Callable[[], list[T]]:
        """Make calls in threads; what is returned waits for them."""
        if self._source is None:
            raise UserError("the rollout engine has no weights; sync some before generating")
        source = self._source
        self._until(lambda: self._resumed("kv_cache"), "take back the memory of their caches", lambda: self.sync(source, self._version))
        return partial(self._answers, calls, [self._pool.submit(call) for call in calls], source)

    def _answers(self, calls: Sequence[Callable[[Client], T]], pending: Sequence[Future[T]], source: WeightSource) -> list[T]:
        """The results of all calls, in order. Those that a lost server took with it are made again once it is replaced, on every rank."""
        found: dict[int, T] = {}
        under_way = dict(enumerate(pending))

        def gathered() -> str | None:
            patience_s = _FIRST_S
            while left := sum(ranks.gathered(len(wait(under_way.values(), timeout=patience_s).not_done))):
                heartbeat.waiting(left, f"{left} answers, {self._pool.oldest()}")
                patience_s = _MEET_S
            error = None
            for place, future in under_way.items():
                try:
                    found[place] = future.result()
                except Unanswered as lost:
                    error = str(lost)
            return ranks.first(error)

        def asked_again() -> None:
            self.sync(source, self._version)
            under_way.clear()
            under_way.update({place: self._pool.submit(call) for place, call in enumerate(calls) if place not in found})

        self._until(gathered, "answer all requests of a rollout", asked_again)
        return [found[place] for place in range(len(calls))]

    def _drawn(self, request: Request, sampling: SamplingParams, client: Client) -> Sample:
        answer = self._generate(
            client,
            {
                "input_ids": list(request.prompt_ids),
                "sampling_params": {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_new_tokens": request.max_new_tokens,
                    "stop_token_ids": list(sampling.stop_token_ids),
                    "sampling_seed": request.seed & (2**63 - 1),
                },
                sglang_routing.FIELD: sampling.routing,
            },
        )
        meta = answer["meta_info"]
        tokens = meta["output_token_logprobs"]
        ids = tuple(int(token) for _, token, *_ in tokens)
        finish = self._finish(client, meta["finish_reason"], request, len(ids))
        spans = [(self._number(client, span["version"]), span["end"] - span["start"]) for span in meta["weight_versions"]]
        if not ids or spans[-1][0] != self._version:
            raise Unanswered(f"{client.address}: drew {len(ids)} tokens from weight version {spans[-1][0]} instead of {self._version}")
        logprobs = tuple(float(logprob) for logprob, *_ in tokens)
        routing = sglang_routing.read(client, meta, len(request.prompt_ids) + len(ids) - 1, self._arch) if sampling.routing else None
        return Sample(request.prompt_ids, ids, logprobs, finish, self._version, tuple(spans[:-1]), routing)

    @staticmethod
    def _finish(client: Client, reason: dict[str, Any], request: Request, drawn: int) -> Literal["stop", "length"]:
        # SGLang puts a stop token where a token is outside the vocabulary, and calls that a match of a text; we ask for none.
        if isinstance(reason.get("matched"), str):
            raise Unanswered(f"{client.address}: a response broke off after {drawn} tokens: {reason['matched']}")
        if reason["type"] == "stop":
            return "stop"
        if reason["type"] != "length":
            raise Unanswered(f"{client.address}: the response ended with {reason}")
        if drawn < request.max_new_tokens:
            raise UserError(
                f"{client.address} cut a response after {drawn} of {request.max_new_tokens} tokens, its prompt has "
                f"{len(request.prompt_ids)}; raise its --max-total-tokens, or its --context-length to 2 more than the model's"
            )
        return "length"

    @staticmethod
    def _number(client: Client, version: str) -> int:
        try:
            return int(version)
        except ValueError:
            raise Unanswered(f"{client.address}: serves weight version {version!r}, which no sync has set") from None

    def _scored(self, one: Scoring, top_k: int, client: Client) -> Scores:
        answer = self._generate(
            client,
            {
                "input_ids": list(one.ids),
                # The first entry is of the token before, whose log-prob is left out.
                "logprob_start_len": one.start - 1,
                "top_logprobs_num": top_k,
                "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            },
        )
        meta = answer["meta_info"]
        count = len(one.ids) - one.start
        logprobs = torch.tensor([logprob for logprob, *_ in meta["input_token_logprobs"][1:]], dtype=torch.float32)
        tops = meta["input_top_logprobs"][1:] if top_k else [[]] * count
        if len(logprobs) != count or len(tops) != count:
            raise Unanswered(f"{client.address}: scored {len(logprobs)} tokens instead of {count}")
        return Scores(
            logprobs,
            torch.tensor([[token for _, token, *_ in row] for row in tops], dtype=torch.int64).view(count, top_k),
            torch.tensor([[logprob for logprob, *_ in row] for row in tops], dtype=torch.float32).view(count, top_k),
        )

    def _generate(self, client: Client, body: dict[str, Any]) -> Any:
        """One request, ended on the server too when its time is over."""
        name = uuid.uuid4().hex
        try:
            return client.post("/generate", body | {"rid": name, "return_logprob": True}, self._sglang.request_timeout_s)
        except Unanswered:
            _failure(lambda: client.post("/abort_request", {"rid": name}, 10.0))
            raise
        except Refused as error:
            raise UserError(f"an SGLang server refuses a request: {error}") from None

    def sleep(self) -> None:
        """Keep the servers and forget their weights, whose source may be a trainer that is about to go; see `Engine.sleep`."""
        self._source, self._version = None, -1
        if not self.colocated:
            return
        self._until(lambda: ranks.shared(lambda: _failure(lambda: self._memory.release(self._control))), "give back their memory")

    def _resumed(self, region: Region) -> str | None:
        """Let servers have a region of their memory again; what went wrong, the same on every rank."""
        return ranks.shared(lambda: _failure(lambda: self._memory.resume(self._control, region))) if self.colocated else None

    def close(self) -> None:
        """End the servers that were started."""
        self._pool.close()
        self._transport.close()
        if self._fleet is not None:
            self._fleet.stop()


class _Pool:
    """This rank's requests under way: so many at once, each at the server that has the fewest of them."""

    def __init__(self, clients: Sequence[Client], concurrency: int, retries: int) -> None:
        self.clients, self._retries = list(clients), retries
        self._load = [0] * len(self.clients)
        self._under_way: dict[int, tuple[float, int]] = {}
        """When a thread's call began, and at which server."""
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="sglang")

    def submit(self, call: Callable[[Client], T]) -> Future[T]:
        """Make a call when there is room, and again elsewhere, after growing pauses, while it raises Unanswered."""
        return self._threads.submit(self._attempts, call)

    def close(self) -> None:
        """Make no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def oldest(self) -> str:
        """Which server has kept this rank waiting longest, in words."""
        with self._lock:
            first = min(self._under_way.values(), default=None)
        return f"the oldest of {self.clients[first[1]].address}" if first else "all of them another rank's"

    def _attempts(self, call: Callable[[Client], T]) -> T:
        failed: list[int] = []
        for attempt in range(self._retries + 1):
            place = self._taken(failed)
            try:
                return call(self.clients[place])
            except Unanswered:
                if attempt == self._retries:
                    raise
                failed.append(place)
            finally:
                with self._lock:
                    self._load[place] -= 1
                    del self._under_way[get_ident()]
            time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    def _taken(self, failed: Sequence[int]) -> int:
        """The server with the fewest requests of those that have failed this one least."""
        with self._lock:
            place = min(range(len(self.clients)), key=lambda place: (failed.count(place), self._load[place]))
            self._load[place] += 1
            self._under_way[get_ident()] = (time.monotonic(), place)
            return place


def _started_for(settings: Rollout, arch: Architecture) -> Sglang:
    """The servers' settings, which tell experts where they are replayed and the model has some."""
    if settings.routing_replay == "off" or arch.moe is None:
        return settings.sglang
    return settings.sglang.model_copy(update={"arguments": [*settings.sglang.arguments, sglang_routing.FLAG]})


def _failure(*acts: Callable[[], object]) -> str | None:
    """Why the first of these acts that failed did so, None where none did."""
    try:
        for act in acts:
            act()
    except (Failed, Unanswered, Refused) as error:
        return str(error)
    return None

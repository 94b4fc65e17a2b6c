"""The lives of SGLang servers: started by rank 0 of a run, on its node or on any of its job, or found at given addresses."""

import json
import logging
import secrets
import subprocess
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from threading import Event, Thread

from r1mega import env
from r1mega.config.engine_layout import EngineLayout
from r1mega.config.rollout import Sglang
from r1mega.errors import UserError
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang_client import Client, Refused, Unanswered
from r1mega.rollout.sglang_keeper import Ordered
from r1mega.rollout.sglang_network import LOADER
from r1mega.rollout.sglang_part import INSIDE, LOOPBACK, Order, Part, State
from r1mega.rollout.sglang_places import places, rooms
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.blocks import BLOCK
from r1mega.weights.engine import engine_params

_log = logging.getLogger(__name__)
_CPU_TOKENS = 65_536
_UNSAID = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""Keys of DeepSeek-V3's config.json that SGLang reads and `transformers`, which has no others, does not write."""
_BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
"""What a checkpoint in DeepSeek's block FP8 says of itself; the model folder of a run need not be one."""
_LOOK_S = 1.0
_ANSWER_S = 30.0
_CHECK_S = 600.0
_GONE_S = 60.0
_CPU_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-radix-cache", "--sleep-on-idle"),
)


def interpreter(settings: Sglang) -> Path:
    """The Python that has SGLang. UserError where there is none."""
    checkout = Path(__file__).parents[2]
    if settings.python is not None:
        return Path(settings.python)
    for folder in (checkout, Path.cwd()):
        if (folder / ".venv-sglang/bin/python").exists():
            return folder / ".venv-sglang/bin/python"
    raise UserError(
        "rollout.engine=sglang: there is no environment with SGLang; run tools/install_sglang_cpu, "
        "or name the interpreter of one as rollout.sglang.python"
    )


def check_interpreter(settings: Sglang) -> None:
    """UserError where the Python that should have SGLang has none."""
    python = interpreter(settings)
    ask = "import importlib.util as util; raise SystemExit(util.find_spec('sglang') is None)"
    try:
        has = subprocess.run([python, "-c", ask], capture_output=True, timeout=_ANSWER_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        has = False
    if not has:
        raise UserError(f"rollout.sglang.python: {python} is no interpreter with SGLang; run tools/install_sglang_cpu, or name another")


def key_of(settings: Sglang) -> str | None:
    """The API key of given addresses. UserError where its variable is not set."""
    return env.secret(settings.key_variable) if settings.key_variable else None


def shards_by_network(settings: Sglang) -> bool:
    """Whether weights come by a loader of ours."""
    return (settings.path, settings.transport) == ("shards", "distributed")


def arguments(settings: Sglang, model_dir: Path, dtype: str, platform: str, gpu: int) -> list[str]:
    """Of `sglang.launch_server`, for a server that gets its weights from a trainer and speaks token ids alone, without its addresses.

    Args:
        gpu: the first one of this part on its node.
    """
    layout = settings.layout
    found = ["--model-path", str(model_dir), "--dtype", dtype]
    # The first sync brings the weights, so those of the folder are not read, and what a sync forgets is not right by chance.
    found += ["--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup", "--log-level-http", "warning"]
    config = read_config(model_dir)
    # SGLang ends a sequence, without a word, two tokens before the context is full.
    found += ["--context-length", str(Architecture.from_hf(config).max_positions + 2)]
    absent: dict[str, object] = {}
    if config.get("model_type") == "deepseek_v3":
        absent = {key: value for key, value in _UNSAID.items() if key not in config}
    if settings.block_fp8:
        absent["quantization_config"] = _BLOCK_FP8
    if absent:
        found += ["--json-model-override-args", json.dumps(absent)]
    found += ["--max-running-requests", str(settings.max_running_requests)]
    found += ["--tp-size", str(layout.tp), "--ep-size", str(layout.ep), "--attn-dp-size", str(layout.attn_dp)]
    if layout.dense_tp == "whole":
        found += ["--moe-dense-tp-size", "1"]
    if layout.shared_experts == "tp":
        found.append("--disable-shared-experts-fusion")
    if layout.dp_lm_head:
        found.append("--enable-dp-lm-head")
    if settings.deterministic:
        found.append("--enable-deterministic-inference")
    tokens = settings.max_total_tokens or (_CPU_TOKENS if platform == "cpu" else None)
    if tokens:
        found += ["--max-total-tokens", str(tokens)]
    if settings.placement == "colocated" and platform == "cuda":
        found.append("--enable-memory-saver")
    if settings.mem_fraction:
        found += ["--mem-fraction-static", str(settings.mem_fraction)]
    if shards_by_network(settings):
        found += ["--custom-weight-loader", LOADER]
    found += _CPU_ARGUMENTS if platform == "cpu" else ("--base-gpu-id", str(gpu))
    return [*found, *settings.arguments]


class Started:
    """A server that this process has started, here or, in a job of several nodes, through their keepers. It does not outlive the job."""

    def __init__(self, settings: Sglang, model_dir: Path, dtype: str, where: Surroundings, index: int) -> None:
        """Start it. Call it in the thread that lives as long as the server should, and wait for `ready`.

        Raises:
            UserError: the job's nodes have no room for all servers.
        """
        self._settings, self._made, self._where, self._begin = settings, (model_dir, dtype), where, time.monotonic()
        self._pieces = places(settings.layout, rooms(settings, where.allocation, where.trainer_gpus))[index]
        self._name, self._key = f"server-{index}-{secrets.token_hex(3)}", secrets.token_urlsafe(32)
        self._client: Client | None = None
        self._serves, self._trouble = False, ""
        self._parts: list[Part | Ordered] = [self._begun(0, None)]
        self._go_on()

    def _begun(self, number: int, meeting: str | None) -> Part | Ordered:
        settings, where, piece = self._settings, self._where, self._pieces[number]
        order = Order(
            self._name,
            part=number,
            parts=len(self._pieces),
            python=str(interpreter(settings).absolute()),
            arguments=arguments(settings, *self._made, where.platform, piece.first),
            ranks=piece.count,
            threads=where.threads,
            platform=where.platform,
            meeting=meeting,
        )
        key = self._key if number == 0 else None
        if where.allocation.nodes == 1:
            return Part(order, key, LOOPBACK, where.folder)
        return Ordered(order, key, where.folder, piece.node)

    def _go_on(self) -> None:
        """Begin the other parts once the first has told where they meet."""
        first = self._parts[0].state()
        if self._client is None and first is not None and not first.ended:
            self._client = Client(f"http://{first.address}", self._key)
            self._parts += [self._begun(number, first.meeting) for number in range(1, len(self._pieces))]

    @property
    def client(self) -> Client:
        """For requests, once it is ready."""
        assert self._client is not None, "nobody knows its address yet"
        return self._client

    @property
    def nodes(self) -> list[int] | None:
        """The node of each of its ranks."""
        return [piece.node for piece in self._pieces for _ in range(piece.count)]

    def ready(self) -> bool:
        """Whether it answers. UserError when a part of it has ended, or when it has had its time."""
        if found := self._ended():
            part, state = found
            self.stop()
            on = f" on {part.place}" if part.place else ""
            raise UserError(f"an SGLang server{on} ended while it started ({state.ended}): {state.said}; its log: {state.log}")
        self._go_on()
        self._serves = self._client is not None and self._client.answers(_ANSWER_S)
        if self._serves:
            return True
        if time.monotonic() - self._begin > self._settings.start_timeout_s:
            waits = [part for part in self._parts if part.state() is None]
            self.stop()
            limit = f"rollout.sglang.start_timeout_s={self._settings.start_timeout_s:g}"
            if waits:
                raise UserError(f"{waits[0].place} began no part of an SGLang server within {limit}; its log would be {waits[0].log}")
            logs = ", ".join(str(part.log) for part in self._parts)
            raise UserError(f"an SGLang server was not ready within {limit}; its log: {logs}")
        return False

    def _ended(self) -> tuple[Part | Ordered, State] | None:
        """A part that has ended by itself."""
        states = ((part, part.state()) for part in self._parts)
        return next(((part, state) for part, state in states if state is not None and state.ended), None)

    def well(self) -> bool:
        """Whether all of it is there, and it answers."""
        return self._ended() is None and self.client.answers(_ANSWER_S)

    def end_broken(self) -> None:
        """End what is left of a server that has lost a part: the others would wait for it, and requests for them."""
        if self._serves and len(self._parts) > 1 and self._ended():
            self._trouble = self._trouble or self.trouble()
            self.end()

    def trouble(self) -> str:
        """What became of a server that is not well."""
        found = self._ended()
        if self._trouble or found is None:
            return self._trouble or f"{self.client.address} does not answer; its log: {self.log}"
        part, state = found
        of = f": its part on {part.place}" if part.place else ""
        return f"{self.client.address}{of} ended ({state.ended}): {state.said}; its log: {state.log}"

    def end(self) -> None:
        """End all of its processes."""
        for part in self._parts:
            part.end()

    def stop(self) -> None:
        """End all of its processes, and wait until they are gone."""
        self.end()
        for part in self._parts:
            if not part.gone_within(_GONE_S):
                _log.warning("%s does not end its part of an SGLang server", part.place)

    @property
    def log(self) -> Path:
        """What its first part prints."""
        return self._parts[0].log

    @property
    def pid(self) -> int:
        """The process of its first part, and the number of its group of processes; 0 where that was not begun."""
        first = self._parts[0].state()
        return first.pid if first else 0


class Found:
    """A server at a given address. It is never started or ended from here."""

    nodes: list[int] | None = None

    def __init__(self, address: str, settings: Sglang) -> None:
        self.client, self._settings, self._begin = Client(address.rstrip("/"), key_of(settings)), settings, time.monotonic()

    def ready(self, within_s: float = _ANSWER_S) -> bool:
        """Whether it answers within so many seconds. UserError when it refuses the key, or has had its time."""
        try:
            self.client.get("/model_info", within_s)
        except Refused as error:
            variable = self._settings.key_variable
            told = f"{variable} holds another one" if variable else "none was sent; name its variable as rollout.sglang.key_variable"
            said = f"the server wants its API key, and {told}" if error.status in (401, 403) else "no SGLang server answers there"
            raise UserError(f"rollout.sglang.addresses: {said} ({error})") from None
        except Unanswered as error:
            if time.monotonic() - self._begin > self._settings.start_timeout_s:
                limit = f"rollout.sglang.start_timeout_s={self._settings.start_timeout_s:g}"
                raise UserError(f"rollout.sglang.addresses: no SGLang server answers within {limit} ({error})") from None
            return False
        return True

    def well(self) -> bool:
        """Whether it answers."""
        self._begin = time.monotonic()
        return self.client.answers(_ANSWER_S)

    def trouble(self) -> str:
        """What became of a server that is not well."""
        return f"{self.client.address} does not answer"

    def end_broken(self) -> None:
        """Leave it as it is."""

    end = stop = end_broken


Server = Started | Found


class Fleet:
    """All servers of an engine, on rank 0."""

    def __init__(self, settings: Sglang, model_dir: Path, dtype: str, where: Surroundings) -> None:
        self._settings, self._made = settings, (model_dir, dtype, where)
        count = len(settings.addresses) or settings.layout.servers
        self.servers: list[Server] = [self._new(index) for index in range(count)]
        self._closed = Event()
        if where.allocation.nodes > 1:
            Thread(target=self._watch, name="servers", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            for server in list(self.servers):
                server.end_broken()

    def _new(self, index: int) -> Server:
        settings = self._settings
        return Found(settings.addresses[index], settings) if settings.addresses else Started(settings, *self._made, index)

    @property
    def clients(self) -> list[Client]:
        """In the order of the servers."""
        return [server.client for server in self.servers]

    def ready_within(self, seconds: float) -> bool:
        """Whether all answer, looked at for so long at most. UserError for one that never will."""
        end = time.monotonic() + seconds
        waiting = list(self.servers)
        while True:
            waiting = [server for server in waiting if not server.ready()]
            if not waiting or time.monotonic() > end:
                return not waiting
            time.sleep(_LOOK_S)

    def lost(self) -> dict[int, str]:
        """What became of servers that are gone or dumb, by their index."""
        return {index: server.trouble() for index, server in enumerate(self.servers) if not server.well()}

    def replace(self, indices: Iterable[int]) -> None:
        """Start some anew. Found ones are waited for by `ready_within`."""
        for index in indices:
            self.servers[index].stop()
            self.servers[index] = self._new(index)

    def stop(self) -> None:
        """End what was started."""
        self._closed.set()
        for server in self.servers:
            server.end()
        for server in self.servers:
            server.stop()


def check_model(client: Client, model_dir: Path, layout: EngineLayout) -> None:
    """UserError, one line, that lists what differs between a server's model and the one that `model_dir` describes.

    Shapes are compared where the server's folder can be read from here; the names of parameters always.
    """
    info, config = client.get("/model_info", _ANSWER_S), read_config(model_dir)
    if not isinstance(info, dict) or "model_path" not in info:
        raise UserError(f"rollout.sglang.addresses: {client.address} is no SGLang server")
    serves, arch = f"{client.address} serves {info['model_path']}", Architecture.from_hf(config)
    if info.get("architectures") != config.get("architectures"):
        raise UserError(f"{serves}, a {info.get('architectures')}; the model {model_dir} is a {config.get('architectures')}")
    folder = Path(info["model_path"])
    if (folder / "config.json").is_file():
        other = Architecture.from_hf(read_config(folder))
        pairs = [(field.name, getattr(other, field.name), getattr(arch, field.name)) for field in fields(arch)]
        wrong = [f"{name} {theirs} instead of {ours}" for name, theirs, ours in pairs if theirs != ours]
        if wrong:
            raise UserError(f"{serves}, which differs from {model_dir}: {', '.join(wrong)}")
    ranks = client.post("/weights_checker", {"action": "checksum"}, _CHECK_S)["ranks"]
    if len(ranks) != layout.tp:
        raise UserError(f"{serves} on {len(ranks)} ranks, and rollout.sglang.layout.tp is {layout.tp}; make them the same")
    for rank, found in enumerate(ranks):
        names = {param.name for param in engine_params(arch, layout, rank)}
        unknown = sorted(names ^ found["checksums"].keys())
        if unknown:
            raise UserError(
                f"{serves}, whose parameters differ from those of {model_dir} under rollout.sglang.layout: {', '.join(unknown[:4])}"
            )


def check_loader(client: Client) -> None:
    """UserError, one line, when a server was started without the loader of own shards over the network."""
    if LOADER not in (client.get("/server_info", _ANSWER_S).get("custom_weight_loader") or []):
        raise UserError(
            f"rollout.sglang.addresses: {client.address} cannot take path=shards by transport=distributed; start it with "
            f"--custom-weight-loader {LOADER} and {INSIDE} in PYTHONPATH"
        )

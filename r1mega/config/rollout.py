"""How responses are drawn, and judged by functions."""

import re
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from r1mega.config.base import Closed, FilePath, NonNegativeSchedule, PositiveSchedule, RewardFunction, Schedule, ShareSchedule
from r1mega.config.engine_layout import EngineLayout


class Sampling(Closed):
    """How responses are drawn."""

    temperature: NonNegativeSchedule = Field(
        1.0, description="softmax temperature; log-probs are those of the tempered distribution on both sides"
    )
    top_p: ShareSchedule = Field(1.0, description="nucleus mass; 1 keeps the whole vocabulary")
    max_new_tokens: PositiveSchedule = Field(1024, description="length cap of a response in tokens; a schedule over updates")


class Sglang(Closed):
    """SGLang servers: how they are started or found, asked, and given weights."""

    python: FilePath | None = Field(
        None,
        description="interpreter of the environment with SGLang, which the trainer does not share; null: .venv-sglang of the checkout, "
        "made by tools/install_sglang_cpu",
    )
    addresses: list[str] = Field(
        default_factory=list,
        description="servers that run already, as http://host:port; none are started then, and `layout` says how those are cut",
    )
    key_variable: str | None = Field(
        None, description="environment variable with the API key of `addresses`; servers that a run starts get a random key"
    )
    layout: EngineLayout = Field(default_factory=EngineLayout, description="how many servers, and how each is cut over its GPUs")
    placement: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="disaggregated: servers have GPUs of their own, on the ranks' nodes or on others; colocated: they have the trainer's, "
        "and memory goes to and fro: they give up theirs while the trainer trains, and before they draw it moves weights, gradients and "
        "optimizer states to the host",
    )
    first_gpu: int | None = Field(
        None, ge=0, description="first GPU for servers on each node that ranks are on; null: after the ranks', or with colocated 0"
    )
    arguments: list[str] = Field(default_factory=list, description="further arguments of sglang.launch_server, such as --enable-metrics")
    deterministic: bool = Field(
        True,
        description="draw by each request's seed alone, in SGLang's deterministic mode; false is faster on GPUs, and a retry draws anew",
    )
    max_total_tokens: int | None = Field(None, ge=1, description="tokens of the key-value cache; null: SGLang's choice, on a CPU 65,536")
    max_running_requests: int = Field(64, ge=1, description="sequences that a server decodes at once")
    mem_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of GPU memory for weights and key-value cache (--mem-fraction-static); null: SGLang's choice"
    )
    start_timeout_s: float = Field(600.0, gt=0, description="seconds in which a server must be ready")
    request_timeout_s: float = Field(1800.0, gt=0, description="seconds for one response, or one step of a weight sync")
    concurrency: int = Field(64, ge=1, description="requests of one rank under way at once, over all servers")
    retries: int = Field(3, ge=0, description="further attempts for a request that failed, for a dead server and for a sync")
    path: Literal["full", "shards"] = Field(
        "full",
        description="what servers are sent: full: whole tensors, which every rank of a server cuts for itself, so any backend takes them; "
        "shards: every rank its own parameters only, by transport tensor, request or distributed",
    )
    transport: Literal["tensor", "request", "distributed", "disk"] = Field(
        "tensor",
        description="how weights reach servers: tensor: by memory that servers on this machine map (shared memory, on GPUs CUDA IPC), as "
        "request to any other; request: in HTTP requests; distributed: over NCCL or gloo, by a broadcast of rank 0, with path=shards from "
        "each rank that holds a piece to the rank that keeps it; disk: by files in the run's folder, which servers must see",
    )
    block_fp8: bool = Field(
        False, description="send what DeepSeek's checkpoints quantise as e4m3 codes with a scale for every 128 x 128; for servers on GPUs"
    )
    bucket_bytes: int = Field(2**28, ge=1, description="bytes of weights that are gathered and sent at once")
    checksums: Literal["all", "sampled", "none"] | None = Field(
        None,
        description="compare checksums of parameters after every sync: all: of all; sampled: of one rank of every server, another one each "
        "time; none: of none; null: all on a CPU, sampled on GPUs, where those in block FP8 are left out",
    )

    def gpus_from(self, trainer_gpus: int) -> int:
        """GPU of the first server's first rank, on a machine whose first GPUs the trainer has."""
        if self.first_gpu is not None:
            return self.first_gpu
        return 0 if self.placement == "colocated" else trainer_gpus

    @model_validator(mode="after")
    def _path_has_its_transport(self) -> "Sglang":
        if self.path == "shards" and self.transport == "disk":
            raise ValueError("path=shards needs transport=tensor, request or distributed: files hold whole tensors")
        return self

    @field_validator("arguments")
    @classmethod
    def _draft_with_no_model(cls, arguments: list[str]) -> list[str]:
        words = " ".join(arguments).replace("=", " ").split()
        if any(word == "--speculative-algorithm" and how != "NGRAM" for word, how in pairwise([*words, ""])):
            raise ValueError(
                "--speculative-algorithm: no sync brings weights of a draft model, the MTP layer's neither; leave it out, or use NGRAM"
            )
        return arguments

    @field_validator("addresses")
    @classmethod
    def _are_urls(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            if not re.fullmatch(r"https?://[^/\s]+/?", address):
                raise ValueError(f"expected http://host:port; got {address!r}")
        return addresses

    @model_validator(mode="after")
    def _found_servers_stay_awake(self) -> "Sglang":
        if self.addresses and self.placement == "colocated":
            raise ValueError("placement=colocated is for servers that a run starts: after it, nobody would wake those at `addresses`")
        return self


class Rollout(Closed):
    """The engine that generates."""

    engine: Literal["local", "sglang"] = Field("local", description="local: in the trainer's processes, on CPU; sglang: servers")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the engine's weights")
    batch: int = Field(512, ge=1, description="most sequences decoded at once by one embedded engine")
    routing_replay: Literal["off", "record", "rollout"] = Field(
        "off",
        description="rollout: stages of kind grpo train each token through the experts that it went through in the engine (R3, "
        "arXiv 2510.11370), for models with experts; off: through those that the trainer's routers choose; record: these too, and the "
        "engine's are known when the cause of a gap is looked for",
    )
    sglang: Sglang = Field(default_factory=Sglang, description="the servers of engine=sglang")


class Reward(Closed):
    """One part of the reward: a function and its weight."""

    function: RewardFunction = Field(
        description="import path of `f(prompt, response) -> float`, such as 'r1mega.rewards.math:accuracy', "
        "or 'my_task:reward' for my_task.py beside the recipe"
    )
    weight: Schedule = Field(1.0, description="factor in the sum of rewards; a schedule over updates")
    deadline_s: float = Field(10.0, gt=0, description="seconds for one response; then its judge is killed and the response is not judged")

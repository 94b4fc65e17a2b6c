"""A recipe on a cluster: what every stage needs, how long it takes, and what does not fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal

from r1mega.config.base import largest
from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.schema import Recipe
from r1mega.config.stages import Distill, Evaluate, Grpo, Preference, Pretrain, Rejection, Sft, Stage
from r1mega.config.training import Optimizer, Train
from r1mega.errors import UserError
from r1mega.planner.compute import Costs, Seconds
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.devices import Device
from r1mega.planner.engine import (
    SERVERS,
    Engine,
    Lengths,
    cache_tokens,
    engine_weights,
    rollout_seconds,
    server,
    serves,
    smallest_engine,
    sync_seconds,
)
from r1mega.planner.execution import Execution, execution
from r1mega.planner.flops import decode_flops, forward_flops, training_flops
from r1mega.planner.memory import RankMemory, training_memory
from r1mega.planner.schedule import bubble
from r1mega.planner.search import Search, rounded, search
from r1mega.planner.step import step
from r1mega.weights.architecture import Architecture
from r1mega.weights.engine import check_engine
from r1mega.weights.pipeline import stages
from r1mega.weights.placement import check_layout


@dataclass(frozen=True)
class Settings:
    """What a recipe does not say. `other_gpus`: their number is not the recipe's, so colocated servers are as many as there is room for."""

    device: Device
    gpus: int
    other_gpus: bool = False
    prompt: int = 256
    response: float | None = None
    document: int = 5355
    imbalance: float = 1.2
    engine_tp: int | None = None
    engine_fp8: bool = False


@dataclass(frozen=True)
class Problem:
    """Something that does not fit: `where` needs `needs` of `what`, and there is `has`."""

    where: str
    what: str
    needs: float
    has: float
    advice: str


@dataclass(frozen=True)
class Generation:
    """The engine on one GPU, in bytes, and the tokens that one server's cache holds."""

    engine: Engine
    servers: int
    weights: float
    cache: float
    cache_tokens: float


@dataclass(frozen=True)
class StagePlan:
    """One stage. `seconds`: of a rollout with all that follows it until the next one, or of one optimizer step, by phase.

    `flops`: per token, by what the model does. `host`: bytes of the fullest node's memory, by what they are.
    """

    name: str
    kind: str
    layout: Layout | None
    ranks: int
    micro_batches: int
    tokens: int
    memory: tuple[RankMemory, ...]
    generation: Generation | None
    host: dict[str, float]
    seconds: dict[str, float]
    busy: Seconds | None
    bubble: float
    flops: dict[str, float]
    cycles: int | None
    problems: tuple[Problem, ...]

    @property
    def cycle(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def record(self) -> dict[str, Any]:
        """As JSON: bytes, seconds, FLOPs."""
        record = {**asdict(self), "layout": None if self.layout is None else self.layout.model_dump()}
        if self.generation is not None:
            record["generation"]["engine"]["layout"] = self.generation.engine.layout.model_dump()
        return record


def plan(recipe: Recipe, architectures: dict[str, Architecture], settings: Settings, constants: Constants = CONSTANTS) -> list[StagePlan]:
    """Every stage in order.

    Args:
        architectures: of each stage's model, by the stage's name; stages without a model of their own may be missing.

    Raises:
        UserError: a layout does not divide the model or the GPUs.
    """
    found = []
    for name, stage in recipe.stages.items():
        arch = architectures.get(name)
        if arch is not None:
            found.append(_Planner(recipe, name, stage, arch, settings, constants).plan())
    return found


def searched(recipe: Recipe, name: str | None, architectures: dict[str, Architecture], settings: Settings) -> tuple[str, Search]:
    """Layouts for the training of one stage, the first that trains when none is named; and that stage's name.

    Raises:
        UserError: there is no such stage, it does not train, or no layout fits.
    """
    if name is None:
        name = next((name for name, stage in recipe.stages.items() if not isinstance(stage, Rejection | Evaluate)), None)
        if name is None:
            raise UserError("no stage of this recipe trains a model; there is nothing to search a layout for")
    if name not in architectures:
        raise UserError(f"--stage {name}: there is no such stage with a model; there are {', '.join(architectures)}")
    return name, _Planner(recipe, name, recipe.stages[name], architectures[name], settings, CONSTANTS).search()


def fitting(arch: Architecture, layout: Layout, gpus: int, where: str) -> None:
    """UserError when a layout does not divide the model or the GPUs, with the numbers of GPUs nearby that it does divide."""
    try:
        layout.dp(gpus), layout.edp(gpus)
        check_layout(arch, layout)
        stages(arch, layout)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {str(error).removeprefix('layout: ')}") from None


def trained(arch: Architecture, layout: Layout, mtp_loss: float) -> tuple[Architecture, Layout]:
    """What is built for training: an MTP layer without a loss is not."""
    if mtp_loss > 0:
        return arch, layout
    return replace(arch, mtp_layers=0), layout.model_copy(update={"pipeline": layout.pipeline and layout.pipeline.replace("m", "")})


def chunks(train: Train, sequences: int, length: float) -> int:
    """Full micro-batches of one optimizer step, over all ranks."""
    return ceil(sequences * min(length, train.chunk_tokens) / train.chunk_tokens)


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    name: str
    stage: Stage
    arch: Architecture
    settings: Settings
    constants: Constants

    def plan(self) -> StagePlan:
        match self.stage:
            case Grpo():
                return self._reinforcement(self.stage)
            case Rejection() | Evaluate():
                return self._generation_alone()
            case Pretrain():
                return self._training_alone(self.stage, sum(phase.updates for phase in self.stage.phases))
            case Distill():
                return self._training_alone(self.stage, self.stage.updates)
            case Sft() | Preference():
                return self._training_alone(self.stage, None)

    def search(self) -> Search:
        """Layouts for this stage's training, in place of its own."""
        stage = self.stage
        if isinstance(stage, Rejection | Evaluate):
            raise UserError(f"stages.{self.name}: a {stage.kind} stage does not train; name one that does with --stage")
        arch = self.arch.scored() if isinstance(stage, Preference) else self.arch
        arch, _ = trained(arch, Layout(), stage.train.mtp_loss)
        sequences, length = self._step(stage)
        how = self._how(stage.train, length)
        return search(arch, self.settings.gpus, chunks(stage.train, sequences, length), how, self.settings.device, self.constants)

    # ------------------------------------------------------------ parts

    @property
    def _layout(self) -> Layout:
        return self.stage.layout or self.recipe.layout

    def _how(self, train: Train, length: int) -> Execution:
        settings = self.settings
        kernels: Literal["te", "local"] = "te" if self.recipe.run.platform == "cuda" else "local"
        imbalance = settings.imbalance if self.arch.moe else 1.0
        return execution(train, self._optimizer, length, imbalance, kernels)

    @property
    def _optimizer(self) -> Optimizer:
        """The stage's, or that of the first phase."""
        assert not isinstance(self.stage, Rejection | Evaluate)
        return self.stage.phases[0].optimizer if isinstance(self.stage, Pretrain) else self.stage.optimizer

    def _built(self, train: Train) -> tuple[Architecture, Layout]:
        arch = self.arch.scored() if isinstance(self.stage, Preference) else self.arch
        arch, layout = trained(arch, self._layout, train.mtp_loss)
        fitting(arch, layout, self.settings.gpus, f"stages.{self.name}.layout" if self.stage.layout else "layout")
        return arch, layout

    def _micro_batches(self, layout: Layout, train: Train, sequences: int, length: float) -> int:
        """Full micro-batches of each data-parallel rank."""
        return rounded(chunks(train, sequences, length) / layout.dp(self.settings.gpus), layout)

    def _step(self, stage: Pretrain | Sft | Preference | Distill | Grpo) -> tuple[int, int]:
        """Sequences of one optimizer step, and the tokens of one of them."""
        match stage:
            case Pretrain():
                return max(phase.documents_per_update for phase in stage.phases), 4096
            case Grpo():
                lengths = self._lengths(stage)
                samples = stage.prompts_per_rollout * stage.group_size // stage.updates_per_rollout
                return samples, int(lengths.prompt + lengths.expected())
            case _:
                each = 2 if isinstance(stage, Preference) and stage.loss == "pairwise" else 1
                return stage.batch * each, self.settings.document

    def _lengths(self, stage: Grpo) -> Lengths:
        cap = int(largest(stage.sampling.max_new_tokens))
        return Lengths(self.settings.prompt, self.settings.response or 0.3 * cap, cap)

    def _training_alone(self, stage: Pretrain | Sft | Preference | Distill, cycles: int | None) -> StagePlan:
        arch, layout = self._built(stage.train)
        sequences, length = self._step(stage)
        how = self._how(stage.train, length)
        count = self._micro_batches(layout, stage.train, sequences, how.length)
        memory = training_memory(arch, layout, self.settings.gpus, how, count, constants=self.constants)
        found = step(arch, layout, self.settings.gpus, how, count, self.settings.device, self.constants)
        seconds = {"training": found.busy.total + found.bubble, "gradients and optimizer": found.gradients + found.optimizer}
        flops = {"training": training_flops(arch, how.length) / how.length}
        host = self._host(memory)
        problems = [*self._gpu_problems(memory), *self._host_problems(host)]
        return self._result(layout, count, how, memory, None, host, seconds, found.busy, found.bubble, flops, cycles, problems)

    def _generation_alone(self) -> StagePlan:
        engine = self._engine()
        generation = self._generation(engine)
        flops = {"generation": decode_flops(self.arch, 4096)}
        problems = self._engine_problems(generation, None)
        return self._result(None, 0, None, [], generation, {}, {}, None, 0.0, flops, None, problems)

    def _reinforcement(self, stage: Grpo) -> StagePlan:
        settings, constants = self.settings, self.constants
        arch, layout = self._built(stage.train)
        lengths = self._lengths(stage)
        sequences, length = self._step(stage)
        how = self._how(stage.train, length)
        samples = sequences * stage.updates_per_rollout
        count = self._micro_batches(layout, stage.train, sequences, length)
        reference = int(largest(stage.objective.kl_coef) > 0)
        # While another model computes, the policy's weights wait on the host too.
        others = reference + len(stage.reward_models)
        memory = training_memory(
            arch, layout, settings.gpus, how, count, copies=others + bool(others), bucket_bytes=self._bucket(), constants=constants
        )
        engine = self._engine()
        generation = self._generation(engine)
        trained_step = step(arch, layout, settings.gpus, how, count, settings.device, constants)
        forward = self._forward(arch, layout, how, count) * stage.updates_per_rollout
        seconds = {
            "rollout": rollout_seconds(self.arch, engine, settings.device, engine.layout.ranks, samples, lengths, constants),
            "reference": forward * reference,
            "reward models": forward * len(stage.reward_models),
            # The first minibatch's old log-probs are those of its own training forward.
            "old log-probs": forward * (stage.updates_per_rollout - 1) / stage.updates_per_rollout,
            "training": trained_step.seconds * stage.updates_per_rollout,
            "weight sync": sync_seconds(
                self.arch, engine, settings.device, settings.gpus, settings.gpus, direct=False, constants=constants
            ),
        }
        flops = {
            "training": training_flops(arch, length) / length,
            "log-probs": forward_flops(replace(arch, mtp_layers=0), length) / length,
            "generation": decode_flops(self.arch, lengths.prompt + lengths.expected() / 2),
        }
        host = self._host(memory, generation)
        problems = [*self._gpu_problems(memory), *self._engine_problems(generation, lengths), *self._host_problems(host)]
        seconds = {phase: value for phase, value in seconds.items() if value}
        cycles = ceil(stage.updates / stage.updates_per_rollout)
        busy = trained_step.busy
        return self._result(layout, count, how, memory, generation, host, seconds, busy, trained_step.bubble, flops, cycles, problems)

    def _forward(self, arch: Architecture, layout: Layout, how: Execution, count: int) -> float:
        costs = Costs.of(arch, layout, how, self.settings.device, self.constants, training=False)
        found = [costs.stage(chunks).total for chunks in stages(arch, layout)]
        return max(found) * count + sum(found) / len(found) * count * bubble(layout.pp, layout.vpp, count)

    def _result(
        self,
        layout: Layout | None,
        count: int,
        how: Execution | None,
        memory: Sequence[RankMemory],
        generation: Generation | None,
        host: dict[str, float],
        seconds: dict[str, float],
        busy: Seconds | None,
        bubble: float,
        flops: dict[str, float],
        cycles: int | None,
        problems: Sequence[Problem],
    ) -> StagePlan:
        tokens = 0 if how is None else how.tokens
        return StagePlan(
            self.name, self.stage.kind, layout, self.settings.gpus, count, tokens, tuple(memory), generation, host, seconds, busy, bubble,
            flops, cycles, tuple(problems),
        )  # fmt: skip

    # ------------------------------------------------------------ the engine and the host

    def _engine(self) -> Engine:
        """What draws, as far as SGLang's servers go; the embedded engine, of which there is one a rank, is planned as servers too."""
        rollout = self.recipe.rollout
        return replace(self._servers(), running=rollout.sglang.max_running_requests if rollout.engine == "sglang" else rollout.batch)

    def _bucket(self) -> float:
        """Bytes of a weight sync that a rank puts together at once: of own shards, those of one GPU of a server."""
        sglang = self.recipe.rollout.sglang
        return sglang.bucket_bytes / (sglang.layout.tp if sglang.path == "shards" else 1)

    def _servers(self) -> Engine:
        """As `--engine-tp` says, or the recipe's servers; where neither says anything, the smallest that leave room for a cache."""
        settings, sglang = self.settings, self.recipe.rollout.sglang
        tp, fp8 = settings.engine_tp, settings.engine_fp8 or sglang.block_fp8
        if tp is not None:
            if settings.gpus % tp or not serves(self.arch, tp):
                near = [size for size in SERVERS if settings.gpus % size == 0 and serves(self.arch, size)]
                nearest = min(near, key=lambda size: abs(size - tp), default=None)
                raise UserError(
                    f"--engine-tp {tp}: servers of {tp} GPUs do not divide {settings.gpus:,} GPUs or the model; nearest: {nearest}"
                )
            return server(self.arch, tp, settings.gpus, fp8)
        if sglang.layout != EngineLayout():
            layout = sglang.layout
            check_engine(self.arch, layout)
            if sglang.placement == "colocated" and settings.other_gpus:
                layout = layout.model_copy(update={"servers": max(1, settings.gpus // layout.tp)})
            if sglang.placement == "colocated" and layout.ranks > settings.gpus:
                raise UserError(
                    f"rollout.sglang.layout: {layout.servers} servers of {layout.tp} GPUs are more than the trainer's {settings.gpus:,}, "
                    f"which they share; make them {settings.gpus // layout.tp}, or smaller"
                )
            return Engine(layout, fp8, sglang.mem_fraction or 0.8)
        return smallest_engine(self.arch, settings.device, settings.gpus, fp8)

    def _generation(self, engine: Engine) -> Generation:
        weights = engine_weights(self.arch, engine)
        device = self.settings.device
        return Generation(
            engine, engine.layout.servers, weights, engine.memory * device.hbm - weights, cache_tokens(self.arch, engine, device)
        )

    def _host(self, memory: Sequence[RankMemory], generation: Generation | None = None) -> dict[str, float]:
        """Of the fullest node: what its ranks keep there; with engines on the same GPUs, what the trainer leaves to them as well."""
        per_node = min(self.settings.device.per_node, self.settings.gpus)
        fullest = max(memory, key=lambda rank: sum(rank.host.values()) + rank.gpu.weights + rank.gpu.optimizer)
        host = {name: per_node * size for name, size in fullest.host.items()}
        if generation is not None and self.recipe.rollout.sglang.placement == "colocated":
            host["trainer, while engines generate"] = per_node * (fullest.gpu.weights + fullest.gpu.optimizer)
        return host

    # ------------------------------------------------------------ what does not fit

    def _gpu_problems(self, memory: Sequence[RankMemory]) -> list[Problem]:
        worst = max(memory, key=lambda rank: rank.gpu.total)
        has = self.settings.device.hbm
        if worst.gpu.total <= has:
            return []
        part = max(worst.gpu.parts().items(), key=lambda item: item[1])[0]
        return [Problem(f"pipeline stage {worst.stage}", "GPU memory", worst.gpu.total, has, _ADVICE[part])]

    def _engine_problems(self, generation: Generation, lengths: Lengths | None) -> list[Problem]:
        if generation.cache <= 0:
            has = generation.engine.memory * self.settings.device.hbm
            return [Problem("engine", "GPU memory for its weights", generation.weights, has, "a larger --engine-tp, or --engine-fp8")]
        if lengths is not None and generation.cache_tokens < lengths.prompt + lengths.cap:
            has = generation.cache_tokens
            return [Problem("engine", "tokens of key-value cache", lengths.prompt + lengths.cap, has, "a larger --engine-tp")]
        return []

    def _host_problems(self, host: dict[str, float]) -> list[Problem]:
        needs, has = sum(host.values()), self.settings.device.host
        return [] if needs <= has else [Problem("node", "host memory", needs, has, "more GPUs, or a smaller optimizer.offload")]


_ADVICE = {
    "weights": "more pp, ep or tp",
    "gradients": "more pp, ep or tp",
    "optimizer": "optimizer.offload, optimizer.moments=bfloat16, or more GPUs",
    "activations": "train.recompute, a smaller train.chunk_tokens, or more tp or cp",
    "working": "a smaller train.chunk_tokens, or more tp or cp",
    "dispatch": "a smaller train.chunk_tokens, or more tp or cp",
    "logits": "a smaller train.logprob_chunk, or more tp",
    "buckets": "smaller buckets",
    "runtime": "a larger device",
}

"""Where SGLang keeps every canonical tensor: one more placement, for engines that are sent their own shards.

Learnt from SGLang 0.5.23 (`models/deepseek_v2.py`, `qwen2.py`, `llama.py`, `layers/linear.py`, `vocab_parallel_embedding.py`,
`moe/fused_moe_triton/layer.py`). It holds for backends that keep weights as they were loaded (torch native, Triton); those that
permute experts afterwards (FlashInfer's TRT-LLM and CUTLASS kernels, AITER) take full tensors only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Literal

from r1mega.config.engine_layout import EngineLayout
from r1mega.errors import UserError
from r1mega.weights import families
from r1mega.weights.architecture import Architecture, Mla
from r1mega.weights.blocks import BLOCK, whole_blocks
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.placement import Axis, Holders, LocalParam
from r1mega.weights.table import Row, Shard, Storage, layer_prefix

Part = Literal["whole", "attention", "tp", "experts"]
"""Over which ranks of a server a parameter is cut: none, those of one copy of the attention, all, or all as experts are."""

_REPLICATED: dict[Part, tuple[Axis, ...]] = {"whole": ("tp", "dp"), "attention": ("dp",), "tp": (), "experts": ()}
"""Along the ranks of one copy of the attention, along these copies."""

PADDING = 64
"""Rows of the embedding and the output layer are padded to a multiple of this."""

CPU_PADDING = 32
"""Columns of MLPs are padded to a multiple of this times tp where SGLang runs on a CPU (`configs/update_config.py`)."""


@dataclass(frozen=True, slots=True)
class EngineParam(LocalParam):
    """A parameter of one engine rank. Chunk 0 is the model, chunk 1 the draft model made of the MTP layer.

    `shape` and the pieces' boxes are those of the parameter as a matrix; SGLang's own shape is `tensor_shape`.
    """

    storage: Storage = Storage.PLAIN
    stacked: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """[experts, rows, columns] of stacked experts, otherwise `shape`."""
        return (self.stacked, self.shape[0] // self.stacked, self.shape[1]) if self.stacked else self.shape


@dataclass(frozen=True, slots=True)
class Derived:
    """An attribute that an engine computes from a parameter after loading; it is no parameter, and no checksum covers it.

    It is rebuilt at the end of a session with full tensors. After a direct load it is stale until an empty session follows.
    """

    name: str
    of: str


def derived(arch: Architecture) -> tuple[Derived, ...]:
    """MLA's absorbed projections, of every layer."""
    if arch.mla is None:
        return ()
    attention = [f"{layer_prefix(index)}self_attn." for index in range(arch.layers)]
    return tuple(Derived(prefix + name, prefix + "kv_b_proj.weight") for prefix in attention for name in ("w_kc", "w_vc"))


def engine_params(arch: Architecture, engine: EngineLayout, rank: int, mtp: bool = False) -> list[EngineParam]:
    """Every parameter of a rank of a server (0 <= rank < tp).

    Args:
        mtp: whether the server drafts with the MTP layer, which is a model of its own (chunk 1).

    Raises:
        UserError: the layout does not divide the model.
    """
    check_engine(arch, engine, mtp)
    return list(_rank_params(arch, engine, rank, mtp))


def engine_holders(arch: Architecture, engine: EngineLayout, first: int = 0, mtp: bool = False) -> list[Holders]:
    """The placement of all ranks of all servers, for `transfer_plan` and `direct_plan`. Parameters are made when they are asked for.

    Args:
        first: number of the engine's first rank. 0 when trainer and engine share their GPUs: what a rank holds already stays there.
            The trainer's world size when they do not.
    """
    check_engine(arch, engine, mtp)
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for rank in range(engine.ranks):
        for key in dict.fromkeys(_key(engine, rank % engine.tp, part) for part in _PARTS):
            groups.setdefault(key, []).append(first + rank)
    lazy = (Holders(tuple(ranks), _Params(arch, engine, (ranks[0] - first) % engine.tp, mtp, key)) for key, ranks in groups.items())
    return [group for group in lazy if any(True for _ in group.params)]


def engine_group(group: Holders) -> Iterator[EngineParam]:
    """The parameters of a group of engine ranks."""
    for param in group.params:
        assert isinstance(param, EngineParam)
        yield param


_PARTS: tuple[Part, ...] = ("whole", "attention", "tp", "experts")


def _key(engine: EngineLayout, rank: int, part: Part) -> tuple[bool, int, int]:
    """(experts or not, over how many ranks, which of them): ranks with the same key hold the same parameters of this part."""
    if part == "experts":
        return True, engine.tp, rank
    index, parts = _cut_of(engine, rank, part)
    return False, parts, index


def _cut_of(engine: EngineLayout, rank: int, part: Part) -> tuple[int, int]:
    """(which share, of how many) a rank has of a tensor; of experts, within its own expert."""
    parts = {"whole": 1, "attention": engine.attn_tp, "tp": engine.tp, "experts": engine.moe_tp}[part]
    return rank % parts, parts


@dataclass(frozen=True)
class _Params:
    """The parameters that ranks of one key hold alike, made anew on every walk: those of all ranks do not fit into memory at once."""

    arch: Architecture
    engine: EngineLayout
    rank: int
    mtp: bool
    key: tuple[bool, int, int]

    def __iter__(self) -> Iterator[EngineParam]:
        return _rank_params(self.arch, self.engine, self.rank, self.mtp, self.key)


# ---------------------------------------------------------------- what an engine may be


def check_engine(arch: Architecture, engine: EngineLayout, mtp: bool = False) -> None:
    """UserError when the engine does not serve such a model, or a parallel size does not divide what it cuts."""
    if arch.head == "score":
        raise UserError("rollout.sglang.layout: a reward model has no vocabulary; it is not served")
    checks = [("tp / attn_dp", engine.attn_tp, arch.heads, "attention heads")]
    if engine.device == "cpu":
        # SGLang would pad heads there; columns of MLPs it does pad.
        checks += [("tp", engine.tp, arch.heads, "attention heads"), ("tp", engine.tp, arch.kv_heads, "key-value heads")]
    else:
        checks += _mlp_checks(arch, engine)
        if arch.mla is None and engine.tp > arch.kv_heads:
            checks.append(("key-value heads", arch.kv_heads, engine.tp, "GPUs (tp)"))
        elif arch.mla is None:
            checks.append(("tp", engine.tp, arch.kv_heads, "key-value heads"))
    if arch.moe is not None:
        checks.append(("ep", engine.ep, arch.moe.experts, "experts"))
        checks.append(("tp / ep", engine.moe_tp, arch.moe.intermediate_size, "columns of an expert"))
    for name, size, what, unit in checks:
        if what % size:
            near = [fits for fits in range(1, what + 1) if what % fits == 0]
            below, above = max(fit for fit in near if fit <= size or fit == 1), next((fit for fit in near if fit > size), None)
            others = f"{below} or {above}" if above else f"{below}"
            raise UserError(f"rollout.sglang.layout: {name} = {size} does not divide the {what} {unit}; {others} would")
    if arch.moe is None and engine.ep > 1:
        raise UserError(f"rollout.sglang.layout: ep={engine.ep} needs a model with experts")
    if arch.mla is None and engine.attn_dp > 1:
        raise UserError(f"rollout.sglang.layout: attn_dp={engine.attn_dp} is planned for latent attention (DeepSeek) only")
    if engine.shared_experts == "fused" and (arch.moe is None or arch.moe.shared_experts != 1):
        raise UserError("rollout.sglang.layout: shared_experts=fused needs a model with exactly one shared expert")
    if mtp and arch.mtp_layers != 1:
        raise UserError(f"rollout.sglang.layout: drafting needs one MTP layer, the model has {arch.mtp_layers}")


def _mlp_checks(arch: Architecture, engine: EngineLayout) -> list[tuple[str, int, int, str]]:
    """(size, its value, what it must divide, the unit of that) of columns that are not padded."""
    checks = [("tp", 1 if engine.dense_tp == "whole" else engine.tp, arch.intermediate_size, "columns of the dense MLP")]
    if arch.moe is not None and engine.shared_experts == "tp":
        checks.append(("tp", engine.tp, arch.moe.shared_experts * arch.moe.intermediate_size, "columns of the shared experts"))
    return checks


def check_block_fp8(param: EngineParam, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError when a rank's share of a quantised parameter cuts a block, which SGLang refuses to serve.

    Args:
        shapes: of the canonical tensors.
    """
    for piece in param.pieces:
        if not whole_blocks(piece.source, shapes[piece.tensor]) or any(start % BLOCK for start in piece.box.start):
            share = " x ".join(map(str, piece.source.shape))
            raise UserError(
                f"rollout.sglang.layout: {param.name} cannot be served in block FP8: a rank's share of {piece.tensor} is {share}, not "
                f"whole blocks of {BLOCK} x {BLOCK}; choose a smaller tp, more ep, or dense_tp and shared_experts: whole"
            )


# ---------------------------------------------------------------- the parameters


@dataclass(frozen=True, slots=True)
class _Strip:
    """A canonical tensor among those stacked in a parameter.

    `extent` is its length along the axis that is cut, padding included. It is cut between `units` (heads), which are as long as each other;
    where ranks are more, several hold the same unit. Padding comes last, or at the end of every rank's share when it is `spread`.
    """

    tensor: str
    shape: tuple[int, ...]
    extent: int
    units: int
    spread: bool = False


@dataclass(frozen=True, slots=True)
class _Param:
    """A parameter of a layer: its strips one above the other, each cut along the same axis."""

    name: str
    strips: tuple[_Strip, ...]
    part: Part
    shard: Shard
    storage: Storage
    stacked: int = 0


def _rank_params(
    arch: Architecture, engine: EngineLayout, rank: int, mtp: bool, key: tuple[bool, int, int] | None = None
) -> Iterator[EngineParam]:
    """Parameters of a rank, only those of one key if it is given."""
    table = families.table(arch)
    embedding = [_vocabulary(table.embedding, engine, engine.attn_dp > 1)]
    output = [] if table.head is None else [_vocabulary(table.head, engine, engine.dp_lm_head)]
    place = _Place(arch, engine, rank, key)
    yield from place.params(0, "", "", embedding)
    for index, rows in enumerate(table.layers):
        yield from place.layer(0, layer_prefix(index), layer_prefix(index), rows)
    yield from place.params(0, "", "", [_whole(table.final_norm), *output])
    if mtp:
        prefix = layer_prefix(arch.layers)
        yield from place.params(1, prefix, "model.", map(_whole, table.mtp[0].own))
        yield from place.layer(1, prefix, "model.decoder.", table.mtp[0].layer)


def _layer(arch: Architecture, engine: EngineLayout, rows: tuple[Row, ...], experts: range) -> Iterator[_Param]:
    by_name = {row.tensor: row for row in rows}
    yield _whole(by_name["input_layernorm.weight"])
    if arch.mla is not None:
        yield from _latent_attention(arch, arch.mla, by_name)
    else:
        yield from _attention(arch, by_name)
    yield _whole(by_name["post_attention_layernorm.weight"])
    if "mlp.gate.weight" not in by_name:
        yield from _gated_mlp("mlp.", by_name, engine, "tp" if engine.dense_tp == "tp" else "whole")
        return
    yield _whole(by_name["mlp.gate.weight"])
    if "mlp.gate.e_score_correction_bias" in by_name:
        yield _whole(by_name["mlp.gate.e_score_correction_bias"])
    yield from _experts(by_name, engine, experts)
    if "mlp.shared_experts.gate_proj.weight" in by_name and engine.shared_experts != "fused":
        count = arch.moe.shared_experts if arch.moe else 1
        yield from _gated_mlp("mlp.shared_experts.", by_name, engine, engine.shared_experts, count)


def _latent_attention(arch: Architecture, mla: Mla, rows: Mapping[str, Row]) -> Iterator[_Param]:
    if mla.q_lora_rank is None:
        yield _cut("self_attn.q_proj.weight", [rows["self_attn.q_proj.weight"]], "attention", Shard.ROWS, [arch.heads])
        yield _whole(rows["self_attn.kv_a_proj_with_mqa.weight"])
    else:
        down = [rows["self_attn.q_a_proj.weight"], rows["self_attn.kv_a_proj_with_mqa.weight"]]
        yield _cut("self_attn.fused_qkv_a_proj_with_mqa.weight", down, "whole", Shard.ROWS)
        yield _whole(rows["self_attn.q_a_layernorm.weight"])
        yield _cut("self_attn.q_b_proj.weight", [rows["self_attn.q_b_proj.weight"]], "attention", Shard.ROWS, [arch.heads])
    yield _cut("self_attn.kv_b_proj.weight", [rows["self_attn.kv_b_proj.weight"]], "attention", Shard.ROWS, [arch.heads])
    yield _cut("self_attn.o_proj.weight", [rows["self_attn.o_proj.weight"]], "attention", Shard.COLUMNS)
    yield _whole(rows["self_attn.kv_a_layernorm.weight"])


def _attention(arch: Architecture, rows: Mapping[str, Row]) -> Iterator[_Param]:
    units = [arch.heads, arch.kv_heads, arch.kv_heads]
    for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
        strips = [rows[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
        yield _cut(f"self_attn.qkv_proj.{kind}", strips, "tp", Shard.ROWS, units)
    yield _cut("self_attn.o_proj.weight", [rows["self_attn.o_proj.weight"]], "tp", Shard.COLUMNS)


def _gated_mlp(prefix: str, rows: Mapping[str, Row], engine: EngineLayout, part: Part, count: int = 1) -> Iterator[_Param]:
    """`count` equal MLPs side by side; each is padded for itself, and all padding comes last."""
    found = {name: rows[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")}
    extent = count * _padded(found["gate"].shape[0] // count, engine)
    yield _padded_param(f"{prefix}gate_up_proj.weight", [found["gate"], found["up"]], part, Shard.ROWS, extent)
    yield _padded_param(f"{prefix}down_proj.weight", [found["down"]], part, Shard.COLUMNS, extent)


def _padded_param(name: str, rows: Sequence[Row], part: Part, shard: Shard, extent: int) -> _Param:
    strips = tuple(_Strip(row.tensor, row.shape, extent, extent) for row in rows)
    return _Param(name, strips, part, shard, rows[0].storage)


def _padded(columns: int, engine: EngineLayout) -> int:
    multiple = CPU_PADDING * engine.tp if engine.device == "cpu" else 1
    return -(-columns // multiple) * multiple


def _experts(rows: Mapping[str, Row], engine: EngineLayout, experts: range) -> Iterator[_Param]:
    """A rank's experts in one parameter: gate over up, expert after expert, and a fused shared expert last."""
    fused = engine.shared_experts == "fused"
    extent = _padded(rows["mlp.experts.{e}.gate_proj.weight"].shape[0], engine)
    for name, projections, shard in (("w13_weight", ("gate", "up"), Shard.ROWS), ("w2_weight", ("down",), Shard.COLUMNS)):
        found = [rows[f"mlp.experts.{{e}}.{projection}_proj.weight"] for projection in projections]
        strips = [_Strip(row.tensor.format(e=expert), row.shape, extent, extent, spread=True) for expert in experts for row in found]
        if fused:
            shared = [rows[f"mlp.shared_experts.{projection}_proj.weight"] for projection in projections]
            strips += [_Strip(row.tensor, row.shape, extent, extent, spread=True) for row in shared]
        yield _Param(f"mlp.experts.{name}", tuple(strips), "experts", shard, found[0].storage, len(experts) + fused)


def _whole(row: Row) -> _Param:
    return _cut(row.tensor, [row], "whole", Shard.ROWS)


def _vocabulary(row: Row, engine: EngineLayout, like_attention: bool) -> _Param:
    part: Part = "attention" if like_attention else "tp"
    parts = engine.attn_tp if like_attention else engine.tp
    padding = PADDING if -(-row.shape[0] // PADDING) * PADDING % parts == 0 else PADDING * parts
    return _padded_param(row.tensor, [row], part, Shard.ROWS, -(-row.shape[0] // padding) * padding)


def _cut(name: str, rows: Sequence[Row], part: Part, shard: Shard, units: Sequence[int] | None = None) -> _Param:
    """A parameter without padding; `units` are the heads of each of its tensors, rows when left out."""
    lengths = [row.shape[1 if shard is Shard.COLUMNS else 0] for row in rows]
    strips = (_Strip(row.tensor, row.shape, length, count) for row, length, count in zip(rows, lengths, units or lengths, strict=True))
    return _Param(name, tuple(strips), part, shard, rows[0].storage)


@dataclass(frozen=True, slots=True)
class _Share:
    """One rank's share of a parameter of every layer that is alike: its shape, and (tensor, box, source) of its pieces."""

    param: _Param
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, Box, Box], ...]


class _Place:
    """A rank's shares. Layers with the same rows have the same boxes, which are worked out once."""

    def __init__(self, arch: Architecture, engine: EngineLayout, rank: int, key: tuple[bool, int, int] | None) -> None:
        self._arch, self._engine, self._rank, self._key = arch, engine, rank, key
        self._layers: dict[int, list[_Share]] = {}

    def layer(self, chunk: int, tensors: str, params: str, rows: tuple[Row, ...]) -> Iterator[EngineParam]:
        """The parameters of a transformer layer; `tensors` and `params` are the prefixes of its names."""
        if id(rows) not in self._layers:
            self._layers[id(rows)] = list(self._shares(_layer(self._arch, self._engine, rows, self._experts())))
        return _named(chunk, tensors, params, self._layers[id(rows)])

    def params(self, chunk: int, tensors: str, params: str, found: Iterable[_Param]) -> Iterator[EngineParam]:
        """The given parameters."""
        return _named(chunk, tensors, params, self._shares(found))

    def _experts(self) -> range:
        local = self._arch.moe.experts // self._engine.ep if self._arch.moe else 0
        first = self._rank // self._engine.moe_tp * local
        return range(first, first + local)

    def _shares(self, found: Iterable[_Param]) -> Iterator[_Share]:
        for param in found:
            if self._key is None or self._key == _key(self._engine, self._rank, param.part):
                yield _share(param, *_cut_of(self._engine, self._rank, param.part))


def _named(chunk: int, tensors: str, params: str, shares: Iterable[_Share]) -> Iterator[EngineParam]:
    for share in shares:
        name = params + share.param.name
        yield EngineParam(
            name, chunk, share.shape, tuple([Piece(chunk, name, box, tensors + tensor, source) for tensor, box, source in share.pieces]),
            _REPLICATED[share.param.part], is_expert=share.param.part == "experts", storage=share.param.storage,
            stacked=share.param.stacked,
        )  # fmt: skip


def _share(param: _Param, index: int, parts: int) -> _Share:
    """Share `index` of `parts` of a parameter."""
    pieces: list[tuple[str, Box, Box]] = []
    rows = 0
    for strip in param.strips:
        height, source = _share_of(strip, param.shard, index, parts)
        if source is not None:
            start = (rows, *(0,) * (len(strip.shape) - 1))
            pieces.append((strip.tensor, Box(start, tuple(map(add, start, source.shape))), source))
        rows += height
    columns = param.strips[0].shape[1:]
    if param.shard is Shard.COLUMNS:
        columns = (param.strips[0].extent // parts,)
    return _Share(param, (rows, *columns), tuple(pieces))


def _share_of(strip: _Strip, shard: Shard, index: int, parts: int) -> tuple[int, Box | None]:
    """(rows that a strip takes in a rank's parameter, its region of the tensor; None when it is padding only)."""
    axis = 1 if shard is Shard.COLUMNS else 0
    unit = strip.extent // strip.units
    length = max(1, strip.units // parts) * unit
    first = index * strip.units // parts * unit
    last = min(first + length, strip.shape[axis])
    if strip.spread:
        first, last = (strip.shape[axis] // parts * i for i in (index, index + 1))
    start, stop = [0] * len(strip.shape), list(strip.shape)
    start[axis], stop[axis] = first, last
    return strip.shape[0] if axis else length, Box(tuple(start), tuple(stop)) if last > first else None
